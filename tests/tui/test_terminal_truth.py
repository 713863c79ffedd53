"""The screens under a real pseudo-terminal: its size, its colours, its keys, its title, and what is sent to it."""

from __future__ import annotations

import base64
import fcntl
import re
import signal
import struct
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from canned_run import step
from pty_screen import Terminal, result, text_of

from qlora_tui.engine import events as ev

FOLLOW = """
import os, sys
from pathlib import Path
from qlora_tui.tui.app import run_app
if len(sys.argv) > 3:
    handle = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
shown = run_app(start=None, draft=None, follow=Path(sys.argv[1]), mouse="--no-mouse" not in sys.argv)
print("the last word")
Path(sys.argv[2]).write_text(shown.kind + " " + shown.detail)
"""
WIZARD = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from canned_run import QuietDesk
from qlora_tui.engine.spec import RunConfig
import qlora_tui.tui.app as app
draft = RunConfig(model_name_or_path="Qwen/Qwen3-8B", data=("chats.jsonl",))
app.Desk = QuietDesk
shown = app.run_app(start=None, draft=draft, follow=None)
Path(sys.argv[1]).write_text(shown.kind + " " + shown.detail)
"""
TITLES = re.compile(rb"\x1b\]2;([^\x07]*)\x07")
SIXTEEN = re.compile(rb"\x1b\[([\d;]*)m")


@pytest.fixture
def screen(home) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def start(text: str, *arguments: object, **more) -> Terminal:
        more = {"COLORTERM": "", **more}
        made.append(Terminal(text, *map(str, arguments), QLORA_TUI_HOME=str(home), **more))
        return made[-1]

    yield start
    for terminal in made:
        terminal.close()


def resize(terminal: Terminal, columns: int, lines: int) -> None:
    fcntl.ioctl(terminal.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    terminal.process.send_signal(signal.SIGWINCH)


def body(terminal: Terminal) -> bytes:
    return terminal.seen.split(b"\x1b[?1049l")[0]


def test_the_size_is_the_terminals_though_stdout_is_a_file(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    out = tmp_path / "stdout"
    terminal = screen(FOLLOW, folder, tmp_path / "out", out, size=(110, 31))
    terminal.read_until(b"tok/s")
    terminal.read_some()
    shown = text_of(terminal.seen, (110, 31)).split("\n")
    assert "training" in shown[0][95:]
    assert "quit" in shown[30]
    terminal.type(b"d")
    assert terminal.wait() == 0
    assert out.read_text() == "the last word\n"


def test_live_resizing_down_to_nothing_and_back_breaks_nothing(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    terminal = screen(FOLLOW, folder, tmp_path / "out")
    terminal.read_until(b"tok/s")
    for size in ((10, 3), (1, 1), (39, 11), (200, 50), (10, 3)):
        resize(terminal, *size)
        terminal.read_some(0.3)
    terminal.seen = b""
    resize(terminal, 100, 30)
    terminal.read_until(b"tok/s")
    terminal.read_some()
    assert "quit" in text_of(terminal.seen, (100, 30)).split("\n")[29]
    terminal.type(b"d")
    assert terminal.wait() == 0
    assert result(tmp_path / "out").startswith("detached")


def test_the_wizard_too_can_be_made_small_and_large(screen, tmp_path):
    terminal = screen(WIZARD, tmp_path / "out")
    terminal.read_until(b"command line")
    for size in ((10, 3), (38, 10)):
        resize(terminal, *size)
        terminal.read_some(0.3)
    terminal.seen = b""
    resize(terminal, 80, 24)
    terminal.read_until(b"command line")
    terminal.read_until(b"quit", anew=False)
    terminal.type(b"q")
    terminal.wait()
    assert result(tmp_path / "out").startswith("no-run")


@pytest.mark.parametrize("term", ["xterm", "screen", "linux"])
def test_a_terminal_of_16_colours_is_sent_those_alone(screen, write_run, tmp_path, term):
    folder, _, _ = write_run()
    terminal = screen(FOLLOW, folder, tmp_path / "out", TERM=term)
    terminal.read_until(b"tok/s")
    terminal.read_some()
    terminal.type(b"d")
    assert terminal.wait() == 0
    codes = {code for group in SIXTEEN.findall(body(terminal)) for code in group.split(b";")}
    assert not codes & {b"38", b"48"}, "these begin 256 colours or more"
    assert {b"37", b"97"} & codes
    assert len(codes & {b"%d" % code for code in (*range(31, 37), *range(91, 97))}) >= 3
    assert "training" in text_of(body(terminal)).split("\n")[0]


@pytest.mark.parametrize(("more", "begins"), [({}, b"38;5;"), ({"COLORTERM": "truecolor"}, b"38;2;")])
def test_a_terminal_gets_as_many_colours_as_it_says_it_has(screen, write_run, tmp_path, more, begins):
    folder, _, _ = write_run()
    terminal = screen(FOLLOW, folder, tmp_path / "out", **more)
    terminal.read_until(b"tok/s")
    terminal.type(b"d")
    assert terminal.wait() == 0
    kinds = set(re.findall(rb"38;[25];", body(terminal)))
    assert kinds == {begins}


def test_ctrl_z_stops_nothing(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    terminal = screen(FOLLOW, folder, tmp_path / "out")
    terminal.read_until(b"tok/s")
    terminal.type(b"\x1a")
    terminal.type(b"?")
    terminal.read_until(b"esc closes")
    terminal.type(b"\x1b")
    terminal.read_some()
    terminal.type(b"\x11")
    terminal.read_until(b"still training")
    terminal.type(b"d")
    assert terminal.wait() == 0


def test_without_the_mouse_the_terminal_is_asked_for_nothing(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    for extra, asked in (("--no-mouse", False), ("--mouse", True)):
        terminal = screen(FOLLOW, folder, tmp_path / "out", tmp_path / "stdout", extra)
        terminal.read_until(b"tok/s")
        terminal.type(b"d")
        assert terminal.wait() == 0
        assert (b"\x1b[?1003h" in terminal.seen) == asked


def test_the_title_follows_the_run_and_is_given_back(screen, write_run, tmp_path):
    folder, journal, _ = write_run()
    terminal = screen(FOLLOW, folder, tmp_path / "out")
    terminal.read_until(b"\x1b]2;qlora 50% loss")
    journal.write(ev.Finished("failed", 1, "\x1b]0;evil\x07"))
    terminal.read_until(b"\x1b]2;qlora failed loss")
    terminal.type(b"q")
    assert terminal.wait() == 0
    assert terminal.seen.index(b"\x1b[22;2t") < terminal.seen.index(b"\x1b]2;")
    assert terminal.seen.index(b"\x1b]2;\x07\x1b[23;2t") > terminal.seen.rindex(b"\x1b]2;qlora")
    assert terminal.seen.count(b"\x1b[23;2t") == terminal.seen.count(b"\x1b[22;2t") == 1
    assert all(re.fullmatch(rb"[ -~]*", title) for title in TITLES.findall(terminal.seen))
    assert b"evil\x07" not in terminal.seen


def test_the_title_comes_back_after_an_abort_too(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    text = FOLLOW.replace("mouse=", "on_abort=lambda: os._exit(130), mouse=")
    terminal = screen(text, folder, tmp_path / "out")
    terminal.read_until(b"tok/s")
    terminal.type(b"\x03")
    terminal.read_until(b"stopping")
    terminal.type(b"\x03")
    assert terminal.wait() == 130
    assert terminal.seen.count(b"\x1b[23;2t") == 1


def test_the_linux_console_gets_no_title(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    terminal = screen(FOLLOW, folder, tmp_path / "out", TERM="linux")
    terminal.read_until(b"tok/s")
    terminal.type(b"d")
    assert terminal.wait() == 0
    assert b"\x1b]2;" not in terminal.seen
    assert b";2t" not in terminal.seen


def test_nan_and_the_end_ring_once_each(screen, write_run, tmp_path, run_config):
    from canned_run import opening

    folder, journal, _ = write_run([*opening(run_config), step(1)])
    terminal = screen(FOLLOW, folder, tmp_path / "out")
    terminal.read_until(b"tok/s")
    terminal.read_some()

    def bells() -> int:
        return len(re.findall(rb"\x07", re.sub(rb"\x1b\][^\x07]*\x07", b"", terminal.seen)))

    assert bells() == 0
    for number in (2, 3):
        journal.write(step(number, loss=float("nan")))
        terminal.read_until(b"%d/40" % number if number == 2 else b"3")
    terminal.read_some(1.0)
    assert bells() == 1
    journal.write(ev.Finished("done", 0, "all steps"))
    terminal.read_until(b"done")
    terminal.read_some(1.0)
    assert bells() == 2
    terminal.type(b"q")
    assert terminal.wait() == 0


def test_a_copy_goes_out_as_osc_52_and_into_a_file(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    terminal = screen(FOLLOW, folder, tmp_path / "out")
    terminal.read_until(b"tok/s")
    terminal.type(b"5")
    terminal.read_until(b"checkpoint", anew=False)
    terminal.type(b"c")
    terminal.read_until(b"\x1b]52;c;")
    terminal.read_until(b"clipboard", anew=False)
    sent = re.search(rb"\x1b\]52;c;([A-Za-z0-9+/=]*)\x07", terminal.seen)
    assert sent is not None
    assert base64.b64decode(sent[1]).decode() + "\n" == (folder / "last-copy.txt").read_text()
    terminal.type(b"d")
    assert terminal.wait() == 0


def test_over_ssh_without_tmux_there_is_one_hint(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    for more, hinted in (({"SSH_CONNECTION": "a b c d"}, True), ({"SSH_CONNECTION": "a b c d", "TMUX": "x"}, False)):
        terminal = screen(FOLLOW, folder, tmp_path / "out", **more)
        terminal.read_until(b"tok/s")
        terminal.read_some()
        terminal.type(b"d")
        assert terminal.wait() == 0
        assert (b"without tmux" in terminal.seen) == hinted


def test_a_fault_in_the_persons_file_starts_no_screen(home, write_run, capfd):
    from qlora_tui.tui import preferences
    from qlora_tui.tui.cli import main

    folder, _, lock = write_run()
    lock.release()
    path = home / "config" / "screen.toml"
    path.parent.mkdir(parents=True)
    path.write_text('[keys]\nstop = "z"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_tui.tui.commands.run.can_draw", lambda: True)
        patch.setattr("qlora_tui.tui.commands.attach.can_draw", lambda: True, raising=False)
        assert main(["attach", str(folder)]) == 2
    assert "would be both stop and zoom" in capfd.readouterr().err
    assert preferences.THEMES == ("auto", "dark", "light")
    assert Path(folder).exists()
