"""The terminal under a real pseudo-terminal: nothing leaks onto it, and it comes back as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from pty_screen import Terminal, result, text_of

LEAVES = (b"\x1b[?1049l", b"\x1b[?25h")
FOLLOW = """
import sys, os
from pathlib import Path
from qlora_tui.tui.app import run_app
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
def abort():
    sys.__stderr__.write("LATE frame")
    out.write_text("aborted")
    os._exit(130)
{setup}
shown = run_app(start=None, draft=None, follow=folder, on_abort=abort, ascii_only=False)
{after}
out.write_text(shown.kind + " " + shown.detail)
"""


def script(setup: str = "", after: str = "") -> str:
    return FOLLOW.format(setup=setup, after=after)


@pytest.fixture
def screen(home) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def start(text: str, *arguments: object, **more) -> Terminal:
        made.append(Terminal(text, *map(str, arguments), QLORA_TUI_HOME=str(home), **more))
        return made[-1]

    yield start
    for terminal in made:
        terminal.close()


NOISE = """
import ctypes, logging, subprocess, threading, warnings
logging.basicConfig(level=logging.INFO)
libc = ctypes.CDLL(None)
def noise():
    import time
    while not Path(str(out) + ".go").exists():
        time.sleep(0.02)
    print("LEAK-print")
    sys.stderr.write("LEAK-stderr\\n")
    os.write(1, b"LEAK-write-1\\n")
    os.write(2, b"LEAK-write-2\\n")
    libc.puts(b"LEAK-puts")
    libc.fflush(None)
    subprocess.run(["sh", "-c", "echo LEAK-child; echo LEAK-child-err >&2"])
    logging.getLogger("early").warning("LEAK-logging")
    sys.__stdout__.fileno()
    Path(str(out) + ".made").write_text("")
