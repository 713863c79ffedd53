"""What is said about a run: one frozen record a fact, and its form on disk.

Everything downstream (screen, printer, reports, other tools) reads these and nothing else. `FORMAT_VERSION`
rises only when an old reader would misread a file; new keys and new types do not raise it, since readers
skip what they do not know.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, get_args

from qlora_tui.engine.errors import JournalError

FORMAT_VERSION = 1

PhaseName = Literal["fetch", "load", "data", "plan", "probe", "train", "eval", "save", "pause", "sample", "export"]
PhaseState = Literal["begin", "progress", "end"]
Severity = Literal["info", "warn", "stop"]
Outcome = Literal["done", "stopped", "aborted", "failed", "will_not_fit", "diverged"]
WishName = Literal["stop", "abort", "save", "pause", "resume", "sample", "set"]


@dataclass(frozen=True, slots=True)
class Started:
    """A run, or a further attempt at it, began. `config` is every key of `run.toml`."""

    type: ClassVar[str] = "started"
    run_id: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    device: Mapping[str, Any]
    resumed_from: int | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase began, went on or ended; `done` of `total` in `unit` where it can be counted, `note` for people.

    `peak_bytes` is the most that the device held for this process in the phase, CUDA's context included, and
    `predicted_bytes` what the budget said of it.
    """

    type: ClassVar[str] = "phase"
    name: PhaseName
    state: PhaseState
    done: int | None = None
    total: int | None = None
    unit: str = ""
    seconds: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    predicted_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What will be trained: counts of rows and tokens, why rows are missing, and in `notes` what a person would not expect."""

    type: ClassVar[str] = "prepared"
    format: str
    why: str
    rows: int
    train_rows: int
    holdout_rows: int
    tokens: int
    supervised_tokens: int
    steps_per_epoch: int
    total_steps: int
    refused: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    max_row_tokens: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Planned:
    """The memory budget, as `budget.Budget.to_json` gives it, and every choice made for the user, with the reason.

    Comes again when the rehearsal had to choose leaner; a resume goes on with the choices of the last one.
    `seconds_per_token` is the predicted time of one token in training, where anything is known to predict it from.
    """

    type: ClassVar[str] = "planned"
    budget: Mapping[str, Any]
    choices: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    seconds_per_token: float | None = None


@dataclass(frozen=True, slots=True)
class Stepped:
    """One optimizer step. `loss` is nats a supervised token; `tokens` are real ones, without padding.

    `skipped` means that the step was computed but not applied (non-finite). Memory is bytes; on a CPU
    the allocated bytes are the process's resident memory and `memory_reserved_bytes` is the same figure.
    """

    type: ClassVar[str] = "stepped"
    step: int
    total_steps: int
    epoch: float
    loss: float
    grad_norm: float
    clipped: bool
    skipped: bool
    lr: float
    tokens: int
    supervised_tokens: int
    seconds: float
    data_seconds: float
    rows: tuple[int, ...] = ()
    memory_allocated_bytes: int = 0
    memory_reserved_bytes: int = 0
    memory_peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The hold-out was measured. The scorecard's fields are set once base and tuned can be compared.

    `loss` and `base_loss` weigh tokens; `drop` (base minus tuned) and `interval` (95 %) rest on row means. `worst` are the
    rows that lost most, worst first: `row`, `base_loss`, `loss`, and in `prompt` and `answer` foreign words to read.
    `manner`: the same once more, since answers gained hardly more after their own question than after another, if at all.
    """

    type: ClassVar[str] = "evaluated"
    step: int
    loss: float
    rows: int
    stderr: float
    path: str = ""
    base_loss: float | None = None
    drop: float | None = None
    interval: tuple[float, float] | None = None
    better_share: float | None = None
    verdict: str = ""
    worst: tuple[Mapping[str, Any], ...] = ()
    manner: bool = False


@dataclass(frozen=True, slots=True)
class Probed:
    """Other rows were measured by the hold-out's definition: general text, rows trained on, or held-out answers after other questions.

    `about` says in words which rows they are; `tokens` counts supervised ones. Of the answers `own_more` is what they gained more
    after their own question, in nats a token.
    """

    type: ClassVar[str] = "probed"
    step: int
    name: Literal["general", "train", "other_question"]
    about: str
    rows: int
    tokens: int
    base_loss: float
    loss: float
    drop: float
    interval: tuple[float, float]
    better_share: float
    own_more: float | None = None
    own_interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the model wrote when it was asked in the middle of training; `prompt` and `text` are foreign words."""

    type: ClassVar[str] = "sampled"
    step: int
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint was written, verified and renamed into place."""

    type: ClassVar[str] = "saved"
    step: int
    path: str
    bytes: int
    kind: Literal["checkpoint", "adapter", "diagnostic"] = "checkpoint"


