"""Everything the run screen shows, folded from events and from nothing else.

`fold` is pure and fast, so a running run, a run in another process and a finished one are shown by the same
code, and a replay of a file gives the same screen. Histories are bounded; full resolution stays in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from qlora_tui.engine import events as ev
from qlora_tui.engine.text import one_line
from qlora_tui.tui import words
from qlora_tui.tui.runstate import (
    ANSWERS,
    EVALS,
    FINDINGS,
    LOG_LINES,
    MARKS,
    MOMENTS,
    READINGS,
    TEXTS,
    Doing,
    Kind,
    Line,
    Mark,
    Moment,
    MomentKind,
    Reading,
    RunState,
)
from qlora_tui.tui.scoretext import probe_line

__all__ = ["LOG_LINES", "Doing", "Line", "Mark", "Moment", "Reading", "RunState", "fold", "fold_all", "phase_words"]

Changes = dict[str, Any]
_TEXT_LIMIT = 4000


def fold(state: RunState, record: ev.Record) -> RunState:
    """Return the state after `record`; an event of a kind that is not shown changes only the clock."""
    if record.seq <= state.seq:
        return state
    handler = _FOLDS.get(record.event.type)
    changes = handler(state, record.event, record.t) if handler else {}
    return replace(state, seq=record.seq, t=record.t, attempt=record.attempt, **changes)


def fold_all(records: Iterable[ev.Record], state: RunState | None = None) -> RunState:
    """Fold many records, oldest first, as `fold` one by one would.

    The changes go into a copy that nobody else holds yet: a new value for each of a million records costs more than
    reading them.
    """
    current = replace(state) if state else RunState()
    put = object.__setattr__
    for record in records:
        if record.seq <= current.seq:
            continue
        handler = _FOLDS.get(record.event.type)
        changes = handler(current, record.event, record.t) if handler else {}
        for name, value in changes.items():
            put(current, name, value)
        put(current, "seq", record.seq)
        put(current, "t", record.t)
        put(current, "attempt", record.attempt)
    return current


def spent(state: RunState, t: float) -> float:
    """Return the seconds that the run had worked at `t`, without the time between two attempts."""
    return state.spent_before + max(0.0, t - state.started_at) if state.started_at else state.spent_before


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
        "spent_before": spent(state, state.t),
        "finished": None,
        "answer": None,
        "paused_at": 0.0,
        "asked_to_pause": False,
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
    "sample": "write samples",
    "export": "export",
}


def phase_words(name: str, note: str = "") -> str:
    """Return what a phase does, in words.

    Loading comes twice, the libraries first and then the model, so its short note is a part of its name.

    >>> phase_words("eval"), phase_words("load", "the libraries for training"), phase_words("load")
    ('measure held-out rows', 'load the libraries for training', 'load the model')
    """
    if name == "eval" and note:  # other rows than those held out
        return f"measure {one_line(note, limit=60)}"
    if name == "load" and note.startswith("the "):
        return f"load {one_line(note, limit=40)}"
    return _PHASE_WORDS.get(name, one_line(name, limit=40))


def _phase(state: RunState, event: ev.Phase, t: float) -> Changes:
    return _phase_told(state, event, t) | (_paused(state, event, t) if event.name == "pause" else {})


def _paused(state: RunState, event: ev.Phase, t: float) -> Changes:
    """Remember since when the run rests: it may save meanwhile, and one phase is all that `doing` holds."""
    if event.state == "end":
        rested = t - state.paused_at if state.paused_at else 0.0  # what was forecast before it still lies ahead
        return {"paused_at": 0.0, "asked_to_pause": False, "forecast_at": state.forecast_at + rested}
    return {"paused_at": state.paused_at or t}


def _phase_told(state: RunState, event: ev.Phase, t: float) -> Changes:
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
    paused = event.state == "begin" and event.name == "pause"
    told = event.state == "begin" and (bool(event.note) or paused)
    what = phase_words(event.name, event.note)
    text = what if event.note in what else f"{what}: {event.note}"
    moments = _marked(state, state.step, "pause") if paused else state.moments
    return {"doing": doing, "moments": moments, "log": _say(state, t, text) if told else state.log}


def _marked(state: RunState, step: int, kind: MomentKind) -> tuple[Moment, ...]:
    return (*state.moments[-(MOMENTS - 1) :], Moment(step, kind))


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
        "history": state.history.add(event.step, event.loss, event.lr, event.grad_norm, event.tokens, spent(state, t)),
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
        evals = (*(evals if len(evals) < EVALS else evals[::2]), (event.step, event.loss))
    base = state.base_loss if state.base_loss is not None else event.loss if event.step == 0 else None
    text = f"held-out loss at step {event.step}: {words.number(event.loss)} on {event.rows:,} rows"
    text += f": {one_line(event.verdict)}" if event.manner else ""
    log = _say(state, t, text, "good" if final and not event.manner else "info")
    return {"evals": evals, "base_loss": base, "scorecard": event if final else state.scorecard, "log": log}


def _probed(state: RunState, event: ev.Probed, t: float) -> Changes:
    return {"probes": {**state.probes, event.name: event}, "log": _say(state, t, probe_line(event))}


def _sampled(state: RunState, event: ev.Sampled, t: float) -> Changes:
    kept = ev.Sampled(event.step, event.prompt[:_TEXT_LIMIT], event.text[:_TEXT_LIMIT])
    text = f"{one_line(event.prompt, limit=60)} → {one_line(event.text, limit=300) or '(nothing)'}"
    log = _say(state, t, f"sample after step {event.step}: {text}")
    return {"samples": (*state.samples[-(TEXTS - 1) :], kept), "log": log}


def _saved(state: RunState, event: ev.Saved, t: float) -> Changes:
    adapter = event.path if event.kind == "adapter" else state.adapter
    name = "adapter" if event.kind == "adapter" else f"{event.kind} of step {event.step}"
    name = name.replace("diagnostic", "diagnostic checkpoint")
    log = _say(state, t, f"{name} saved and verified, {words.size(event.bytes)}", "good")
    if event.kind != "checkpoint":
        return {"adapter": adapter, "log": log}
    marks = (*state.marks[-(MARKS - 1) :], Mark(event.step, state.history, event.path))
    return {"saved": event, "saved_at": t, "marks": marks, "moments": _marked(state, event.step, "saved"), "log": log}


def _marked_healthy(state: RunState, event: ev.MarkedHealthy, t: float) -> Changes:
    text = f"checkpoint of step {event.step} is healthy: the steps after it were clean"
    return {"healthy": event.step, "log": _say(state, t, text, "good")}


def _rolled_back(state: RunState, event: ev.RolledBack, t: float) -> Changes:
    """Cut off what came after the checkpoint, but keep what the watch said: it is the reason."""
    text = f"back to step {event.to_step}, with {event.rate_factor:g} times the learning rate: {event.why}"
    cut = _resumed(state, ev.Resumed(event.to_step), t)
    moments = (*cut["moments"][:-1], Moment(event.to_step, "back"))
    return cut | {"findings": state.findings, "moments": moments, "log": _say(state, t, text, "bad")}


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
        "probes": {},
        "forecast": None,
        "marks": marks,
        "resumes": (*state.resumes[-(MARKS - 1) :], at),
        "moments": (*[moment for moment in state.moments if moment.step <= at][-(MOMENTS - 1) :], Moment(at, "resume")),
        "log": _say(state, t, f"goes on after step {at}"),
    }


def _device(state: RunState, event: ev.Device, t: float) -> Changes:
    ours = event.memory_ours_bytes
    reading = Reading(
        t, _finite(event.utilization), _finite(event.power_watts), _finite(event.temperature_c), ours, state.speed, state.data_share
    )
    readings = (*state.readings[-(READINGS - 1) :], reading)
    return {"device": event, "readings": readings, "peak_bytes": max(state.peak_bytes, ours or 0)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _forecast(state: RunState, event: ev.Forecast, t: float) -> Changes:
    return {"forecast": event, "forecast_at": t}


def _finding(state: RunState, event: ev.Finding, t: float) -> Changes:
    kind: Kind = "info" if event.severity == "info" else "warn" if event.severity == "warn" else "bad"
    log = _say(state, t, f"step {event.step}: {event.message}", kind)
    return {"findings": (*state.findings[-(FINDINGS - 1) :], event), "log": log}


def _command(state: RunState, event: ev.Command, t: float) -> Changes:
    text = f"{event.name}: {'will be done' if event.obeyed else 'refused'}" + (f", {event.why}" if event.why else "")
    asked = event.name == "pause" if event.obeyed and event.name in ("pause", "resume") else state.asked_to_pause
    changed = event.name == "set" and event.obeyed
    moments = _marked(state, event.step if event.step is not None else state.step, "rate") if changed else state.moments
    answers = (*state.answers[-(ANSWERS - 1) :], event)
    return {
        "answer": event,
        "answers": answers,
        "asked_to_pause": asked,
        "moments": moments,
        "log": _say(state, t, text, "info" if event.obeyed else "warn"),
    }


def _finished(state: RunState, event: ev.Finished, t: float) -> Changes:
    kind: Kind = "good" if event.outcome == "done" else "warn" if event.outcome in ("stopped", "aborted") else "bad"
    outcome = event.outcome.replace("_", " ")
    log = _say(state, t, event.reason if event.reason.startswith(outcome) else f"{outcome}: {event.reason}", kind)
    return {"finished": event, "doing": None, "paused_at": 0.0, "forecast": None, "adapter": event.adapter or state.adapter, "log": log}


_FOLDS: Mapping[str, Callable[[RunState, Any, float], Changes]] = {
    ev.Started.type: _started,
    ev.Phase.type: _phase,
    ev.Prepared.type: _prepared,
    ev.Planned.type: _planned,
    ev.Stepped.type: _stepped,
    ev.Evaluated.type: _evaluated,
    ev.Probed.type: _probed,
    ev.Sampled.type: _sampled,
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
