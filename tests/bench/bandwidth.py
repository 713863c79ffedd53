"""Bytes a second that the run screen sends over a connection, under a real pseudo-terminal.

usage: python tests/bench/bandwidth.py [SECONDS] [COLUMNSxLINES]

A run of 4 steps a second, with a look at the device once a second, a forecast every five and a checkpoint every minute, is
written by this process through the real journal; the screen follows it from another one. Counted is every byte that the
terminal gets once the first picture is drawn: with the terminal in focus, and after it said that it lost it.
"""

from __future__ import annotations

import math
import os
import random
import select
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / ".pkg")]
from canned_run import GIB, opening, step  # noqa: E402  found through the line above
from pty_screen import Terminal  # noqa: E402

from qlora_tui.engine import events as ev  # noqa: E402
from qlora_tui.engine.journal import Journal, RunLock  # noqa: E402
from qlora_tui.engine.spec import RunConfig  # noqa: E402

SCREEN = """
import sys
from pathlib import Path
from qlora_tui.tui.app import run_app
run_app(start=None, draft=None, follow=Path(sys.argv[1]))
"""
TOTAL = 20_000
PAST = 400
BLUR = b"\x1b[O"


def told(number: int) -> list[ev.Event]:
    """Return what a run says at its step `number`."""
    loss = 1.1 + 1.6 * math.exp(-number / 300) + random.gauss(0, 0.09)
    found: list[ev.Event] = [step(number, TOTAL, loss, epoch=number / 5000, grad_norm=random.gauss(0.8, 0.1), seconds=0.25)]
    if number % 4 == 0:
        watts, heat = 400 + random.random() * 40, 70 + random.random() * 3
        found.append(ev.Device(int(9.6 * GIB), GIB // 2, 24 * GIB, 94 + random.random() * 5, watts, 450.0, heat))
    if number % 20 == 0:
        left = (TOTAL - number) * 0.25
        found.append(ev.Forecast((left * 0.95, left, left * 1.05), "the last steps"))
    if number % 240 == 0:
        found.append(ev.Saved(number, f"checkpoints/step-{number:06}", 86 << 20))
    return found


def train(journal: Journal, until: threading.Event) -> None:
    """Write four steps a second until told to end."""
    number = PAST
    while not until.wait(0.25):
        number += 1
        for event in told(number):
            journal.write(event)


def received(terminal: Terminal, seconds: float) -> int:
    """Return the bytes that come within `seconds`."""
    deadline, count = time.monotonic() + seconds, 0
    while (left := deadline - time.monotonic()) > 0:
        if select.select([terminal.master], [], [], left)[0]:
            count += len(os.read(terminal.master, 1 << 16))
    return count


def main() -> None:
    """Write a run, follow it, print the figures."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    columns, lines = (int(part) for part in (sys.argv[2] if len(sys.argv) > 2 else "80x24").split("x"))
    random.seed(0)
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "20261127-120000-bandwidth"
        folder.mkdir()
        lock, journal = RunLock(folder), Journal(folder)
        for event in [*opening(RunConfig(model_name_or_path="Qwen/Qwen3-8B", data=("chats.jsonl",))), ev.Device()]:
            journal.write(event)
        for number in range(1, PAST + 1):
            for event in told(number):
                journal.write(event)
        ended = threading.Event()
        writer = threading.Thread(target=train, args=(journal, ended))
        writer.start()
        terminal = Terminal(SCREEN, str(folder), size=(columns, lines), QLORA_TUI_HOME=home)
        try:
            terminal.read_until(b"loss")
            received(terminal, 5.0)
            seen = received(terminal, seconds)
            terminal.type(BLUR)
            received(terminal, 3.0)
            unseen = received(terminal, seconds / 2)
            print(f"{columns}x{lines}: {seen / seconds / 1024:.2f} KiB/s in focus, {unseen / (seconds / 2) / 1024:.2f} KiB/s without")
        finally:
            ended.set()
            writer.join()
            terminal.process.kill()
            terminal.process.wait()
            journal.close()
            lock.release()


if __name__ == "__main__":
    main()
