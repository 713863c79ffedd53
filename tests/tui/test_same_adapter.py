"""The screen cannot change the result: one seed, one config, with and without the screens, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pty_screen import PATIENCE, Terminal

SETTINGS = ["max_length=256", "max_steps=8", "lora_dropout=0.1", "eval_steps=3", "gradient_accumulation_steps=2", "learning_rate=5e-3"]
RUN_THE_PRODUCT = "import sys\nfrom qlora_tui.tui.cli import main\nsys.exit(main(sys.argv[1:]))\n"
CHAOS = b"yzz?\x1b12345\x1b/abc\x1b\x1b[A\x1b[B\tg"
"""Everything a restless person presses while it trains, short of stopping it."""


def finished(runs: Path) -> dict[str, Any] | None:
    for path in runs.glob("*/events.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if events and events[-1]["type"] == "finished":
            return dict(events[-1])
    return None


def adapter(runs: Path) -> bytes:
    (path,) = runs.glob("*/adapter/adapter_model.safetensors")
    return path.read_bytes()


def test_with_and_without_the_screens(
    tiny_model: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    flags = [part for setting in SETTINGS for part in ("--set", setting)]
    options = ["--model", str(tiny_model), "--data", str(write_jsonl(chat_rows)), *flags]
    command = [sys.executable, "-m", "qlora_tui.tui", "--no-ui", *options, "--runs-dir", str(tmp_path / "plain")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    terminal = Terminal(RUN_THE_PRODUCT, *options, "--runs-dir", str(tmp_path / "screen"), COLUMNS="80", LINES="24")
    try:
        deadline = time.monotonic() + 4 * PATIENCE
        while not list((tmp_path / "screen").glob("*/events.jsonl")):
            terminal.type(b"\r")
            terminal.read_some()
            assert time.monotonic() < deadline, terminal.seen[-2000:]
        while (end := finished(tmp_path / "screen")) is None:
            terminal.type(CHAOS)
            terminal.read_some()
            assert time.monotonic() < deadline, terminal.seen[-2000:]
        while terminal.process.poll() is None:
            for key in (b"\x1b", b"q"):  # apart: together they are one key, alt+q
                terminal.type(key)
                terminal.read_some()
            assert time.monotonic() < deadline, terminal.seen[-2000:]
        assert terminal.process.returncode == 0
    finally:
        terminal.close()
    assert end["outcome"] == "done"
    assert adapter(tmp_path / "plain") == adapter(tmp_path / "screen")


@pytest.mark.slow
def test_with_and_without_a_tracker_and_a_notification(
    tiny_model: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    flags = [part for setting in SETTINGS for part in ("--set", setting)]
    told = ["--set", "report_to=tensorboard", "--set", f"notify=command:touch {tmp_path / 'heard'}"]
    command = [sys.executable, "-m", "qlora_tui.tui", "--no-ui", "--model", str(tiny_model), "--data", str(write_jsonl(chat_rows)), *flags]
    for name, more in (("plain", []), ("told", told)):
        subprocess.run([*command, *more, "--runs-dir", str(tmp_path / name)], check=True, capture_output=True, timeout=300)
    assert adapter(tmp_path / "plain") == adapter(tmp_path / "told")
    assert list((tmp_path / "told").glob("*/tensorboard/events*"))
    assert (tmp_path / "heard").exists()
