"""One self-contained HTML file: a template of this folder, its style, its script and its data."""

import json
from importlib.resources import files
from typing import Any


def page(name: str, data: dict[str, Any]) -> str:
    """The template `name`.html with style.css, dom.js, `name`.js and `data` in it; it loads nothing."""
    here = files("ipvrm.view")
    parts = ("style.css", f"{name}.html", "dom.js", f"{name}.js")
    style, whole, dom, script = ((here / part).read_text(encoding="utf-8") for part in parts)
    for place, part in (("STYLE", style), ("SCRIPT", dom + script), ("DATA", block(data))):
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
