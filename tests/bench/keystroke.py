"""Time the wizard's memory bar under a real pseudo-terminal: from a key on the numbers page to the last byte it draws.

usage: python tests/bench/keystroke.py [KEYS]

Each key changes rank, length or batch of an 8 B model with rows named; the planner, the budget, the fixes and the time
are worked out again for every one. Prints milliseconds: median, 95th percentile and longest.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / ".pkg")]
from pty_screen import Terminal  # noqa: E402  found through the line above

WIZARD = """
import sys
from pathlib import Path
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui.app import run_app
run = RunConfig(model_name_or_path="Qwen/Qwen3-8B", data=(sys.argv[1],), memory_limit_gib=20.0)
run_app(start=None, draft=run, follow=None, on_abort=lambda: None, ascii_only=False)
"""
QUIET = 0.06  # seconds without a byte after which a frame counts as whole
RIGHT, LEFT, DOWN = b"\x1b[C", b"\x1b[D", b"\x1b[B"


def drawn(terminal: Terminal, key: bytes) -> float | None:
    """Return the seconds from `key` to the last byte of what it changes; None if nothing was drawn."""
    while select.select([terminal.master], [], [], QUIET)[0]:
        os.read(terminal.master, 65536)
    began, last = time.perf_counter(), None
    terminal.type(key)
    while select.select([terminal.master], [], [], QUIET if last else 1.0)[0]:
        os.read(terminal.master, 65536)
        last = time.perf_counter() - began
    return last


def main() -> None:
    """Walk to the numbers page, press keys, print the figures."""
    keys = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    with tempfile.TemporaryDirectory() as home:
        rows = Path(home) / "rows.jsonl"
        turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "word " * 300}]
        rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(2000)))
        terminal = Terminal(WIZARD, str(rows), QLORA_TUI_HOME=home)
        terminal.read_until(b"do you want")
        for page in (b"Which model", b"learn from", b"rank"):
            terminal.type(b"\r")
            terminal.read_until(page)
        terminal.read_some(3.0)
        times = []
        for index in range(keys):
            if index % 10 == 9:
                drawn(terminal, DOWN if index < keys // 2 else b"\x1b[A")
            took = drawn(terminal, RIGHT if index % 4 < 2 else LEFT)
            times += [took * 1000] if took else []
        terminal.close()
    ordered = sorted(times)
    print(
        f"{len(times)} keys drawn: median {statistics.median(times):.1f} ms, "
        f"95 % {ordered[int(0.95 * (len(ordered) - 1))]:.1f} ms, longest {ordered[-1]:.1f} ms"
    )


if __name__ == "__main__":
    main()