threading.Thread(target=noise).start()
"""
SOURCES = ("print", "stderr", "write-1", "write-2", "puts", "child", "child-err", "logging")


def test_nothing_but_the_screen_reaches_the_terminal(screen, write_run, tmp_path, home):
    folder, _, _ = write_run()
    out = tmp_path / "out"
    terminal = screen(script(NOISE, after='print("AFTER the screen")'), folder, out)
    terminal.read_until(b"tok/s")
    (tmp_path / "out.go").write_text("")
    while not (tmp_path / "out.made").exists():
        terminal._read()
    terminal.type(b"d")
    assert terminal.wait() == 0
    assert result(out).startswith("detached")
    before_end = terminal.seen.split(LEAVES[0])[0]
    assert b"LEAK" not in terminal.seen
    assert b"AFTER" not in before_end
    assert b"AFTER the screen" in terminal.seen
    log = (folder / "log.txt").read_text()
    assert [source for source in SOURCES if f"LEAK-{source}" not in log] == []


def test_the_terminal_comes_back_as_it_was(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    terminal = screen(script(), folder, tmp_path / "out")
    terminal.read_until(b"tok/s")
    assert terminal.modes != terminal.before
    terminal.type(b"d")
    assert terminal.wait() == 0
    assert terminal.modes == terminal.before
    assert all(sequence in terminal.seen for sequence in LEAVES)
    assert b"\x1b[?1003l" in terminal.seen


def test_two_ctrl_c_stop_then_abort_with_the_terminal_restored(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    out = tmp_path / "out"
    terminal = screen(script(), folder, out)
    terminal.read_until(b"tok/s")
    terminal.type(b"\x03")
    terminal.read_until(b"stopping")
    terminal.type(b"\x03")
    assert terminal.wait() == 130
    assert result(out) == "aborted"
    assert terminal.modes == terminal.before
    assert b"LATE" not in terminal.seen, "a frame that the writer thread still held would paint over the shell"
    assert terminal.seen.endswith(LEAVES[1])
    assert json.loads((folder / "commands.jsonl").read_text().splitlines()[0])["name"] == "stop"


def test_a_lost_terminal_ends_the_viewer_and_nothing_else(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    out = tmp_path / "out"
    after = "print('the run goes on')\nsys.stderr.write('still here')\nos.write(1, b'and here')"
    terminal = screen(script(after=after), folder, out)
    terminal.read_until(b"tok/s")
    terminal.hang_up()
    assert terminal.wait() == 0
    assert result(out).startswith("hangup")
    assert "the run goes on" in (folder / "log.txt").read_text()
    assert not (folder / "commands.jsonl").exists()


def test_a_terminal_lost_without_a_signal_is_noticed(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    out = tmp_path / "out"
    terminal = screen(script(after="print('the run goes on')"), folder, out, controls=False)
    terminal.read_until(b"tok/s")
    terminal.hang_up(signalled=False)
    assert terminal.wait() == 0
    assert result(out).startswith("hangup")
    assert "the run goes on" in (folder / "log.txt").read_text()
    assert not (folder / "commands.jsonl").exists()


def test_a_signal_to_a_run_of_this_process_closes_the_screen_with_the_run(screen, write_run, tmp_path):
    from qlora_tui.engine import events as ev

    folder, journal, _ = write_run()
    out = tmp_path / "out"
    setup = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: Path(str(out) + '.term').write_text('asked'))"
    terminal = screen(script(setup), folder, out)
    terminal.read_until(b"tok/s")
    terminal.process.terminate()
    terminal.read_until(b"stopping")
    assert result(tmp_path / "out.term") == "asked"
    journal.write(ev.Finished("stopped", 143, "SIGTERM"))
    assert terminal.wait() == 0
    assert result(out).startswith("finished")


def test_a_byte_that_is_no_utf_8_is_a_lost_key_and_no_more(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    out = tmp_path / "out"
    terminal = screen(script(), folder, out)
    terminal.read_until(b"tok/s")
    terminal.type(b"\xe9\xff\x1b[M\x20\xf1\xf1")
    terminal.read_some()
    terminal.type(b"?")
    terminal.until_shown("Keys")
    terminal.type(b"\x1b")
    terminal.until_shown("Keys", gone=True)
    terminal.type(b"d")
    assert terminal.wait() == 0
    assert result(out).startswith("detached")


CRASH = """
from qlora_tui.tui.panels.loss import LossPanel
def broken(self, state, view, width, height):
    token = "hf_" + "s" * 30
    raise RuntimeError("drawing went wrong")
LossPanel.draw = broken
"""


def test_a_crash_of_the_screen_is_logged_without_local_variables(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    out = tmp_path / "out"
    terminal = screen(script(CRASH), folder, out)
    assert terminal.wait() == 0
    assert result(out) == "crashed RuntimeError: drawing went wrong"
    assert terminal.modes == terminal.before
    log = (folder / "log.txt").read_text()
    assert "drawing went wrong" in log
    assert "hf_sss" not in log
    assert b"Traceback" not in terminal.seen
    assert not (folder / "commands.jsonl").exists()


def test_no_color_still_tells_every_state(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    terminal = screen(script(), folder, tmp_path / "out", NO_COLOR="1")
    terminal.read_until(b"tok/s")
    terminal.type(b"d")
    terminal.wait()
    shown = text_of(terminal.seen.split(LEAVES[0])[0])
    assert "training" in shown
    coloured = [part for part in terminal.seen.split(b"\x1b[38;2;")[1:] if len(set(part.split(b"m")[0].split(b";")[:3])) > 1]
    assert coloured == []


def test_a_locale_without_utf_8_gets_ascii(screen, write_run, tmp_path):
    folder, _, _ = write_run()
    terminal = screen(script(), folder, tmp_path / "out", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    terminal.read_until(b"tok/s")
    terminal.type(b"d")
    assert terminal.wait() == 0
    assert terminal.seen.isascii()
