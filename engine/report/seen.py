"""What a journal says about a run, with what a resume made void left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from qlora_tui.engine.events import (
    Device,
    Evaluated,
    Event,
    Finding,
    Finished,
    Phase,
    Planned,
    Prepared,
    Probed,
    Record,
    Resumed,
    RolledBack,
    Sampled,
    Saved,
    Started,
    Stepped,
)
from qlora_tui.engine.rates import Change
from qlora_tui.engine.resume import rate_changes

_SAMPLES = 400


@dataclass(slots=True)
class Seen:
    """What a report or a summary needs of a journal.

    `made` are all steps that cost time, those included that a resume made void; `watts` are those that the device was seen to take;
    `spans` are the first and last moment of each attempt.
    """

    started: Started | None = None
    began: float = 0.0
    ended: float = 0.0
    attempts: int = 0
    prepared: Prepared | None = None
    planned: Planned | None = None
    steps: list[Stepped] = field(default_factory=list)
    evaluations: list[Evaluated] = field(default_factory=list)
    probes: dict[str, Probed] = field(default_factory=dict)
    samples: list[Sampled] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    device_peak_bytes: int = 0
    made: list[Stepped] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)
    spans: dict[int, tuple[float, float]] = field(default_factory=dict)
    phases: dict[str, Phase] = field(default_factory=dict)
    finished: Finished | None = None

    @property
    def scorecard(self) -> Evaluated | None:
        """Return the last comparison of base and tuned, if there was one."""
        return next((item for item in reversed(self.evaluations) if item.base_loss is not None), None)

    @property
    def peak_bytes(self) -> int:
        """Return the most memory that this process was seen to hold."""
        return max((step.memory_peak_bytes for step in self.steps), default=0) or self.device_peak_bytes

    @property
    def last_step(self) -> int:
        """Return the step after which training ended."""
        return self.steps[-1].step if self.steps else 0


def see(records: Iterable[Record]) -> Seen:
    """Fold a journal."""
    seen, told = Seen(), [*records]
    seen.changes = rate_changes(told)
    for record in told:
        seen.began = seen.began or record.t
        seen.ended = record.t
        seen.attempts = record.attempt
        seen.spans[record.attempt] = seen.spans.get(record.attempt, (record.t, 0.0))[0], record.t
        _see_one(seen, record.event)
    return seen


def _see_one(seen: Seen, event: Event) -> None:
    match event:
        case Started():
            seen.started, seen.finished = event, None
        case Stepped() | Evaluated() | Probed() | Sampled() | Saved() | Finding():
            _append(seen, event)
        case Phase(state="end", peak_bytes=int()):
            known = seen.phases.get(event.name)
            seen.phases[event.name] = event if known is None or (known.peak_bytes or 0) < (event.peak_bytes or 0) else known
        case Device():
            seen.device_peak_bytes = max(seen.device_peak_bytes, event.memory_ours_bytes or 0)
            if isinstance(event.power_watts, (float, int)):
                seen.watts.append(float(event.power_watts))
        case Resumed() | RolledBack():
            _cut(seen, event.to_step)
        case Prepared():
            seen.prepared = event
        case Planned():
            seen.planned = event
        case Finished():
            seen.finished = event


def _append(seen: Seen, event: Stepped | Evaluated | Probed | Sampled | Saved | Finding) -> None:
    match event:
        case Stepped():
            seen.steps.append(event)
            seen.made.append(event)
        case Evaluated():
            seen.evaluations = [item for item in seen.evaluations if not (event.manner and item.step == event.step)] + [event]
        case Probed():
            seen.probes[event.name] = event
        case Sampled():
            seen.samples = [*seen.samples[-_SAMPLES:], event]
        case Saved():
            seen.saved.append(event)
        case Finding():
            seen.findings.append(event)


def _cut(seen: Seen, step: int) -> None:
    """Forget what came after `step`: a resume went back to it, so it never happened to this adapter."""
    seen.steps = [item for item in seen.steps if item.step <= step]
    seen.evaluations = [item for item in seen.evaluations if item.step <= step]
    seen.samples = [item for item in seen.samples if item.step <= step]
    seen.findings = [item for item in seen.findings if item.step <= step]
    seen.probes = {}
