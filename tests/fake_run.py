"""A run without a model: what `Session` needs, and trainings that end in every way one can end."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.engine import budget, models
from qlora_tui.engine.data import Dataset
from qlora_tui.engine.errors import Diverged, WontFit
from qlora_tui.engine.events import Command, Evaluated, Event, Phase, Saved, Stepped
from qlora_tui.engine.hub import ModelFiles
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.preflight import Checked
from qlora_tui.engine.spec import RunConfig

RUN = RunConfig(model_name_or_path="builtin:smollm2-135m", data=("builtin:python-docs",))
DEVICE = Machine("a test", "cpu", 64 * 2**30, cores=2)
PATIENCE = 30.0


@dataclass(frozen=True)
class Ended:
    """What a training returns."""

    outcome: Any
    reason: str
    adapter: str = ""


def checked(run: RunConfig = RUN) -> Checked:
    """Return a run that passed every check, without looking at anything."""
    spec = models.find("builtin:smollm2-135m") or models.catalogue()[0]
    return Checked(run, ModelFiles(Path("/nowhere"), complete=True), spec, Dataset(()), None, DEVICE, budget.estimate(spec, run, DEVICE))


def step(number: int, total: int = 3, **changes: Any) -> Stepped:
    """Return one ordinary step."""
    facts = {"loss": 4.0 - number * 0.01, "grad_norm": 1.0, "clipped": False, "skipped": False, "lr": 1e-4}
    rest = {"tokens": 100, "supervised_tokens": 50, "seconds": 0.5, "data_seconds": 0.0, "memory_peak_bytes": 2**30}
    return Stepped(step=number, total_steps=total, epoch=number / total, **{**facts, **rest, **changes})


def three_steps(**_job: Any) -> Generator[Event, None, Ended]:
    """Take three steps, measure, and be done."""
    yield Phase("train", "begin")
    for number in (1, 2, 3):
        yield step(number)
    yield Evaluated(3, 2.8, 24, 0.1, "eval/step-000003.jsonl", 4.6, 1.7, (1.4, 2.0), 0.96, "a measurable improvement")
    yield Saved(3, "adapter", 1024, "adapter")
    return Ended("done", "all 3 steps done", "adapter")


def until_asked(wishes: Any, **_job: Any) -> Generator[Event, None, Ended]:
    """Step until somebody asks for a stop or an abort; a wish to save is obeyed between steps."""
    pace, number = threading.Event(), 0
    while (asked := wishes.urgent()) is None:
        number += 1
        yield step(number, 1_000_000)
        for wish in wishes.take():
            yield Command(wish.id, wish.name, obeyed=True)
            yield Saved(number, f"checkpoints/{wish.name}", 10)
        pace.wait(0.005)
    return Ended("stopped" if asked == "stop" else "aborted", f"{asked} at step {number}")


def deaf(**_job: Any) -> Generator[Event, None, Ended]:
    """Take one step and then hang, whatever anybody asks: a stuck kernel."""
    yield step(1)
    threading.Event().wait(PATIENCE * 2)
    return Ended("done", "never")


def crashing(**_job: Any) -> Generator[Event, None, Ended]:
    """Fail inside, with a secret and an escape sequence in hand."""
    yield step(1)
    secret = "hf_" + "a" * 20
    raise ValueError(f"broken \x1b]0;title\x07 {secret}")


def raising(error: BaseException) -> Callable[..., Generator[Event, None, Ended]]:
    """Return a training that ends in `error` after one step."""

    def train(**_job: Any) -> Generator[Event, None, Ended]:
        yield step(1)
        raise error

    return train


def chatty(**_job: Any) -> Generator[Event, None, Ended]:
    """Print past Python, as C libraries do, and through Python, as careless ones do."""
    os.write(1, b"from C on 1\n")
    os.write(2, b"from C on 2\n")
    print("from Python")
    logging.getLogger("some.library").warning("logged \x1b[2J")
    yield step(1, 1)
    return Ended("done", "all steps done")


def full(say: Any, **_job: Any) -> Generator[Event, None, Ended]:
    """Let the disk fill up after one step: from then on nothing more can be written to the journal."""
    yield step(1)

    def write(_event: Event) -> None:
        raise OSError(28, "No space left on device")

    say.__self__._journal.write = write
    yield step(2)
    return Ended("done", "never")


def fetching(**_job: Any) -> Generator[Event, None, Ended]:
    """Download something in a hundred parts, then be done."""
    yield Phase("fetch", "begin", note="a model \x1b]0;title\x07")
    for part in range(1, 101):
        yield Phase("fetch", "progress", done=part * 2**20, total=100 * 2**20, unit="bytes")
    yield Phase("fetch", "end", seconds=2.0)
    yield step(1, 1)
    return Ended("done", "all steps done")


def flood(wishes: Any, **_job: Any) -> Generator[Event, None, Ended]:
    """Step as fast as the journal takes it, far more than a pipe holds, and then until somebody asks to stop."""
    pace = threading.Event()
    for number in range(1, 5001):
        yield step(number, 5000)
    while (asked := wishes.urgent()) is None:
        pace.wait(0.01)
    return Ended("stopped", f"{asked} at the end")


PHASES = ("load", "data", "probe", "train", "eval", "save")
LIBC = ctypes.CDLL(None)


def leak(number: int) -> None:
    """Write where the screen is, past Python: a C library's buffer and bare descriptors; a child process now and then."""
    LIBC.puts(b"LEAK-puts\x1b[2J\x1b[H")
    LIBC.fflush(None)
    for handle in (1, 2):
        os.write(handle, b"LEAK-write-%d\r\n" % handle)
    if number % 50 == 1:
        subprocess.run(["sh", "-c", "echo LEAK-child; echo LEAK-child-err >&2"], check=True)


def held(phase: str) -> Callable[..., Generator[Event, None, Ended]]:
    """Return a training that stays in one phase until somebody asks, with C code that writes on descriptors 1 and 2 meanwhile."""

    def train(wishes: Any, **_job: Any) -> Generator[Event, None, Ended]:
        begun = PHASES.index(phase) > PHASES.index("probe")
        if begun:
            yield Phase("train", "begin")
            yield step(1, 1_000_000)
        yield Phase(phase, "begin", 0, 1_000_000, "rows")
        pace, number = threading.Event(), 0
        while (asked := wishes.urgent()) is None:
            number += 1
            leak(number)
            yield step(number + 1, 1_000_000) if phase == "train" else Phase(phase, "progress", number, 1_000_000, "rows")
            pace.wait(0.005)
        if begun:
            yield Saved(number, "adapter", 1024, "adapter")
        return Ended("stopped" if asked == "stop" else "aborted", f"{asked} in {phase}")

    return train


TRAININGS: dict[str, Callable[..., Generator[Event, None, Ended]]] = {
    "three_steps": three_steps,
    "until_asked": until_asked,
    "deaf": deaf,
    "crashing": crashing,
    "chatty": chatty,
    "fetching": fetching,
    "full": full,
    "flood": flood,
    "will_not_fit": raising(WontFit("too large")),
    "diverged": raising(Diverged("not finite")),
    **{f"held_{phase}": held(phase) for phase in PHASES},
}
