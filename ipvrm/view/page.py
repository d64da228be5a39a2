"""One self-contained HTML file: a template of this folder, its style, its script and its data."""

import json
from importlib.resources import files
from typing import Any


def page(name: str, data: dict[str, Any]) -> str:
    """The template `name`.html with style.css, `name`.js and `data` in it; it loads nothing."""
    here = files("ipvrm.view")
    text = {
        part: (here / part).read_text(encoding="utf-8")
        for part in ("style.css", f"{name}.html", f"{name}.js")
    }
    whole = text[f"{name}.html"]
    for place, part in (("STYLE", text["style.css"]), ("SCRIPT", text[f"{name}.js"]), ("DATA", block(data))):
        whole = whole.replace(f"/*{place}*/", part, 1)
    return whole


def block(data: dict[str, Any]) -> str:
    """`data` as JSON within a <script>: no `<` is left that could end it. Raises ValueError on NaN."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def rounded(x: float) -> float | int | None:
    """Three significant digits; None for what is not finite."""
    if not abs(x) < float("inf"):
        return None
    short = float(f"{x:.3g}")
    return int(short) if short == int(short) else short
