"""From the first key to the adapter: the product itself on a pseudo-terminal, over the real engine and a tiny model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pty_screen import PATIENCE, Terminal, assert_given_back

from qlora_tui.engine.events import Finished, Started, Stepped
from qlora_tui.engine.journal import EVENTS, is_running, read_records
from qlora_tui.engine.runs import list_runs

PRODUCT = "import sys\nfrom qlora_tui.tui.cli import leave, main\nleave(main(sys.argv[1:]))\n"
SIZE = (100, 32)


def type_into(terminal: Terminal, text: str) -> None:
    """Wait for an empty line, type, and wait until it is on the screen."""
    terminal.until_shown("such as")
    terminal.type(text.encode())
    terminal.until_shown(text[-30:])


def until_ended(terminal: Terminal, folder: Path) -> None:
    deadline = time.monotonic() + 4 * PATIENCE
    while is_running(folder) or not isinstance(read_records(folder / EVENTS)[-1].event, Finished):
        assert time.monotonic() < deadline, terminal.shown
        terminal._read()


def test_by_keys_alone_from_nothing_to_an_adapter(
    tiny_model: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], tmp_path: Path, home: Path
) -> None:
    """What only a test needs is given: a model this small takes rows of 256 tokens, and four steps are enough."""
    flags = [part for setting in ("max_length=256", "max_steps=4") for part in ("--set", setting)]
    rows = write_jsonl(chat_rows)
    terminal = Terminal(PRODUCT, "--runs-dir", str(tmp_path / "runs"), *flags, size=SIZE, QLORA_TUI_HOME=str(home))
    try:
        terminal.until_shown("▸1 goal")
        terminal.type(b"\r")
        terminal.until_shown("▸2 model")
        type_into(terminal, str(tiny_model))
        terminal.type(b"\r")
        terminal.until_shown("▸3 data")
        type_into(terminal, str(rows))
        terminal.until_shown("40 rows")
        terminal.type(b"\x1b")
        terminal.until_shown("▸2 model")
        terminal.until_shown(str(tiny_model)[-30:])  # back and forth loses nothing
        terminal.type(b"\r")
        terminal.until_shown("▸3 data")
        terminal.until_shown("40 rows")
        terminal.type(b"\r")
        terminal.until_shown("▸4 numbers")
        terminal.until_shown("‹ 16 ›")
        terminal.type(b"\x1b[C")
        terminal.until_shown("‹ 32 ›")
        terminal.type(b"\r")
        terminal.until_shown("▸5 go")
        terminal.until_shown("--no-ui")
        terminal.type(b"\r")
        deadline = time.monotonic() + PATIENCE
        while not list_runs(tmp_path / "runs"):
            assert time.monotonic() < deadline, terminal.shown
            terminal._read()
        folder = list_runs(tmp_path / "runs")[0].path
        until_ended(terminal, folder)
        terminal.read_some(1.2)
        terminal.type(b"q")
        assert terminal.wait() == 0, terminal.shown
        assert_given_back(terminal)
    finally:
        terminal.close()
    events = [record.event for record in read_records(folder / EVENTS)]
    assert sum(isinstance(event, Stepped) for event in events) == 4
    started = next(event for event in events if isinstance(event, Started))
    assert started.config["lora_r"] == 32, "the key on the numbers page"
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert b"qlora-tui attach" in terminal.seen.rsplit(b"\x1b[?1049l", 1)[-1], "the last words stand on the shell's screen"
