"""Logs as the watch reads them: a run of ours, `trainer_state.json` of transformers, or a CSV with one line a step.

They are foreign files: every fault is one sentence with the place, and nothing in them is believed to be a path, a number or
small. What a log does not tell is left out: without a gradient norm the detectors judge by the loss alone.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tui.engine.errors import ConfigError, EngineError
from qlora_tui.engine.events import Evaluated, Planned, Record, Resumed, RolledBack, Started, Stepped
from qlora_tui.engine.journal import EVENTS, read_records
from qlora_tui.engine.places import is_folder, is_here
from qlora_tui.engine.text import one_line
from qlora_tui.engine.watch.replay import Back, Held, Moment
from qlora_tui.engine.watch.rule import UNKNOWN, HeldRow

LARGEST_BYTES = 1 << 30
TRAINER_STATE = "trainer_state.json"
_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "step": ("step", "global_step", "steps", "iteration", "iter"),
    "loss": ("loss", "train_loss", "train/loss", "training_loss"),
    "grad_norm": ("grad_norm", "train/grad_norm", "gradient_norm"),
    "eval_loss": ("eval_loss", "val_loss", "eval/loss", "validation_loss"),
    "learning_rate": ("learning_rate", "lr", "train/learning_rate"),
    "epoch": ("epoch", "train/epoch"),
}
"""Names under which tools write the same thing; the first is ours."""


@dataclass(slots=True)
class Log:
    """A log in memory, and what it says about the run: the config it was made with, empty for another tool's."""

    kind: str
    moments: list[Moment] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    rows_per_step: int = 0
    warmup_steps: int = 0


def read_log(path: Path) -> Log:
    """Read the log at `path`: a run folder, `events.jsonl`, `trainer_state.json` or its folder, or a CSV.

    Raises:
        ConfigError: there is none, or it is not what it seems; the sentence names the place.
    """
    file = _file_in(path)
    try:
        if file.stat().st_size > LARGEST_BYTES:
            raise _fault(file, "it is larger than a gibibyte, which no log of a fine-tuning is")
        log = {".jsonl": _ours, ".json": _trainer, ".csv": _csv}[file.suffix.lower()](file)
    except KeyError:
        raise _fault(file, "its name says no kind of log", "events.jsonl, trainer_state.json or a .csv") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _fault(file, f"it cannot be read: {one_line(error, limit=120)}") from None
    if not any(isinstance(moment, Stepped) for moment in log.moments):
        raise _fault(file, "it holds no step with a loss")
    return log


def _file_in(path: Path) -> Path:
    inside = [path / EVENTS, path / TRAINER_STATE] if is_folder(path) else [path]
    found = next((file for file in inside if is_here(file) and file.is_file()), None)
    if found is None:
        what = f"no {EVENTS} or {TRAINER_STATE} in this folder" if is_folder(path) else "there is no such file"
        raise _fault(path, what, "name a run, events.jsonl, trainer_state.json or a .csv")
    return found


def _ours(file: Path) -> Log:
    records = read_records(file)
    started = next((record.event for record in records if isinstance(record.event, Started)), None)
    config = started.config if started is not None else {}
    planned = next((record.event.choices for record in records if isinstance(record.event, Planned)), {})
    warmup = planned.get("warmup_steps")
    moments = [moment for record in records if (moment := _moment(record, file.parent)) is not None]
    rows = max((len(moment.rows) for moment in moments if isinstance(moment, Stepped)), default=0)
    return Log("a run of qlora-tui", moments, config, rows, warmup if isinstance(warmup, int) else 0)


def _moment(record: Record, folder: Path) -> Moment | None:
    match record.event:
        case Stepped() as step:
            return step
        case Evaluated(manner=False) as found:
            return Held(found, _held_rows(folder, found.path))
        case Resumed(to_step=step) | RolledBack(to_step=step):
            return Back(step)
    return None


