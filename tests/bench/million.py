"""A run of a million steps, opened: seconds until its end is shown, memory of the viewer, milliseconds for one plot.

usage: python tests/bench/million.py [STEPS] [MORE]

Writes a journal of STEPS steps with a look at the device every fourth (about half a gigabyte), opens it under a real
pseudo-terminal, waits until the whole file is folded, then appends MORE steps as fast as the screen takes them, and reads the
screen's resident memory meanwhile. Then it folds the same file in this process, for events a second, and times the plot.
"""

from __future__ import annotations

import json
import math
import os
import select
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / ".pkg")]
from canned_run import opening  # noqa: E402  found through the line above
from pty_screen import Terminal  # noqa: E402

from qlora_tui.engine import events as ev  # noqa: E402
from qlora_tui.engine.journal import RunLock  # noqa: E402
from qlora_tui.engine.spec import RunConfig  # noqa: E402
from qlora_tui.tui import plot  # noqa: E402
from qlora_tui.tui.follow import Follower  # noqa: E402

SCREEN = """
import sys
from pathlib import Path
from qlora_tui.tui.app import TunerApp
app = TunerApp(start=None, draft=None, follow=Path(sys.argv[1]))
def told():
    screen = app.run_screen
    Path(sys.argv[2]).write_text(f"{screen.follower.share} {screen.state.step} {int(screen.behind)}")
app.call_later(lambda: app.set_interval(0.2, told))
app.run()
"""
_STEP = (
    '{"v":1,"attempt":1,"seq":%d,"t":%.3f,"type":"stepped","step":%d,"total_steps":%d,"epoch":%.6f,"loss":%.15f,"grad_norm":%.15f,'
    '"clipped":false,"skipped":false,"lr":0.0002,"tokens":3600,"supervised_tokens":2100,"seconds":0.25012,"data_seconds":0.00113,'
    '"rows":[12,345,678,901,234,567,890,123],"memory_allocated_bytes":9663676416,"memory_reserved_bytes":9863676416,'
    '"memory_peak_bytes":10063676416}\n'
)
_DEVICE = (
    '{"v":1,"attempt":1,"seq":%d,"t":%.3f,"type":"device","memory_ours_bytes":9863676416,"memory_others_bytes":536870912,'
    '"memory_total_bytes":25769803776,"utilization":%.1f,"power_watts":412.5,"power_limit_watts":450.0,"temperature_c":71.0,"throttle":""}\n'
)


def lines(first: int, last: int, total: int, seq: int, t: float) -> Iterator[tuple[str, int]]:
    """Return blocks of lines of steps `first` to `last`, each with the last number it used."""
    block = []
    for number in range(first, last + 1):
        seq += 1
        loss = 1.1 + 1.6 * math.exp(-number / 90_000) + 0.3 * math.sin(number * 12.9898) * math.cos(number * 78.233)
        block.append(_STEP % (seq, t + number * 0.25, number, total, number / 50_000, loss, 0.8 + 0.2 * math.sin(number)))
        if number % 4 == 0:
            seq += 1
            block.append(_DEVICE % (seq, t + number * 0.25, 95 + number % 5))
        if len(block) >= 5000:
            yield "".join(block), seq
            block.clear()
    yield "".join(block), seq


def write(path: Path, steps: int, total: int, t: float) -> int:
    """Write the journal and return its last number."""
    seq = 0
    with path.open("w", encoding="ascii") as file:
        for event in opening(RunConfig(model_name_or_path="Qwen/Qwen3-8B", data=("chats.jsonl",))):
            seq += 1
            file.write(ev.encode(ev.Record(1, seq, t, event)) + "\n")
        for block, last in lines(1, steps, total, seq, t):
            file.write(block)
            seq = last
    return seq


