"""csrc/*.cu as C++ for the emulation: `python translate.py SOURCE TARGET [OLD NEW]`.

Launches become calls of emulation::launch; every other line is as it was, at its own number. OLD, which must
stand in the source once, is replaced by NEW: a seeded fault.
"""

import re
import sys
from pathlib import Path

LAUNCH = re.compile(r"(\w+)<<<([^;]+?), (\w+), 0, ([^;]+?)>>>\(")


def translate(source: Path, target: Path, fault: tuple[str, str] | None = None) -> None:
    text = source.read_text()
    if fault is not None:
        old, new = fault
        if text.count(old) != 1:
            raise ValueError(f"{source.name}: a fault must replace what stands there once, not {old!r}")
        text = text.replace(old, new)
    text = LAUNCH.sub(r"emulation::launch(\2, \3, \4, \1, ", text)
    if "<<<" in text:
        raise ValueError(f"{source.name}: a launch is not of the form kernel<<<grid, threads, 0, stream>>>(")
    target.write_text(f'#line 1 "{source.name}"\n{text}')


if __name__ == "__main__":
    old_and_new = sys.argv[3:]
    translate(Path(sys.argv[1]), Path(sys.argv[2]), (old_and_new[0], old_and_new[1]) if old_and_new else None)