def _held_rows(folder: Path, name: str) -> list[HeldRow]:
    """Read the rows of a measurement that lies in the run folder; where it does not, or is broken, the mean has to do."""
    try:
        file = (folder / name).resolve(strict=True)
        if not name or not file.is_relative_to(folder.resolve()) or file.stat().st_size > LARGEST_BYTES:
            return []
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [HeldRow(float(row["nll"]) / float(row["tokens"]), int(row["tokens"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError):
        return []


def _trainer(file: Path) -> Log:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise _fault(file, f"it is no JSON: {error.msg}", line=error.lineno) from None
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise _fault(file, "it has no log_history, a list of what was logged", "the trainer_state.json of transformers has one")
    moments = [moment for number, entry in enumerate(history, 1) for moment in _entry(file, f"entry {number}", _by_name(entry))]
    return Log("trainer_state.json", _in_order(moments))


_LONGEST_NUMBER = 64  # characters; longer ones are damage, and would be read as infinite


def _csv(file: Path) -> Log:
    with file.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle)
        try:
            names = {column: column.strip().lower() for column in reader.fieldnames or () if column is not None}
            if not {"step", "loss"} <= set(_by_name(dict.fromkeys(names.values(), 0))):
                raise _fault(file, "its first line names no step and loss", "step,loss[,grad_norm,eval_loss,learning_rate]", line=1)
            moments: list[Moment] = []
            for line in reader:
                told = _by_name({names[column]: text for column, text in line.items() if column in names and isinstance(text, str)})
                moments += _entry(file, f"line {reader.line_num}", {name: text for name, text in told.items() if text.strip()})
        except csv.Error as error:
            raise _fault(file, f"it is no CSV: {one_line(error)}", line=reader.line_num) from None
    return Log("a CSV", _in_order(moments))


def _by_name(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an entry tells under our names; a null tells nothing."""
    return {ours: entry[name] for ours, names in _COLUMNS.items() for name in reversed(names) if entry.get(name) is not None}


def _entry(file: Path, place: str, entry: Mapping[str, Any]) -> Iterator[Moment]:
    """Yield the step and the measurement that an entry tells, if any."""
    if not entry.keys() & {"loss", "eval_loss"}:
        return
    number = {name: _number(file, place, name, value) for name, value in entry.items()}
    step = number.get("step", math.nan)
    if not (math.isfinite(step) and 0 <= step == int(step) <= 2**53):
        raise _fault(file, f"{place}: its step is no whole number of at least 0")
    if "loss" in number:
        norm = number.get("grad_norm", UNKNOWN)
        finite = math.isfinite(number["loss"]) and math.isfinite(norm)
        rate, epoch = number.get("learning_rate", 0.0), number.get("epoch", 0.0)
        yield Stepped(int(step), 0, epoch, number["loss"], norm, False, not finite, rate, 0, 0, 0.0, 0.0)
    if "eval_loss" in number:
        yield Held(Evaluated(int(step), number["eval_loss"], 0, 0.0))


def _number(file: Path, place: str, name: str, value: Any) -> float:
    try:
        if isinstance(value, bool) or (isinstance(value, str) and len(value) > _LONGEST_NUMBER):
            raise ValueError(value)
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise _fault(file, f"{place}: {name} is {one_line(repr(value), limit=60)}, no number") from None


def _in_order(moments: list[Moment]) -> list[Moment]:
    """Where steps go back, as after a resume, what came after that step is void."""
    ordered: list[Moment] = []
    last = -1
    for moment in moments:
        step = moment.step if isinstance(moment, Stepped) else moment.found.step if isinstance(moment, Held) else last
        if isinstance(moment, Stepped) and step <= last:
            ordered.append(Back(step - 1))
        last = max(step, last) if not isinstance(moment, Stepped) else step
        ordered.append(moment)
    return ordered


def _fault(file: Path, message: str, hint: str = "", *, line: int = 0) -> EngineError:
    return ConfigError(message, hint=hint, where=f"{one_line(file)}{f', line {line}' if line else ''}")
