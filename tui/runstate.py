"""One moment of a run as the screens know it: plain values, none of which ever changes.

`state.fold` makes them from events. Whatever grows with the run is bounded here: the lines below say by how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from qlora_tui.engine import events as ev
from qlora_tui.tui.history import History

LOG_LINES = 500
FINDINGS = 200
EVALS = 500
READINGS = 600
MARKS = 32
MOMENTS = 256
ANSWERS = 16
TEXTS = 50

Kind = Literal["info", "good", "warn", "bad"]
MomentKind = Literal["saved", "rate", "pause", "resume", "back"]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the log as people read it; `text` is already safe to show."""

    t: float
    text: str
    kind: Kind = "info"


@dataclass(frozen=True, slots=True)
class Doing:
    """The phase at work: since when, and how far where that can be counted."""

    name: str
    since: float
    done: int | None = None
    total: int | None = None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A checkpoint, and the loss history at its step: what a resume from it goes back to."""

    step: int
    history: History
    path: str = ""


class Moment(NamedTuple):
    """Something that happened to the run at a step, worth a mark on the plot."""

    step: int
    kind: MomentKind


class Reading(NamedTuple):
    """What the sensors said at one time, and how fast the run was; None where there is no such sensor."""

    t: float
    busy: float | None = None
    watts: float | None = None
    celsius: float | None = None
    ours: float | None = None
    speed: float | None = None
    waiting: float | None = None


@dataclass(frozen=True, slots=True)
class RunState:
    """One moment of a run, immutable; the screen compares it with the last one to see what to redraw."""

    run_id: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 0
    seq: int = 0
    t: float = 0.0
    started_at: float = 0.0
    spent_before: float = 0.0

    doing: Doing | None = None
    phases: tuple[tuple[str, float], ...] = ()
    prepared: ev.Prepared | None = None
    predicted_bytes: int | None = None
    predicted_margin: int = 0
    predicted_parts: tuple[tuple[str, int], ...] = ()
    machine_bytes: int | None = None

    last: ev.Stepped | None = None
    total_steps: int = 0
    history: History = field(default_factory=History)
    speed: float | None = None
    data_share: float | None = None
    peak_bytes: int = 0

    evals: tuple[tuple[int, float], ...] = ()
    base_loss: float | None = None
    scorecard: ev.Evaluated | None = None
    probes: Mapping[str, ev.Probed] = field(default_factory=dict)
    marks: tuple[Mark, ...] = ()
    saved: ev.Saved | None = None
    saved_at: float = 0.0
    adapter: str = ""
    healthy: int | None = None
    resumes: tuple[int, ...] = ()
    moments: tuple[Moment, ...] = ()
    samples: tuple[ev.Sampled, ...] = ()

    findings: tuple[ev.Finding, ...] = ()
    device: ev.Device | None = None
    readings: tuple[Reading, ...] = ()
    forecast: ev.Forecast | None = None
    forecast_at: float = 0.0
    log: tuple[Line, ...] = ()
    answer: ev.Command | None = None
    answers: tuple[ev.Command, ...] = ()
    paused_at: float = 0.0
    asked_to_pause: bool = False
    finished: ev.Finished | None = None

    @property
    def step(self) -> int:
        """Return the number of optimizer steps done."""
        return self.last.step if self.last else self.resumes[-1] if self.resumes else 0

    @property
    def warnings(self) -> tuple[ev.Finding, ...]:
        """Return the findings a person should act on."""
        return tuple(finding for finding in self.findings if finding.severity != "info")
