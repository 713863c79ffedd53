"""Foreign text on the way to a real terminal: every byte is looked at, and only the screens' own sequences are there."""

from __future__ import annotations

import ast
import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corpus import ATTACKS, FIRST, bad_characters, dressed, stripped, told
from pty_screen import Terminal

from qlora_tui.engine import events as ev

ROOT = Path(__file__).resolve().parents[2]
SIZE = (120, 40)
FOLLOW = """
import sys
from pathlib import Path
from qlora_tui.tui.app import run_app
shown = run_app(start=None, draft=None, follow=Path(sys.argv[1]))
Path(sys.argv[2]).write_text(shown.kind + " " + shown.detail)
"""
WIZARD = """
import json, sys
from dataclasses import replace
from pathlib import Path
from canned_run import QuietDesk
from corpus import ATTACKS, dressed
from qlora_tui.engine.data import Piece
from qlora_tui.engine.errors import ConfigErrors, Problem
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui import app as module
from qlora_tui.tui.datalook import DataLook
from qlora_tui.tui.scoring import Scored, scored_by
from qlora_tui.tui.screens.desk import ModelChoice
from qlora_tui.tui.writtenrows import WrittenRow, WrittenRows
nasty = [dressed(attack) for attack in ATTACKS.values()]
long = " ".join(nasty)[:20000]

class Rows(WrittenRows):
    def __init__(self): pass
    def __len__(self): return len(nasty)
    def at(self, place):
        return WrittenRow(place + 1, 9, 5, (Piece(nasty[place], True, False), Piece(nasty[place], False, True)))

class Desk(QuietDesk):
    def models(self):
        known = super().models()
        return [ModelChoice(text, known[0].spec, "on disk", text) for text in nasty] + known
    def look_at_data(self, run, progress=None):
        return DataLook(run.data, "messages", long, 9, 900, samples=tuple((t, t) for t in nasty), faults=tuple(nasty), refused=9,
                        repeated=tuple((0.5, t, t) for t in nasty))
    def written(self, run):
        return Rows()
    def scored(self, run):
        return Scored(40, tuple((1.0 + n, n) for n in range(20)))
    def answers(self, run, rows):
        return {row: nasty[row % len(nasty)] for row in rows}

def start(run, reading):
    raise ConfigErrors([Problem(text, text, text) for text in nasty])

module.Desk = Desk
draft = RunConfig(model_name_or_path="Qwen/Qwen3-8B", data=(sys.argv[2],), runs_dir=nasty[3], eval_data=nasty[5], skip_bad_rows=True)
shown = module.run_app(start=start, draft=draft, follow=None)
Path(sys.argv[1]).write_text(shown.kind + " " + shown.detail)
"""


@pytest.fixture
def screen(home: Path) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def start(script: str, *arguments: object) -> Terminal:
        made.append(Terminal(script, *map(str, arguments), size=SIZE, QLORA_TUI_HOME=str(home)))
        return made[-1]

    yield start
    for terminal in made:
        terminal.close()


def copied(seen: bytes) -> list[str]:
    """Return what was sent to the terminal's clipboard."""
    return [base64.b64decode(text).decode("utf-8", "surrogatepass") for text in re.findall(rb"\x1b\]52;c;([A-Za-z0-9+/=]*)\x07", seen)]


def assert_plain(seen: bytes) -> str:
    """Fail on any byte that is not a cell or one of the screens' own sequences; return the cells."""
    cells = stripped(seen)
    assert bad_characters(cells) == set()
    return cells


@pytest.mark.parametrize("outcome", ["failed", ""])
def test_the_run_screen_sends_no_byte_of_others(screen: Callable[..., Terminal], write_run: Any, tmp_path: Path, outcome: str) -> None:
    """Each attack in every field, panel by panel, alone and zoomed, in the help, and in what is said at the end."""
    events: list[ev.Event] = [event for attack in ATTACKS.values() for event in told(dressed(attack))]
    events.append(ev.Finding("x", "warn", 9, ATTACKS["bold"], (ATTACKS["click"],)))
    events += [ev.Finished("failed", 1, dressed(ATTACKS["colour"]), adapter=dressed(ATTACKS["retitle"]))] if outcome else []
    folder, _, _ = write_run(events)
    terminal = screen(FOLLOW, folder, tmp_path / "out")
    terminal.read_until(b"Alpha")
    pasted = b"\x1b[200~\x1b]0;x\x07\xc2\x9b31m\x1b[201~"
    for keys in (
        b"1",
        b"2",
        b"3",
        b"4",
        b"\x1b[6~",
        b"\x1b[6~",
        b"5",
        b"\x1b[5~",
        b"\x1b[5~",
        b"/",
        pasted,
        b"\x1b",
    ):
        terminal.type(keys)
        terminal.read_some(0.15)
    terminal.type(b"?")
    terminal.until_shown("Keys")
    terminal.type(b"\x1b")
    terminal.until_shown("Keys", gone=True)
    terminal.type(b"\x11" if outcome else b"d")
    assert terminal.wait() == 0
    assert not (tmp_path / "out").read_text().startswith("crashed"), (tmp_path / "out").read_text()
    cells = assert_plain(terminal.seen)
    assert FIRST in cells
    assert "\\x1b" in cells
    assert ATTACKS["bold"] in cells


