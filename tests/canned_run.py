"""A run told by events, and a desk without a network, for tests of the screens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from qlora_tui.engine import events as ev
from qlora_tui.engine import machine, models
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.spec import RunConfig, values_of
from qlora_tui.tui.datalook import DataLook
from qlora_tui.tui.screens.desk import Desk
from qlora_tui.tui.screens.shelves import ModelChoice

GIB = 1 << 30


def step(number: int, total: int = 40, loss: float = 2.0, **changes: Any) -> ev.Stepped:
    fields: dict[str, Any] = {"epoch": 0.5, "grad_norm": 0.8, "clipped": False, "skipped": not math.isfinite(loss), "lr": 2e-4}
    fields |= {"tokens": 1200, "supervised_tokens": 700, "seconds": 0.5, "data_seconds": 0.01, "memory_peak_bytes": 9 * GIB}
    return ev.Stepped(number, total, loss=loss, **(fields | changes))


def opening(run: RunConfig) -> list[ev.Event]:
    device = {"name": "RTX 4090", "kind": "cuda", "total_bytes": 24 * GIB}
    return [
        ev.Started("20261125-164012-test", values_of(run), {"python": "3.11"}, device),
        ev.Phase("fetch", "begin", 0, 94_000_000, "bytes", note="from the package index"),
        ev.Phase("fetch", "progress", 47_000_000, 94_000_000, "bytes"),
        ev.Phase("fetch", "end", seconds=4.0),
        ev.Prepared("messages", "each row has messages", 100, 90, 10, 12_000, 7_000, 20, 40, dropped={"too long": 2}),
        ev.Planned({"total_bytes": int(9.8 * GIB), "device": {"total_bytes": 24 * GIB}}),
        ev.Evaluated(0, 3.2, 10, 0.1),
        ev.Phase("train", "begin"),
    ]


def middle(steps: int = 20) -> list[ev.Event]:
    found: list[ev.Event] = []
    for number in range(1, steps + 1):
        found.append(step(number, loss=math.nan if number == 7 else 3.0 - number * 0.03))
        found.append(ev.Device(int(9.6 * GIB), 0, 24 * GIB, 98.0, 402.0, 450.0, 71.0))
    found.append(ev.Finding("non-finite", "warn", 7, "the loss was not a number", ("look at row 12",)))
    found.append(ev.Saved(steps, f"checkpoints/step-{steps:06}", 86 << 20))
    found.append(ev.Forecast((100.0, 120.0, 140.0), "the last steps"))
    return found


def ending(outcome: ev.Outcome = "done") -> list[ev.Event]:
    score = ev.Evaluated(
        40, 2.1, 10, 0.1, base_loss=3.2, drop=1.1, interval=(0.9, 1.3), better_share=0.9, verdict="a measurable improvement"
    )
    return [ev.Saved(40, "adapter", 20 << 20, "adapter"), score, ev.Finished(outcome, 0, "all 40 steps done", adapter="runs/test/adapter")]


class QuietDesk(Desk):
    """A desk with a known card, few models and made-up data: nothing is fetched, little is read."""

    def machine(self) -> Machine:
        return machine.find_card("RTX 4090")

    def models(self) -> list[ModelChoice]:
        names = ("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-70B-Instruct")
        return [ModelChoice(name, spec, "to fetch") for name in names if (spec := models.find(name)) is not None]

    def look_at_data(self, run: RunConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> DataLook:
        if any("missing" in name for name in run.data):
            return DataLook(run.data, problem="there is no such file", hint="check the path")
        if any("broken" in name for name in run.data):
            return DataLook(run.data, "messages", "", 9, 900, faults=("row 3 (line 3), messages: is empty",), refused=1)
        return DataLook(run.data, "messages", "each row has messages", 1000, 200_000, samples=(("user", "hi"), ("assistant", "hello")))
