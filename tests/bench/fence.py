"""What the fence costs a step.

usage: python tests/bench/fence.py

Every call into the fence is timed inside real runs of a few steps, in seconds of this thread's processor time, timers
included, and set against the whole steps (run with OMP_NUM_THREADS=1, so that this thread does all the work):
the tests' tiny model, the demo, and a model with as many parts as an 8 B one that is otherwise tiny. Prints a table.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[depth] / part) for depth, part in ((1, ""), (1, "loop"), (2, ".pkg"))]
from conftest import write_model, write_tokenizer  # noqa: E402  found through the line above
from loop_driver import drive  # noqa: E402

from qlora_tui.engine import preset  # noqa: E402
from qlora_tui.engine.builtin import small_files  # noqa: E402
from qlora_tui.engine.train.fence import Fence  # noqa: E402

SPENT: dict[str, list[float]] = {"step": [], "after_backward": [], "before_step": [], "_after_forward": [], "inside": [], "excursion": []}


def timed(name: str) -> None:
    """Time a plain method of the fence."""
    inner: Callable[..., Any] = getattr(Fence, name)

    def wrapper(*args: Any) -> Any:
        began = time.thread_time()
        try:
            return inner(*args)
        finally:
            SPENT[name].append(time.thread_time() - began)

    setattr(Fence, name, wrapper)


def timed_around(name: str) -> None:
    """Time a context of the fence: what it takes to enter and to leave, not what happens inside."""
    inner: Callable[..., Any] = getattr(Fence, name)

    @contextmanager
    def wrapper(*args: Any, **kwargs: Any) -> Iterator[None]:
        began = time.thread_time()
        with inner(*args, **kwargs):
            entered = time.thread_time()
            yield
            left = time.thread_time()
        if name == "step":
            SPENT["inside"].append(left - entered)
        SPENT[name].append(entered - began + time.thread_time() - left)

    setattr(Fence, name, wrapper)


def measure(name: str, folder: Path, steps: int) -> str:
    """Train a few steps on `folder` as the demo does and return a row of the table."""
    for spent in SPENT.values():
        spent.clear()
    flags = {"model_name_or_path": str(folder), "max_steps": steps, "max_length": 256, "val_set_size": 8.0, "max_samples": 80}
    with tempfile.TemporaryDirectory() as where:
        ran = drive(preset.resolve(preset="demo", flags=flags), Path(where))
    if ran.error is not None:
        raise ran.error
    a_step = sum(sum(SPENT[part]) for part in ("step", "after_backward", "before_step", "_after_forward")) / steps
    inside, excursion = statistics.median(SPENT["inside"][1:]), statistics.median(SPENT["excursion"])
    return f"| {name} | {a_step * 1e3:.2f} ms | {inside * 1e3:.0f} ms | {a_step / inside:.3%} | {excursion * 1e3:.1f} ms |"


def main() -> None:
    """Print the table."""
    timed_around("step")
    timed_around("excursion")
    for name in ("after_backward", "before_step", "_after_forward"):
        timed(name)
    with tempfile.TemporaryDirectory() as where:
        tiny, many = Path(where) / "tiny", Path(where) / "many"
        for folder, layers in ((tiny, 2), (many, 36)):
            write_model(folder, num_hidden_layers=layers)
            write_tokenizer(folder)
        print("| model | fence a step | a step | share | around an evaluation |\n|---|---|---|---|---|")
        print(measure("the tests' own, 2 layers", tiny, 30), flush=True)
        print(measure("36 layers, 252 adapted, as many as an 8 B model's, hidden size 64", many, 10), flush=True)
        demo = small_files()
        if demo.complete:
            print(measure("the demo, SmolLM2-135M in nf4", demo.folder, 4), flush=True)


if __name__ == "__main__":
    main()