def walk(terminal: Terminal, *steps: tuple[bytes, str]) -> None:
    """Send keys, each once what comes before it is on the screen."""
    for keys, shown in steps:
        terminal.type(keys)
        terminal.until_shown(shown)


def test_the_wizard_sends_no_byte_of_others(screen: Callable[..., Terminal], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": "x"}))
    terminal = screen(WIZARD, tmp_path / "out", data)
    walk(terminal, (b"", "▸1 goal"), (b"\r", "▸2 model"), (b"", "Qwen/Qwen3-8B"))
    walk(terminal, (b"\x1b[200~\x1b]0;x\x07\xc2\x9b31m\xe2\x80\xaepasted " + b"y" * 400 + b"\x1b[201~", "yyyy"), (b"\x15", "such as"))
    walk(terminal, (b"Qwen/Qwen3-8B", "Qwen3-8B"), (b"\r", "9 rows"))
    walk(terminal, (b"\x1bOQ", "row 1"), *[(b"\x1b[C", f"row {number}") for number in range(2, 9)], (b"\x1b", "9 rows"))
    walk(terminal, (b"\x1bOR", "threshold"), (b"\x1b", "9 rows"))
    walk(terminal, (b"\r", "▸4 numbers"), (b"", "‹"), (b"\r", "▸5 go"), (b"", "--no-ui"))
    terminal.type(b"c")
    terminal.read_until(b"]52;c;")
    walk(terminal, (b"\r", "✖"))
    terminal.type(b"\x03")
    assert terminal.wait() == 0
    assert (tmp_path / "out").read_text().startswith("no-run")
    cells = assert_plain(terminal.seen)
    assert FIRST in cells
    assert [text for text in copied(terminal.seen) if bad_characters(text) or "\n" in text or "qlora-tui" not in text] == []
    assert copied(terminal.seen)


@pytest.mark.parametrize("attempt", ["colour", "leave the paste", "C1 as characters", "bidi", "bold", "very long"])
def test_a_byte_of_others_would_be_seen(attempt: str) -> None:
    """The reading of bytes above is no use unless it can fail."""
    seen = b"\x1b[1;1H\x1b[38;2;1;2;3mcell" + dressed(ATTACKS[attempt]).encode()
    harmless = attempt in ("bold", "very long")
    if attempt == "colour":  # a colour of another's looks like one of ours; what follows text unasked does not
        assert "red" in stripped(seen)
        return
    assert (bad_characters(stripped(seen)) == set()) == harmless


CONSTRUCTORS = {"Static": "markup", "Label": "markup", "notify": "markup"}
FORBIDDEN = {"from_markup", "render_markup", "RichLog", "Log", "Markdown", "MarkdownViewer", "Link", "Pretty"}
"""Widgets that render what they are given as markup or Markdown, or as bytes; each would need a reason, and a line in `SURFACES`."""
FRAMES = {"border_title": {"tui/panels/base.py"}, "border_subtitle": {"tui/panels/base.py"}}


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""


def is_text_of_ours(node: ast.expr) -> bool:
    """Say whether an argument cannot be foreign text read as markup: a constant without brackets, or `Content` that something returns."""
    return (isinstance(node, ast.Constant) and "[" not in str(node.value)) or isinstance(node, ast.Call)


def faults_of(path: Path) -> Iterator[str]:
    name = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            framed = [target.attr for target in targets if isinstance(target, ast.Attribute) and target.attr in FRAMES]
            yield from (f"{name}:{node.lineno} {attr} is read as markup" for attr in framed if name not in FRAMES[attr])
        if not isinstance(node, ast.Call):
            continue
        kind, keywords = called(node), {keyword.arg: keyword.value for keyword in node.keywords}
        marked = CONSTRUCTORS.get(kind)
        if marked and not (isinstance(keywords.get(marked), ast.Constant) and keywords[marked].value is False):  # type: ignore[union-attr]
            yield f"{name}:{node.lineno} {kind}() without markup=False"
        if kind in FORBIDDEN:
            yield f"{name}:{node.lineno} {kind}"
        if kind in ("Option", "Button", "Checkbox", "RadioButton", "add_option") and node.args and not is_text_of_ours(node.args[0]):
            yield f"{name}:{node.lineno} {kind}() of text that may be foreign, read as markup"
        if kind != "Binding" and not all(is_text_of_ours(keywords[word]) for word in ("placeholder", "tooltip") if word in keywords):
            yield f"{name}:{node.lineno} a placeholder or tooltip that may be foreign"  # a binding's is ours


SCREENS = [path for path in sorted((ROOT / "tui").rglob("*.py")) if "textual" in path.read_text(encoding="utf-8")]


def test_no_widget_reads_markup() -> None:
    assert [fault for path in SCREENS for fault in faults_of(path)] == []


@pytest.mark.parametrize(
    "line",
    [
        'Static("x")',
        "Static(text, markup=True)",
        "Label(text)",
        "self.app.notify(text)",
        "Content.from_markup(text)",
        "panel.border_title = text",
        "Option(text)",
        'Option(f"[b]{text}")',
        "RichLog()",
        "Input(placeholder=text)",
    ],
)
def test_a_widget_that_reads_markup_would_be_found(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "screen.py"
    path.write_text(line)
    monkeypatch.setitem(faults_of.__globals__, "ROOT", tmp_path)
    assert len(list(faults_of(path))) == 1
