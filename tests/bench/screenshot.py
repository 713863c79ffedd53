"""Draw the screens as SVG: all pictures of the README anew, or one run.

    python tests/bench/screenshot.py --all                     every picture, and the text that the test compares
    python tests/bench/screenshot.py RUN_FOLDER OUT.svg        the run screen of any run, as it is now

Nothing in a picture is drawn by hand: it is what the program shows for a recorded real run (tests/recorded), or for the
wizard on a known card.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / ".pkg"))

import pictures

from qlora_tui.tui.app import TunerApp


async def of_run(folder: Path, size: tuple[int, int], keys: list[str]) -> list[list[pictures.Cell]]:
    """Return the cells of the run screen of `folder`, after pressing `keys`."""
    app = TunerApp(start=None, draft=None, follow=folder, readonly=True)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        screen = app.run_screen
        while screen is not None and screen.behind:
            screen.look()
        await pilot.press(*keys)
        await pilot.pause()
        return pictures.cells(app)


def renew(names: list[str]) -> int:
    """Draw the pictures whose names begin with one of `names`, all of them without; remove those that nobody draws any more."""
    pictures.FOLDER.mkdir(exist_ok=True)
    shots = [shot for shot in pictures.SHOTS if not names or shot.name.startswith(tuple(names))]
    for shot in shots:
        with tempfile.TemporaryDirectory() as home:
            rows = asyncio.run(pictures.take(shot, Path(home)))
        text, path = pictures.as_text(rows), pictures.FOLDER / f"{shot.name}.txt"
        changed = not path.exists() or path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8")
        path.with_suffix(".svg").write_text(pictures.as_svg(rows, pictures.TITLES[shot.scene]), encoding="utf-8")
        print(f"{'changed' if changed else 'same   '}  {shot.name}.svg")
    known = {shot.name for shot in pictures.SHOTS}
    for path in sorted(pictures.FOLDER.iterdir()):
        if path.suffix in (".svg", ".txt") and path.stem not in known:
            path.unlink()
            print(f"removed  {path.name}")
    return 0


def main() -> int:
    """Read the arguments, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--all", nargs="*", metavar="NAME", help="draw the README's pictures anew; with names, only those that begin so")
    parser.add_argument("--size", default="100x30", help="columns x lines")
    parser.add_argument("--keys", default="", help="keys to press first, separated by commas")
    given = parser.parse_args()
    if given.all is not None:
        return renew(given.all)
    if given.folder is None or given.out is None:
        parser.error("say --all, or a run's folder and where the picture goes")
    width, height = (int(part) for part in given.size.split("x"))
    rows = asyncio.run(of_run(given.folder, (width, height), [key for key in given.keys.split(",") if key]))
    given.out.write_text(pictures.as_svg(rows, f"qlora-tui attach {given.folder.name}"), encoding="utf-8")
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