def resident(pid: int) -> float:
    """Return a process's resident memory in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def drained(terminal: Terminal, ended: threading.Event) -> None:
    """Take what the screen draws, so that it is never held up."""
    while not ended.is_set():
        if select.select([terminal.master], [], [], 0.2)[0]:
            os.read(terminal.master, 1 << 16)


def until(told: Path, holds: str, patience: float) -> float:
    """Wait until the screen's note says `holds` (its step, or that it is no longer behind); return the seconds."""
    began = time.perf_counter()
    while time.perf_counter() - began < patience:
        note = told.read_text().split() if told.exists() else []
        if len(note) == 3 and (note[1] == holds if holds else note[2] == "0"):
            return time.perf_counter() - began
        time.sleep(0.05)
    raise TimeoutError(f"the screen did not come to {holds or 'the end of the file'}")


def watched(folder: Path, home: str, steps: int, more: int, seq: int, t: float) -> None:
    """Open the run, and print when its end is seen and how memory goes."""
    told, total = Path(home) / "told", steps + more
    began = time.perf_counter()
    terminal = Terminal(SCREEN, str(folder), str(told), size=(80, 24), QLORA_TUI_HOME=home)
    terminal.read_until(f"{steps:,}/{total:,}".encode())
    print(f"start of the program to the last step on screen: {time.perf_counter() - began:.2f} s")
    ended = threading.Event()
    taker = threading.Thread(target=drained, args=(terminal, ended))
    taker.start()
    try:
        until(told, "", 600)
        print(f"whole file folded behind it: {time.perf_counter() - began:.1f} s")
        time.sleep(3.0)
        before, most = resident(terminal.process.pid), 0.0
        with (folder / "events.jsonl").open("a", encoding="ascii") as file:
            for block, _ in lines(steps + 1, total, total, seq, t):
                file.write(block)
                file.flush()
                most = max(most, resident(terminal.process.pid))
                time.sleep(0.1)
        until(told, str(total), 120)
        time.sleep(2.0)
        after = resident(terminal.process.pid)
        most = max(most, after)
        print(f"viewer's memory: {before:.1f} MiB, after {more:,} more steps {after:.1f} ({after / before - 1:+.1%}), most {most:.1f}")
    finally:
        ended.set()
        taker.join()
        terminal.process.kill()
        terminal.process.wait()


def folded(path: Path) -> None:
    """Fold the file in this process and time the plot."""
    follower = Follower(path, long=1 << 60)
    began = time.perf_counter()
    while True:
        follower.look(10.0)
        if not follower.behind:
            break
    seconds = time.perf_counter() - began
    print(f"fold: {follower.state.seq:,} events in {seconds:.1f} s, {follower.state.seq / seconds:,.0f} a second")
    began = time.perf_counter()
    close = follower.close_look(500_000, 504_000)
    print(f"a closer look at 4,000 steps in the middle: {(time.perf_counter() - began) * 1000:.0f} ms, {len(close):,} buckets")
    state = follower.state
    series = plot.Series(state.history.buckets, state.evals, {}, state.step)
    for width, height in ((78, 8), (78, 19), (118, 12), (198, 24)):
        times = []
        for _ in range(20):
            began = time.perf_counter()
            plot.draw(series, width, height)
            times.append((time.perf_counter() - began) * 1000)
        told = f"{statistics.median(times):.1f} ms, {max(times):.1f} at most"
        print(f"plot of {len(state.history.buckets):,} buckets in {width}x{height} cells: {told}")


def main() -> None:
    """Write, open, append, fold."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    more = int(sys.argv[2]) if len(sys.argv) > 2 else steps // 10
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "20261127-120000-million"
        folder.mkdir()
        lock, t = RunLock(folder), round(time.time()) - steps * 0.25
        seq = write(folder / "events.jsonl", steps, steps + more, t)
        print(f"{json.dumps(seq)} events, {(folder / 'events.jsonl').stat().st_size / 2**20:.0f} MiB")
        watched(folder, home, steps, more, seq, t)
        folded(folder / "events.jsonl")
        lock.release()


if __name__ == "__main__":
    main()
