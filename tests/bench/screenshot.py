"""Draw the run screen of a real run as an SVG, for the docs: `python tests/bench/screenshot.py RUN_FOLDER OUT.svg`.

The picture is what the screen shows for that folder's journal; nothing in it is drawn by hand.
"""

from __future__ import annotations

import argparse
import asyncio
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
        return app.export_screenshot(title=f"qlora-tui attach {folder.name}")


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
