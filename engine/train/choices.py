"""What a run does where its config says "choose for me": chosen, told, kept for a resume, and made leaner where it must be.

A resume goes on with the choices of its first attempt, whatever is free now: other rows at once would add the same
numbers in another order, and the adapter would no longer be that of the uninterrupted run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_tui.engine import budget, fixes, forecast, measured, planner
from qlora_tui.engine.errors import ConfigError, WontFit
from qlora_tui.engine.events import Planned, Record
from qlora_tui.engine.machine import Machine, limited
from qlora_tui.engine.measured import Around
from qlora_tui.engine.meter import Meter
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.padding import row_of_largest
from qlora_tui.engine.planner import Plan
from qlora_tui.engine.rehearse import Rehearsed
from qlora_tui.engine.spec import KEYS, RunConfig, rows_at_once, rows_per_step, values_of
from qlora_tui.engine.values import read_value

_ROWS = ("per_device_train_batch_size", "gradient_accumulation_steps")
_WARM_STEPS = 2
_LENGTHS = 4  # groups of steps by length of which a time is remembered


@dataclass(slots=True)
class Choices:
    """The plan of one run: what was asked, what was chosen, and leaner choices in case that does not fit."""

    model: ModelSpec
    asked: RunConfig
    machine: Machine
    lengths: Sequence[int]
    plan: Plan
    fallbacks: list[RunConfig] = field(default_factory=list)

    @property
    def run(self) -> RunConfig:
        """The run as it is trained: nothing in it is left open."""
        return self.plan.run

    @property
    def free_bytes(self) -> int:
        """What the run may use of the device."""
        return limited(self.machine, self.run).free_bytes

    @property
    def hopeless(self) -> bool:
        """Whether even the low end of the estimate is more than is free; what may fit is left to the rehearsal."""
        needed = self.plan.budget
        return needed.total_bytes - needed.margin_bytes > self.free_bytes

    def predicted(self) -> dict[str, int]:
        """Return the budget's bytes by phase."""
        return {phase.name: phase.bytes for phase in self.plan.budget.phases}

    def planned(self, **more: Any) -> Planned:
        """Return the event that tells the choices; `more` are those that the planner does not make."""
        values = values_of(self.run)
        chosen = {name: values[name] for name in _open(self.asked)}
        return Planned(self.plan.budget.to_json(), {**chosen, **more}, self.plan.why, self.plan.seconds_per_token)

    def leaner(self) -> str:
        """Take the next leaner choice and return what changes, in words; nothing when there is none left.

        The choices of a resume may be leaner than the first of what would be chosen now; those are passed over.
        """
        before, held = self.run, self.predicted()["train"]
        while self.fallbacks and self.run == before:
            plan = _choose(self.model, self.fallbacks.pop(0), self.machine, self.lengths)
            if {phase.name: phase.bytes for phase in plan.budget.phases}["train"] <= held:
                self.plan = plan
        old, new = values_of(before), values_of(self.run)
        return ", ".join(f"{name} {old[name]} -> {new[name]}" for name in KEYS if old[name] != new[name])

    def refuse(self, said: str, lacking: int = 0) -> WontFit:
        """Return the error for a run that does not fit: what happened, and the cheapest changes that should help.

        Args:
            said: what happened, without its end.
            lacking: bytes that it was measured to need beyond the budget's figure; 0 where it just ran out.
        """
        return fixes.refusal(self.model, self.run, self.machine, said, longest=max(self.lengths), lengths=self.lengths, lacking=lacking)

    def _measured_length(self) -> int:
        """Return the length of the rows whose batch was the largest: of rows end to end, that of equal ones that are as many tokens."""
        return row_of_largest(self.lengths, rows_at_once(self.run)) if self.run.packing == "on" else max(self.lengths)

    def remember(
        self,
        meter: Meter,
        timed: Sequence[tuple[int, int, float]],
        rehearsed: Rehearsed | None,
        around: Around | None = None,
        *,
        halved: bool,
    ) -> None:
        """Keep what this run measured, so that the next estimate on this machine is closer.

        Args:
            meter: the peaks by phase.
            timed: tokens, rows and seconds of each step.
            rehearsed: the rehearsal's figures.
            around: what loading, saving and measuring took.
            halved: memory ran out on the way, so the peaks are not those of the plan.
        """
        name, key, at_once = self.machine.name, planner.step_key(self.model, self.run), rows_at_once(self.run)
        both = (("load", "load"), ("probe", "train"), ("probe eval", "eval"), ("train", "train"), ("eval", "eval"), ("save", "save"))
        found: dict[str, int] = {}
        for phase, kind in both:
            found[kind] = max(found.get(kind, 0), meter.peaks.get(phase, 0))
        if halved:
            return
        formula = budget.estimate(self.model, self.run, self.machine, longest=self._measured_length())
        measured.remember_memory(name, measured.versions(), {phase.name: phase.bytes for phase in formula.phases}, found)
        parts = rows_per_step(self.run) // at_once
        for tokens, seconds in points(timed):
            measured.remember_steps(name, key, tokens, at_once, seconds, parts)
        if rehearsed is not None:
            seconds = (rehearsed.seconds["train"] + rehearsed.seconds["optimizer"] / parts) / rehearsed.tokens
            measured.remember_steps(name, key, rehearsed.tokens // rehearsed.rows, at_once, seconds, parts)
        if around is not None:
            measured.remember_around(name, forecast.around_key(self.model, self.run), around)


def choose(model: ModelSpec, asked: RunConfig, machine: Machine, lengths: Sequence[int], past: Iterable[Record] = ()) -> Choices:
    """Choose what `asked` leaves open; with a `past` journal of the same run, as it was chosen then.

    Args:
        model: the base's shape.
        asked: the run as its config says.
        machine: the device as it was looked at.
        lengths: tokens of every training and held-out row.
        past: the records of earlier attempts, oldest first.
    """
    kept = as_before(asked, past)
    plan = _choose(model, kept, machine, lengths)
    leaner = plan.fallbacks if kept == asked else _choose(model, asked, machine, lengths).fallbacks
    return Choices(model, asked, machine, lengths, plan, list(leaner))


def as_before(asked: RunConfig, past: Iterable[Record]) -> RunConfig:
    """Return `asked` with what it leaves open chosen as in the last `planned` of `past`; a value fixed by hand stays."""
    told = [record.event for record in past if isinstance(record.event, Planned)]
    if not told:
        return asked
    kept = _readable(told[-1].choices, _open(asked))
    run = dataclasses.replace(asked, **kept)
    if set(_ROWS) & set(kept) and rows_per_step(run) != rows_per_step(asked):
        return dataclasses.replace(asked, **{name: value for name, value in kept.items() if name not in _ROWS})
    return run


def points(timed: Sequence[tuple[int, int, float]]) -> list[tuple[int, float]]:
    """Return tokens a row and seconds a token of steps grouped by the length of their rows; the first steps warm up and do not count."""
    each = sorted((tokens / rows, seconds / tokens) for tokens, rows, seconds in timed[_WARM_STEPS:] if rows and tokens)
    size = max(1, -(-len(each) // _LENGTHS))
    groups = [each[start : start + size] for start in range(0, len(each), size)]
    return [(round(statistics.median(length for length, _ in group)), statistics.median(one for _, one in group)) for group in groups]


def _choose(model: ModelSpec, run: RunConfig, machine: Machine, lengths: Sequence[int]) -> Plan:
    return planner.choose(model, run, machine, longest=max(lengths), mean=statistics.fmean(lengths), lengths=lengths)


def _open(run: RunConfig) -> tuple[str, ...]:
    """Return the keys that a run leaves open; how often micro-batches are summed goes with their size."""
    names = planner.open_keys(run)
    return (*names, _ROWS[1]) if _ROWS[0] in names else names


def _readable(choices: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return those choices that are a value of their key's type; a journal may come from another version."""
    found = {}
    for name in names:
        with contextlib.suppress(KeyError, ConfigError):
            found[name] = read_value(KEYS[name], choices[name])
    return found
