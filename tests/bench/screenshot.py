"""Draw the run screen of a real run as an SVG, for the docs: `python tests/bench/screenshot.py RUN_FOLDER OUT.svg`.

The picture is what the screen shows for that folder's journal; nothing in it is drawn by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from pathlib import Path

from qlora_tui.tui.app import TunerApp


async def picture(folder: Path, size: tuple[int, int], keys: list[str]) -> str:
    """Return the run screen of `folder` as SVG text, after pressing `keys`."""
    app = TunerApp(start=None, draft=None, follow=folder, readonly=True)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        screen = app.run_screen
        while screen is not None and screen.behind:
            screen.look()
        await pilot.press(*keys)
        await pilot.pause()
        return portable(app.export_screenshot(title=f"qlora-tui attach {folder.name}"))


_FONTS = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_CELL = 12.2  # how wide the exporter draws a cell
_TEXT = re.compile(r'(<text class="[^"]*") x="([\d.]+)" (y="[\d.]+") textLength="[\d.]+"([^>]*)>((?:&#160;|[^<&]|&[^;]+;)*)</text>')


def portable(svg: str) -> str:
    """Return `svg` without a font from the network, which pages do not load, and with no text that begins or ends in spaces.

    Some programs drop such spaces and shift what follows; here each word stands where its first letter belongs.
    """
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: *Fira Code[^;]*;", f"font-family: {_FONTS};", svg)
    return _TEXT.sub(_words, svg)


def _words(match: re.Match[str]) -> str:
    """Return one text element for each run of words, and one for each cell of a plot: its dots are wider in most fonts."""
    head, left, at, rest, inner = match.groups()
    cells = re.findall(r"&[^;]+;|.", inner)
    line = "".join(" " if cell == "&#160;" else "d" if "\u2800" <= cell <= "\u28ff" else "x" for cell in cells)
    found = []
    for word in re.finditer(r"d|x+(?: x+)*", line):
        start, end = word.span()
        x, length = float(left) + start * _CELL, (end - start) * _CELL
        found.append(f'{head} x="{x:.1f}" {at} textLength="{length:.1f}"{rest}>{"".join(cells[start:end])}</text>')
    return "".join(found)


def main() -> int:
    """Read the arguments, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="100x30", help="columns x lines")
    parser.add_argument("--keys", default="", help="keys to press first, separated by commas")
    given = parser.parse_args()
    width, height = (int(part) for part in given.size.split("x"))
    keys = [key for key in given.keys.split(",") if key]
    given.out.write_text(asyncio.run(picture(given.folder, (width, height), keys)), encoding="utf-8")
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
