"""Everything the run screen shows, folded from events and from nothing else.

`fold` is pure and fast, so a running run, a run in another process and a finished one are shown by the same
code, and a replay of a file gives the same screen. Histories are bounded; full resolution stays in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qlora_tui.engine import events as ev
from qlora_tui.engine.text import one_line
from qlora_tui.tui import words
from qlora_tui.tui.history import History

LOG_LINES = 500
FINDINGS = 200
EVALS = 500
SAMPLES = 240
MARKS = 32

Kind = Literal["info", "good", "warn", "bad"]
Changes = dict[str, Any]


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
    marks: tuple[Mark, ...] = ()
    saved: ev.Saved | None = None
    saved_at: float = 0.0
    adapter: str = ""
    resumes: tuple[int, ...] = ()

    findings: tuple[ev.Finding, ...] = ()
    device: ev.Device | None = None
    usage: tuple[float, ...] = ()
    forecast: ev.Forecast | None = None
    forecast_at: float = 0.0
    log: tuple[Line, ...] = ()
    answer: ev.Command | None = None
    finished: ev.Finished | None = None

    @property
    def step(self) -> int:
        """Return the number of optimizer steps done."""
        return self.last.step if self.last else self.resumes[-1] if self.resumes else 0

    @property
    def warnings(self) -> tuple[ev.Finding, ...]:
        """Return the findings a person should act on."""
        return tuple(finding for finding in self.findings if finding.severity != "info")


def fold(state: RunState, record: ev.Record) -> RunState:
    """Return the state after `record`; an event of a kind that is not shown changes only the clock."""
    if record.seq <= state.seq:
        return state
    handler = _FOLDS.get(record.event.type)
    changes = handler(state, record.event, record.t) if handler else {}
    return replace(state, seq=record.seq, t=record.t, attempt=record.attempt, **changes)


def fold_all(records: Iterable[ev.Record], state: RunState | None = None) -> RunState:
    """Fold many records, oldest first."""
    current = state or RunState()
    for record in records:
        current = fold(current, record)
    return current


def _say(state: RunState, t: float, text: str, kind: Kind = "info") -> tuple[Line, ...]:
    return (*state.log[-(LOG_LINES - 1) :], Line(t, one_line(text), kind))


def _started(state: RunState, event: ev.Started, t: float) -> Changes:
    again = event.resumed_from is not None
    text = f"goes on after step {event.resumed_from}" if again else f"run {event.run_id} started"
    return {
        "run_id": event.run_id,
        "config": event.config,
        "machine": event.device,
        "started_at": t,
        "finished": None,
        "answer": None,
        "doing": None,
        "log": _say(state, t, text),
    }


_PHASE_WORDS = {
    "fetch": "download",
    "load": "load the model",
    "data": "read the data",
    "plan": "plan the memory",
    "probe": "try the longest rows",
    "train": "train",
    "eval": "measure held-out rows",
    "save": "save",
    "pause": "pause",
    "export": "export",
}


def phase_words(name: str, note: str = "") -> str:
    """Return what a phase does, in words.

    Loading comes twice, the libraries first and then the model, so its short note is a part of its name.

    >>> phase_words("eval", "24 rows"), phase_words("load", "the libraries for training"), phase_words("load")
    ('measure held-out rows', 'load the libraries for training', 'load the model')
    """
    if name == "load" and note.startswith("the "):
        return f"load {one_line(note, limit=40)}"
    return _PHASE_WORDS.get(name, one_line(name, limit=40))


def _phase(state: RunState, event: ev.Phase, t: float) -> Changes:
    if event.state == "end":
        seconds = event.seconds if event.seconds is not None else max(0.0, t - state.doing.since) if state.doing else 0.0
        told = event.name not in ("train", "save") or bool(event.note)
        what = phase_words(event.name, state.doing.note if state.doing and state.doing.name == event.name else event.note)
        text = f"{what}: done in {words.duration(seconds)}" + (f", {event.note}" if event.note and event.note not in what else "")
        return {
            "doing": None,
            "phases": (*state.phases[-31:], (what, seconds)),
            "log": _say(state, t, text) if told else state.log,
        }
    since = state.doing.since if state.doing and state.doing.name == event.name and event.state == "progress" else t
    kept = state.doing.note if state.doing and state.doing.name == event.name and event.state == "progress" else ""
    doing = Doing(event.name, since, event.done, event.total, one_line(event.unit, limit=20), one_line(event.note, limit=200) or kept)
    told = event.state == "begin" and bool(event.note)
    what = phase_words(event.name, event.note)
    text = what if event.note in what else f"{what}: {event.note}"
    return {"doing": doing, "log": _say(state, t, text) if told else state.log}


def _prepared(state: RunState, event: ev.Prepared, t: float) -> Changes:
    text = f"{event.train_rows:,} rows to train on, {event.holdout_rows:,} held out, {event.tokens:,} tokens ({event.format})"
    log = _say(state, t, text)
    left_out = {**event.refused, **event.dropped}
    if left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        log = (*log[-(LOG_LINES - 1) :], Line(t, one_line(f"rows left out: {reasons}"), "warn"))
    return {"prepared": event, "total_steps": event.total_steps or state.total_steps, "log": log}


def _planned(state: RunState, event: ev.Planned, t: float) -> Changes:
    budget = event.budget
    total, device = budget.get("total_bytes"), budget.get("device")
    predicted = int(total) if isinstance(total, (int, float)) else None
    room = device.get("total_bytes") if isinstance(device, Mapping) else None
    log = state.log
    items = [item for item in budget.get("items", ()) if isinstance(item, Mapping) and isinstance(item.get("bytes"), (int, float))]
    parts = tuple((one_line(item.get("name", ""), limit=20), int(item["bytes"])) for item in items[:20])
    if predicted is not None:
        log = _say(state, t, f"memory predicted: {words.gib(predicted)}{f'; {event.why}' if event.why else ''}")
    for name, choice in event.choices.items():
        log = (*log[-(LOG_LINES - 1) :], Line(t, one_line(f"chosen: {name} = {choice}")))
    margin = budget.get("margin_bytes")
    machine = int(room) if isinstance(room, (int, float)) else None
    return {
        "predicted_bytes": predicted,
        "predicted_margin": int(margin) if isinstance(margin, (int, float)) else 0,
        "predicted_parts": parts,
        "machine_bytes": machine,
        "log": log,
    }


def _stepped(state: RunState, event: ev.Stepped, t: float) -> Changes:
    speed, share = state.speed, state.data_share
    if event.seconds > 0:
        speed = _blend(speed, event.tokens / event.seconds)
        share = _blend(share, min(1.0, event.data_seconds / event.seconds))
    log = state.log
    if event.skipped:
        log = _say(state, t, f"step {event.step} was not applied: loss {words.number(event.loss)}", "bad")
    return {
        "last": event,
        "total_steps": event.total_steps,
        "history": state.history.add(event.step, event.loss),
        "speed": speed,
        "data_share": share,
        "peak_bytes": max(state.peak_bytes, event.memory_peak_bytes),
        "log": log,
    }


def _blend(old: float | None, new: float) -> float:
    return new if old is None else 0.8 * old + 0.2 * new


def _evaluated(state: RunState, event: ev.Evaluated, t: float) -> Changes:
    final = event.base_loss is not None and event.drop is not None
    evals = state.evals
    if math.isfinite(event.loss) and (not evals or evals[-1] != (event.step, event.loss)):
        evals = (*evals[-(EVALS - 1) :], (event.step, event.loss))
    base = state.base_loss if state.base_loss is not None else event.loss if event.step == 0 else None
    text = f"held-out loss at step {event.step}: {words.number(event.loss)} on {event.rows:,} rows"
    log = _say(state, t, text, "good" if final else "info")
    return {"evals": evals, "base_loss": base, "scorecard": event if final else state.scorecard, "log": log}


def _saved(state: RunState, event: ev.Saved, t: float) -> Changes:
    adapter = event.path if event.kind == "adapter" else state.adapter
    name = "adapter" if event.kind == "adapter" else f"{event.kind} of step {event.step}"
    name = name.replace("diagnostic", "diagnostic checkpoint")
    log = _say(state, t, f"{name} saved and verified, {words.size(event.bytes)}", "good")
    marks = (*state.marks[-(MARKS - 1) :], Mark(event.step, state.history, event.path)) if event.kind == "checkpoint" else state.marks
    return {"saved": event, "saved_at": t, "adapter": adapter, "marks": marks, "log": log}


def _marked_healthy(state: RunState, event: ev.MarkedHealthy, t: float) -> Changes:
    return {"log": _say(state, t, f"checkpoint of step {event.step} is healthy: the steps after it were clean", "good")}


def _rolled_back(state: RunState, event: ev.RolledBack, t: float) -> Changes:
    """Cut off what came after the checkpoint, but keep what the watch said: it is the reason."""
    text = f"back to step {event.to_step}, with {event.rate_factor:g} times the learning rate: {event.why}"
    cut = _resumed(state, ev.Resumed(event.to_step), t)
    return cut | {"findings": state.findings, "log": _say(state, t, text, "bad")}


def _resumed(state: RunState, event: ev.Resumed, t: float) -> Changes:
    """Cut off what came after the checkpoint: those steps are void and will be done again."""
    at = event.to_step
    marks = tuple(mark for mark in state.marks if mark.step <= at)
    exact = next((mark.history for mark in reversed(marks) if mark.step == at), None)
    last = state.last if state.last and state.last.step <= at else None
    return {
        "last": last,
        "history": exact if exact is not None else state.history.cut(at),
        "evals": tuple(point for point in state.evals if point[0] <= at),
        "findings": tuple(finding for finding in state.findings if finding.step <= at),
        "scorecard": None,
        "forecast": None,
        "marks": marks,
        "resumes": (*state.resumes, at),
        "log": _say(state, t, f"goes on after step {at}"),
    }


def _device(state: RunState, event: ev.Device, _t: float) -> Changes:
    usage = state.usage
    if event.utilization is not None and math.isfinite(event.utilization):
        usage = (*usage[-(SAMPLES - 1) :], event.utilization)
    return {"device": event, "usage": usage, "peak_bytes": max(state.peak_bytes, event.memory_ours_bytes or 0)}


def _forecast(state: RunState, event: ev.Forecast, t: float) -> Changes:
    return {"forecast": event, "forecast_at": t}


def _finding(state: RunState, event: ev.Finding, t: float) -> Changes:
    kind: Kind = "info" if event.severity == "info" else "warn" if event.severity == "warn" else "bad"
    log = _say(state, t, f"step {event.step}: {event.message}", kind)
    return {"findings": (*state.findings[-(FINDINGS - 1) :], event), "log": log}


def _command(state: RunState, event: ev.Command, t: float) -> Changes:
    text = f"{event.name}: {'will be done' if event.obeyed else 'refused'}" + (f", {event.why}" if event.why else "")
    return {"answer": event, "log": _say(state, t, text, "info" if event.obeyed else "warn")}


def _finished(state: RunState, event: ev.Finished, t: float) -> Changes:
    kind: Kind = "good" if event.outcome == "done" else "warn" if event.outcome in ("stopped", "aborted") else "bad"
    outcome = event.outcome.replace("_", " ")
    log = _say(state, t, event.reason if event.reason.startswith(outcome) else f"{outcome}: {event.reason}", kind)
    return {"finished": event, "doing": None, "forecast": None, "adapter": event.adapter or state.adapter, "log": log}


_FOLDS: Mapping[str, Callable[[RunState, Any, float], Changes]] = {
    ev.Started.type: _started,
    ev.Phase.type: _phase,
    ev.Prepared.type: _prepared,
    ev.Planned.type: _planned,
    ev.Stepped.type: _stepped,
    ev.Evaluated.type: _evaluated,
    ev.Saved.type: _saved,
    ev.MarkedHealthy.type: _marked_healthy,
    ev.Resumed.type: _resumed,
    ev.RolledBack.type: _rolled_back,
    ev.Device.type: _device,
    ev.Forecast.type: _forecast,
    ev.Finding.type: _finding,
    ev.Command.type: _command,
    ev.Finished.type: _finished,
}
