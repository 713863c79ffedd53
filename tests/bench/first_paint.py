"""Time from starting the program to its first paint, under a real pseudo-terminal, and that torch was not loaded for it.

usage: python tests/bench/first_paint.py [STARTS]

Of the wizard, of `attach` on a run of 2,000 steps, and of `--help` (its last byte). Wall time from before the process is
made to the first byte of a cell; "whole" is when the frame was complete; "processor" is what the main thread had used of
it by the first cell, which a busy machine stretches less. Milliseconds, median and fastest; beside them `python -c pass`,
which no program can beat. Bytecode is kept, as an installed program has it: one start before is not counted and writes it.
"""

from __future__ import annotations

import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".pkg"), str(ROOT / "tests")]

from canned_run import ending, opening, step  # noqa: E402  found through the line above
from pty_screen import Terminal  # noqa: E402

from qlora_tui.engine.journal import Journal  # noqa: E402
from qlora_tui.engine.spec import RunConfig  # noqa: E402

PRODUCT = """
import sys
from qlora_tui.tui.cli import main
code = main(sys.argv[1:])
sys.exit(code if "torch" not in sys.modules else 99)
"""
CELL = re.compile(rb"\x1b\[[0-9]+;[0-9]+H\x1b\[[0-9;]*m")
QUIET = 0.15  # seconds without a byte after which a frame counts as whole


def paint(*words: str, home: str) -> tuple[float, float, float]:
    """Start the program; return the seconds to the first cell, to the last byte of that frame, and of the processor by the first cell."""
    began = time.perf_counter()
    terminal = Terminal(PRODUCT, *words, **kept(home))
    first = last = used = 0.0
    while select.select([terminal.master], [], [], QUIET if first else 20.0)[0]:
        terminal.seen += os.read(terminal.master, 65536)
        last = time.perf_counter() - began
        if not first and CELL.search(terminal.seen):
            first = last
            used = int(Path(f"/proc/{terminal.process.pid}/schedstat").read_text().split()[0]) / 1e9
    terminal.type(b"\x03")
    code = terminal.wait()
    terminal.close()
    if code == 99:
        raise SystemExit("torch was loaded")
    return first, last, used


def kept(home: str) -> dict[str, str]:
    """Return the environment of a program whose bytecode lies beside what it remembers."""
    return {"QLORA_TUI_HOME": home, "PYTHONPYCACHEPREFIX": f"{home}/bytecode", "PYTHONDONTWRITEBYTECODE": ""}


def printed(home: str, *command: str) -> float:
    """Return the seconds that a command takes from start to end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".pkg")} | kept(home)
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def write_run(folder: Path) -> None:
    """Write a run that is over, so that Ctrl+C leaves it at once."""
    folder.mkdir(parents=True)
    run = RunConfig(model_name_or_path="Qwen/Qwen3-8B", data=("chats.jsonl",))
    (folder / "run.toml").write_text("")
    journal = Journal(folder)
    for event in (*opening(run), *(step(number, 2000) for number in range(1, 2001)), *ending()):
        journal.write(event)
    journal.close()


def told(name: str, times: list[float]) -> str:
    """Return one line of the table."""
    return f"| {name} | {statistics.median(times) * 1000:.0f} | {min(times) * 1000:.0f} |"


def main() -> None:
    """Start everything again and again, and print the table."""
    starts = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "runs" / "20261127-120000-test"
        write_run(folder)
        wizard, attach = (), ("attach", str(folder))
        for words in (wizard, attach):
            paint(*words, home=home)
        screens = {"wizard": [paint(*wizard, home=home) for _ in range(starts)]}
        screens["attach, 2,000 steps"] = [paint(*attach, home=home) for _ in range(starts)]
        others = {"--help": [printed(home, "-m", "qlora_tui.tui", "--help") for _ in range(starts + 1)][1:]}
        others["python -c pass"] = [printed(home, "-c", "pass") for _ in range(starts)]
    print("| milliseconds | median | fastest |\n|---|---|---|")
    for name, times in screens.items():
        for label, column in (("first cell", 0), ("whole frame", 1), ("processor by the first cell", 2)):
            print(told(f"{name}: {label}", [each[column] for each in times]))
    for name, seconds in others.items():
        print(told(name, seconds))


if __name__ == "__main__":
    main()
