"""Pictures of the screens: a recorded real run and a known card, a frozen clock, and the cells as text and as SVG.

`tests/bench/screenshot.py --all` draws them anew; `tests/tui/test_pictures.py` draws each again and compares.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from xml.sax.saxutils import escape

import textual
from canned_run import QuietDesk
from rich.style import Style
from textual.widgets import Input

from qlora_tui.engine import preset
from qlora_tui.engine.events import decode
from qlora_tui.engine.journal import EVENTS, RunLock
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui.app import TunerApp
from qlora_tui.tui.datalook import DataLook, with_lengths
from qlora_tui.tui.lengths import Lengths
from qlora_tui.tui.preferences import Preferences
from qlora_tui.tui.screens.keys import KeyLine
from qlora_tui.tui.screens.wizard import STEPS

HERE = Path(__file__).resolve().parent
RECORDED = HERE / "recorded" / "20261127-000521-demo"
FOLDER = HERE / "tui" / "pictures"
RENEW = "python tests/bench/screenshot.py --all"
SIZES = ((80, 24), (120, 36))
LOOKS = ("dark", "light", "no-colour")
PATIENCE = 60.0
TITLES = dict.fromkeys(("goal", "wizard", "data", "go"), "qlora-tui --data support-chats.jsonl") | dict.fromkeys(
    ("loading", "run", "done", "help", "palette"), "qlora-tui demo"
)


@dataclass(frozen=True)
class Shot:
    """One picture: which screen, how large, how it looks. `scene` names what is done before it is taken."""

    scene: str
    size: tuple[int, int]
    look: str

    @property
    def name(self) -> str:
        return f"{self.scene}-{self.size[0]}x{self.size[1]}-{self.look}"


SHOTS = tuple(
    [Shot(scene, size, look) for scene in ("wizard", "run") for size in SIZES for look in LOOKS]
    + [Shot("goal", (80, 24), "dark"), Shot("goal", (120, 36), "dark"), Shot("data", (80, 24), "dark"), Shot("go", (80, 24), "dark")]
    + [Shot("done", (80, 24), "dark"), Shot("done", (120, 36), "dark"), Shot("loading", (80, 24), "dark")]
    + [Shot("help", (80, 24), "dark"), Shot("palette", (80, 24), "dark"), Shot("run", (60, 20), "dark"), Shot("wizard", (60, 20), "dark")]
)

# --- the cells ---

Cell = tuple[str, str, str, str]
"""A letter, its colour, its ground, and marks: b(old) i(talic) u(nderline) d(im)."""


def cells(app: TunerApp) -> list[list[Cell]]:
    """Return what is on the screen, cell by cell; the second half of a wide letter is empty."""
    found = []
    update: Any = app.screen._compositor.render_update(full=True, screen_stack=app._background_screens)
    for strips in update.strips:
        row: list[Cell] = []
        for segment in (segment for strip in strips for segment in strip):
            style = segment.style or Style()
            colour, ground = _hex(style.color, "#ffffff"), _hex(style.bgcolor, "#000000")
            if style.reverse:
                colour, ground = ground, colour
            marks = "".join(mark for mark, on in _marks(style) if on)
            row += [(letter, colour, ground, marks) for letter in segment.text]
        found.append(row)
    return found


def _marks(style: Style) -> tuple[tuple[str, bool | None], ...]:
    return ("b", style.bold), ("i", style.italic), ("u", style.underline), ("d", style.dim)


def _hex(colour: Any, fallback: str) -> str:
    return colour.triplet.hex if colour is not None and colour.triplet is not None else fallback


def as_text(rows: list[list[Cell]]) -> str:
    """Return the cells as text that a person can read and `diff` can compare: the lines, then the styles line by line."""
    lines = [f"# textual {textual.__version__}; made by: {RENEW}"]
    lines += [f"|{''.join(cell[0] for cell in row)}|" for row in rows]
    for at, row in enumerate(rows):
        runs: list[str] = []
        start = 0
        for end in range(1, len(row) + 1):
            if end == len(row) or row[end][1:] != row[start][1:]:
                _, colour, ground, marks = row[start]
                shown = "".join(cell[0] for cell in row[start:end]).strip()
                runs.append(f"{start}-{end} {colour if shown else '-'} on {ground}{' ' + marks if marks and shown else ''}")
                start = end
        lines.append(f"{at:>2}: " + "; ".join(runs))
    return "\n".join(lines) + "\n"


def of_text(text: str) -> list[list[Cell]]:
    """Read what `as_text` wrote."""
    lines = text.splitlines()[1:]
    letters = [line[1:-1] for line in lines if line.startswith("|")]
    rows: list[list[Cell]] = []
    for line, styles in zip(letters, lines[len(letters) :], strict=True):
        row: list[Cell] = []
        for run in styles.split(": ", 1)[1].split("; "):
            span, colour, _, ground, *marks = run.split(" ")
            start, end = map(int, span.split("-"))
            row += [(letter, colour, ground, "".join(marks)) for letter in line[start:end]]
        rows.append(row)
    return rows


# --- the picture ---

WIDE, HIGH, FONT = 9, 18, 15
_EDGE, _BAR = 12, 34
_FONTS = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_EIGHTHS_UP = {letter: part / 8 for part, letter in enumerate("▁▂▃▄▅▆▇█", 1)}
_EIGHTHS_RIGHT = {letter: part / 8 for part, letter in enumerate("▏▎▍▌▋▊▉", 1)}
_SHADES = {"░": 0.25, "▒": 0.5, "▓": 0.75}
_LINES = {"─": "lr", "│": "ud", "┌": "rd", "┐": "ld", "└": "ru", "┘": "lu", "├": "rud", "┤": "lud", "┬": "lrd", "┴": "lru", "┼": "lrud"}
_HEAVY = {"━": "lr", "┏": "rd", "┓": "ld", "┗": "ru", "┛": "lu", "┃": "ud"}
_LINES |= {"╭": "rd", "╮": "ld", "╰": "ru", "╯": "lu", "╸": "l", "╺": "r"}
_DOTS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))


def as_svg(rows: list[list[Cell]], title: str) -> str:
    """Return the cells as an SVG: letters stand in a grid; bars, frames and dots are drawn, as terminals do, so no font can tear them."""
    base = rows[0][0][2] if rows else "#000000"
    grounds = [ground for row in rows for _, _, ground, _ in row]
    base = max(set(grounds), key=grounds.count)
    wide, high = len(rows[0]) * WIDE + 2 * _EDGE, len(rows) * HIGH + _EDGE + _BAR
    light = int(base[1:3], 16) > 127
    body = [f'<rect width="{wide}" height="{high}" rx="8" fill="{base}"/>']
    body.append(f'<rect x=".5" y=".5" width="{wide - 1}" height="{high - 1}" rx="8" fill="none" stroke="#808890" stroke-opacity=".5"/>')
    body += [
        f'<circle cx="{20 + 18 * index}" cy="17" r="5.5" fill="{fill}"/>' for index, fill in enumerate(("#e0655c", "#dfb04a", "#5fae5b"))
    ]
    grey = "#5a6270" if light else "#97a4b6"
    body.append(f'<text x="{wide / 2:g}" y="22" fill="{grey}" text-anchor="middle">{escape(title)}</text>')
    body += _grounds(rows, base) + _shapes(rows) + _letters(rows)
    marks = ".b{font-weight:bold}.i{font-style:italic}.u{text-decoration:underline}.d{opacity:.6}"
    style = f"text{{font:{FONT}px {_FONTS};white-space:pre}}{marks}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}"><style>{style}</style>'
    return head + "\n" + "\n".join(body) + "\n</svg>\n"


def _runs(row: list[Cell], key: Callable[[Cell], Any]) -> Iterator[tuple[int, int]]:
    start = 0
    for end in range(1, len(row) + 1):
        if end == len(row) or key(row[end]) != key(row[start]):
            yield start, end
            start = end


def _grounds(rows: list[list[Cell]], base: str) -> list[str]:
    paths: dict[str, list[str]] = {}
    for at, row in enumerate(rows):
        for start, end in _runs(row, lambda cell: cell[2]):
            if row[start][2] != base:
                paths.setdefault(row[start][2], []).append(_box(_EDGE + start * WIDE, _BAR + at * HIGH, (end - start) * WIDE, HIGH))
    return [f'<path fill="{fill}" d="{"".join(boxes)}"/>' for fill, boxes in paths.items()]


def _box(x: float, y: float, wide: float, high: float) -> str:
    return f"M{x:g} {y:g}h{wide:g}v{high:g}h{-wide:g}z"


def _shapes(rows: list[list[Cell]]) -> list[str]:
    paths: dict[tuple[str, float], list[str]] = {}
    for at, row in enumerate(rows):
        for start, end in _runs(row, lambda cell: cell[:2]):
            letter, colour, _, _ = row[start]
            x, y, many = _EDGE + start * WIDE, _BAR + at * HIGH, end - start
            for opacity, box in _drawn(letter, x, y, many):
                paths.setdefault((colour, opacity), []).append(box)
    faint = {opacity: f' fill-opacity="{opacity:g}"' if opacity < 1 else "" for _, opacity in paths}
    return [f'<path fill="{fill}"{faint[opacity]} d="{"".join(boxes)}"/>' for (fill, opacity), boxes in paths.items()]


def _drawn(letter: str, x: float, y: float, many: int) -> Iterator[tuple[float, str]]:
    """Yield opacity and box for `many` of a letter that is a drawing; nothing for one that is text."""
    if letter in _EIGHTHS_UP:
        high = round(HIGH * _EIGHTHS_UP[letter], 2)
        yield 1.0, _box(x, y + HIGH - high, many * WIDE, high)
    elif letter in _SHADES:
        yield _SHADES[letter], _box(x, y, many * WIDE, HIGH)
    elif letter in _EIGHTHS_RIGHT:
        yield from ((1.0, _box(x + at * WIDE, y, round(WIDE * _EIGHTHS_RIGHT[letter], 2), HIGH)) for at in range(many))
    elif sides := _LINES.get(letter, _HEAVY.get(letter, "")):
        thick = 3 if letter in _HEAVY else 1
        joined = many if set(sides) == {"l", "r"} else 1
        for at in range(many if joined == 1 else 1):
            yield 1.0, _frame(sides, x + at * WIDE, y, joined, thick)
    elif "\u2800" < letter <= "\u28ff":
        for at in range(many):
            dots = [place for bit, place in enumerate(_DOTS) if (ord(letter) - 0x2800) >> bit & 1]
            yield 1.0, "".join(_box(x + at * WIDE + 1.3 + 4.5 * column, y + 1.2 + 4.5 * line, 2.2, 2.2) for column, line in dots)


def _frame(sides: str, x: float, y: float, many: int, thick: int) -> str:
    half = thick / 2
    left, right = (0 if "l" in sides else WIDE / 2 - half), (WIDE if "r" in sides else WIDE / 2 + half)
    top, bottom = (0 if "u" in sides else HIGH / 2 - half), (HIGH if "d" in sides else HIGH / 2 + half)
    across = _box(x + left, y + HIGH / 2 - half, right - left + (many - 1) * WIDE, thick) if set(sides) & {"l", "r"} else ""
    return across + (_box(x + WIDE / 2 - half, y + top, thick, bottom - top) if set(sides) & {"u", "d"} else "")


def _letters(rows: list[list[Cell]]) -> list[str]:
    found = []
    for at, row in enumerate(rows):
        y = _BAR + at * HIGH + HIGH - 5
        for start, end in _runs(row, lambda cell: (cell[1], cell[3], cell[0] != " " and _is_drawn(cell[0]))):
            _, colour, _, marks = row[start]
            if _is_drawn(row[start][0]) and row[start][0] != " ":
                continue
            text = "".join(cell[0] for cell in row[start:end])
            for word_start, word in _words(text):
                length = len(word) * WIDE
                kind = f' class="{" ".join(marks)}"' if marks else ""
                x = _EDGE + (start + word_start) * WIDE
                found.append(f'<text x="{x}" y="{y}" fill="{colour}" textLength="{length}"{kind}>{escape(word)}</text>')
    return found


def _is_drawn(letter: str) -> bool:
    drawn = (_EIGHTHS_UP, _SHADES, _EIGHTHS_RIGHT, _LINES, _HEAVY)
    return any(letter in letters for letters in drawn) or "\u2800" <= letter <= "\u28ff"


def _words(text: str) -> Iterator[tuple[int, str]]:
    """Yield where words begin and the words; two spaces part them, since programs shift what stands behind many."""
    at = 0
    for part in text.split("  "):
        if word := part.strip():
            yield at + len(part) - len(part.lstrip()), word
        at += len(part) + 2


# --- what is shown ---


class PictureDesk(QuietDesk):
    """A known card, and data of a usual length, counted."""

    def look_at_data(self, run: RunConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> DataLook:
        """Return 2,400 chats whose lengths are spread as those of real chats are."""
        from statistics import NormalDist

        spread = NormalDist(math.log(310), 0.75)
        tokens = tuple(round(math.exp(spread.inv_cdf((at + 0.5) / 2400))) for at in range(2400))
        turns = (("user", 4310, 4310), ("assistant", 4310, 4310))
        first, trained = tuple(at // 3 for at in tokens), sum(tokens) * 46 // 100
        lengths = Lengths(tokens, measured=True, whole=True, first=first, trained=trained, turns=turns)
        said = ("Can I still change the delivery address?", "Yes, until the parcel leaves our hall: open your order.")
        samples = (("user", said[0]), ("assistant", said[1]))
        look = DataLook(run.data, "messages", "each row has messages with role and content", 2400, samples=samples, copies=(3, 11, 2400))
        return with_lengths(look, lengths)


def _draft() -> RunConfig:
    return preset.resolve(preset="chat-8b-24gb", flags={"data": ("support-chats.jsonl",)})


@contextmanager
def frozen(home: Path, now: float) -> Iterator[None]:
    """Stop the clock and put aside everything of this machine that a screen could show."""
    before, folder = dict(os.environ), Path.cwd()
    for name in ("NO_COLOR", "COLORFGBG", "SSH_CONNECTION", "TMUX", "STY", "LINES", "COLUMNS"):
        os.environ.pop(name, None)
    os.environ |= {"QLORA_TUI_HOME": str(home / "home"), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TZ": "UTC", "TERM": "xterm-256color", "COLORTERM": "truecolor", "LC_ALL": "C.UTF-8"}
    time.tzset()
    os.chdir(home)
    try:
        with mock.patch("time.time", return_value=now):
            yield
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(before)
        time.tzset()


def _cut(scene: str) -> list[str]:
    """Return the recorded lines up to the moment that is shown."""
    lines = (RECORDED / EVENTS).read_text(encoding="utf-8").splitlines(keepends=True)
    ends = {"run": ('"type":"forecast"', 20), "help": ('"type":"forecast"', 20), "palette": ('"type":"forecast"', 20)}
    if scene == "loading":
        return lines[: next(at for at, line in enumerate(lines) if '"type":"evaluated"' in line) - 2]
    if scene == "done":
        return lines
    sign, step = ends[scene]
    after = next(at for at, line in enumerate(lines) if f'"step":{step},' in line and '"type":"saved"' in line)
    return lines[: next(at for at, line in enumerate(lines) if at > after + 6 and sign in line) + 1]


async def take(shot: Shot, home: Path) -> list[list[Cell]]:
    """Return the cells of one picture, drawn by the program itself."""
    if shot.scene in ("goal", "wizard", "data", "go"):
        with frozen(home, 1795737600.0):
            async with _opened(_wizard_app(shot), shot) as (app, pilot):
                return await _wizard(app, pilot, shot)
    lines = _cut(shot.scene)
    last = decode(lines[-1].encode())
    assert last is not None
    with frozen(home, last.t + 0.4):
        folder = Path("runs") / RECORDED.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / EVENTS).write_text("".join(lines), encoding="utf-8")
        lock = RunLock(folder) if shot.scene != "done" else None
        try:
            async with _opened(_run_app(shot, folder), shot) as (app, pilot):
                return await _run(app, pilot, shot)
        finally:
            if lock is not None:
                lock.release()


def _wizard_app(shot: Shot) -> TunerApp:
    return TunerApp(start=lambda run, reading: Path(), draft=_draft(), follow=None, desk=PictureDesk(), preferences=_preferred(shot))


def _run_app(shot: Shot, folder: Path) -> TunerApp:
    return TunerApp(start=None, draft=None, follow=folder, preferences=_preferred(shot))


def _preferred(shot: Shot) -> Preferences:
    if shot.look == "no-colour":
        os.environ["NO_COLOR"] = "1"
    return Preferences("light" if shot.look == "light" else "dark")


@asynccontextmanager
async def _opened(app: TunerApp, shot: Shot) -> AsyncIterator[tuple[TunerApp, Any]]:
    async with app.run_test(size=shot.size) as pilot:
        yield app, pilot


async def _wizard(app: TunerApp, pilot: Any, shot: Shot) -> list[list[Cell]]:
    page = {"goal": "goal", "wizard": "numbers", "data": "data", "go": "go"}[shot.scene]
    wizard = app.screen
    await _until(pilot, lambda: "fits" in _words_on(app))
    for _ in STEPS:
        if wizard.page.title == page:
            break
        before = wizard.page
        await pilot.press("enter")
        await _until(pilot, lambda before=before: wizard.page is not before)
        await _settled(app, pilot)
    if page != "goal":
        await _until(pilot, lambda: wizard.outlook is not None and wizard.outlook.time is not None)
    await _settled(app, pilot)
    return cells(app)


async def _run(app: TunerApp, pilot: Any, shot: Shot) -> list[list[Cell]]:
    screen = app.run_screen
    assert screen is not None
    await _until(pilot, lambda: screen.state.seq > 0 and not screen.behind)
    screen.look()
    if shot.scene in ("help", "palette"):
        await pilot.press({"help": "question_mark", "palette": "colon"}[shot.scene])
        await _until(pilot, lambda: app.screen is not screen)
    await _settled(app, pilot)
    return cells(app)


async def _settled(app: TunerApp, pilot: Any) -> None:
    """Wait until nothing is at work and two looks are the same."""
    for box in app.screen.query(Input):
        box.cursor_blink = False
    await app.workers.wait_for_complete()
    await _until(pilot, lambda: all(line.children for line in app.screen.query(KeyLine)))
    deadline, before = time.monotonic() + PATIENCE, None
    while (now := cells(app)) != before:
        assert time.monotonic() < deadline, "the screen never came to rest"
        before = now
        await pilot.pause(0.15)


async def _until(pilot: Any, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        await pilot.pause(0.02)


def _words_on(app: TunerApp) -> str:
    return "\n".join("".join(cell[0] for cell in row) for row in cells(app))