@dataclass(frozen=True, slots=True)
class MarkedHealthy:
    """The checkpoint of `step` was followed by enough clean steps: a roll back may go there."""

    type: ClassVar[str] = "marked_healthy"
    step: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """Training goes on after `to_step`; what an earlier attempt did beyond it is void."""

    type: ClassVar[str] = "resumed"
    to_step: int


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Training went back to the checkpoint of `to_step`; what came after it is void.

    From here on the schedule's learning rate is taken times `rate_factor`; `times` counts what the run did by itself.
    """

    type: ClassVar[str] = "rolled_back"
    to_step: int
    rate_factor: float
    times: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Device:
    """One look at the device, about once a second; a sensor that is missing is None, never a made-up zero."""

    type: ClassVar[str] = "device"
    memory_ours_bytes: int | None = None
    memory_others_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilization: float | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    temperature_c: float | None = None
    throttle: str = ""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds left (low, mid, high), and what the figure rests on, in words."""

    type: ClassVar[str] = "forecast"
    seconds_left: tuple[float, float, float]
    basis: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a person should know: the rule that spoke, its numbers, and advice in order of cost."""

    type: ClassVar[str] = "finding"
    detector: str
    severity: Severity
    step: int
    message: str
    advice: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Command:
    """A wish was obeyed or refused, and why.

    `set` alone has a `step`, the first one that it counts for, and its `args`: with them another run can do the same.
    """

    type: ClassVar[str] = "command"
    id: str
    name: str
    obeyed: bool
    why: str = ""
    step: int | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finished:
    """The last word of an attempt."""

    type: ClassVar[str] = "finished"
    outcome: Outcome
    exit_code: int
    reason: str
    adapter: str = ""
    report: str = ""


Event = (
    Started
    | Phase
    | Prepared
    | Planned
    | Stepped
    | Evaluated
    | Probed
    | Sampled
    | Saved
    | MarkedHealthy
    | Resumed
    | RolledBack
    | Device
    | Forecast
    | Finding
    | Command
    | Finished
)

EVENT_TYPES: Mapping[str, type[Event]] = {kind.type: kind for kind in get_args(Event)}


@dataclass(frozen=True, slots=True)
class Record:
    """An event with its place in the journal: attempt, running number and Unix time."""

    attempt: int
    seq: int
    t: float
    event: Event


@dataclass(frozen=True, slots=True)
class Wish:
    """What a viewer asks of a run; obeyed between optimizer steps, `stop` and `abort` also in long loops."""

    id: str
    t: float
    attempt: int
    name: str
    args: Mapping[str, Any] = field(default_factory=dict)


class Wishes(Protocol):
    """The loop's view of what people ask: cheap to poll, never blocking."""

    def urgent(self) -> str | None:
        """Return "stop" or "abort" once asked for; polled inside every long loop."""

    def take(self) -> list[Wish]:
        """Return the wishes that arrived since the last call, at safe points only; whoever takes one answers it with a `Command`."""


def encode(record: Record) -> str:
    """Return `record` as one line of ASCII JSON without its line break."""
    body = {item.name: getattr(record.event, item.name) for item in dataclasses.fields(record.event)}  # names come from the class
    head = {"v": FORMAT_VERSION, "attempt": record.attempt, "seq": record.seq, "t": record.t, "type": record.event.type}
    return json.dumps(plain(head | body), ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def decode(line: str) -> Record | None:
    """Read one line; None for a torn line, an unknown type or a record without what its type needs.

    Raises:
        JournalError: the line was written by a later format version.
    """
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or not isinstance(raw.get("v"), int):
        return None
    if raw["v"] > FORMAT_VERSION:
        raise JournalError(
            f"this run was written by a newer qlora-tui (format {raw['v']}, this one reads {FORMAT_VERSION})", hint="update qlora-tui"
        )
    kind = EVENT_TYPES.get(raw.get("type", ""))
    if kind is None:
        return None
    try:
        fields = {name: raw[name] if plainly else _revive(raw[name], shape) for name, shape, plainly in _SHAPES[kind] if name in raw}
        return Record(int(raw["attempt"]), int(raw["seq"]), float(raw["t"]), kind(**fields))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


_SHAPES: Mapping[type[Event], tuple[tuple[str, str, bool], ...]] = {
    kind: tuple((item.name, str(item.type), not re.search("float|tuple", str(item.type))) for item in dataclasses.fields(kind))
    for kind in EVENT_TYPES.values()
}
"""By kind: each field's name, its annotation, and whether JSON holds it as it is; worked out once, since files hold millions of lines."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def plain(value: Any) -> Any:
    """Return `value` as JSON can hold it: tuples as lists, non-finite numbers as the strings readers know."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value


def _revive(value: Any, annotation: str) -> Any:
    if "float" in annotation and isinstance(value, str):
        return _NON_FINITE[value]
    if annotation.startswith("tuple") and isinstance(value, list):
        return tuple(_NON_FINITE.get(part, part) if isinstance(part, str) and "float" in annotation else part for part in value)
    return value
