"""How long a run takes: a figure from the card's data sheet before anything is known, measured steps once it runs.

Before the first step the figure is an estimate with its range, and says what it rests on: the data sheet, pieces
measured on this card, or real steps of this very kind. After a few steps only what was measured counts.
Everything here is arithmetic on numbers given.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from qlora_tui.engine import measured
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.measured import Speed, StepTime
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.pace import Triple
from qlora_tui.engine.padding import bucket, padded_share, spread
from qlora_tui.engine.sizes import adapter_params, checkpointed_layers, compute_type, eight_bit, weight_bytes
from qlora_tui.engine.spec import RunConfig, offloads, rows_at_once, rows_per_step
from qlora_tui.engine.steptime import micro_batch, micro_batches, optimizer_seconds, table_speed
from qlora_tui.engine.timetable import EVALS, LAST_WORDS, SAVES, cadence, measurements, saves

_CPU_RANGE = (0.5, 2.0)
_CARD_RANGE = (0.5, 1.5)  # a fast desktop launches kernels in less than half of the time that is assumed
_PIECES_RANGE = (0.8, 1.3)
_KIN_RANGE = (0.8, 1.25)  # steps measured with another number of recomputed layers, rows at once or much other lengths; one measurement
# with `_KIN_RANGE` it holds the sixteen runs of tests/bench/results/2026-11-27-forecast.md, of which two were 16 % off
_STEPS_RANGE = (0.85, 1.15)
_NEAR = 1.5  # a step of so many times as many tokens, or as few, is near enough to be judged by
_LENGTHS_USED = 16
_RECORDED = 18  # shapes of batches in a run that records them: twelve lengths, some with few rows or few trained tokens
_RECORDING_PASSES = 1.6  # of starting a batch's kernels: recorded, made ready, taken to the card; from four runs on an H100, 2026-11-27
_AROUND_RANGE = (0.5, 2.0)  # of loading and saving where no run has measured them
_START_SECONDS, _LOADED_BYTES = 12.0, 1e9  # of libraries and the device until weights come, and of weights a second from a warm disk
_SAVE_SECONDS, _SAVED_BYTES, _STATE_BYTES = 0.3, 2e8, 12  # of a checkpoint's files, bytes a second, and bytes of an adapter weight in it


@dataclass(frozen=True, slots=True)
class Before:
    """Seconds of one optimizer step, of the whole run and of an epoch, each as (low, mid, high), and what they rest on.

    The whole is `load_seconds` until the first measurement, the steps, and `beside_seconds` of measurements and checkpoints.
    """

    step_seconds: Triple
    total_seconds: Triple
    basis: str
    epoch_seconds: Triple | None = None
    load_seconds: Triple = (0.0, 0.0, 0.0)
    beside_seconds: Triple = (0.0, 0.0, 0.0)

    def to_json(self) -> dict[str, object]:
        """Return the promised keys of `budget --json`'s `time`."""
        found: dict[str, object] = {"step_seconds": list(self.step_seconds), "total_seconds": list(self.total_seconds)}
        if self.epoch_seconds is not None:
            found["epoch_seconds"] = list(self.epoch_seconds)
        return found | {"load_seconds": list(self.load_seconds), "beside_seconds": list(self.beside_seconds), "basis": self.basis}


class Work(NamedTuple):
    """What a run has to go through: real tokens of its rows in an epoch, optimizer steps, tokens measured each time, and rows.

    `lengths` are tokens of the rows looked at, where they are known: long rows cost more a token than short ones.
    """

    tokens_per_epoch: int
    steps: int
    steps_per_epoch: int = 0
    holdout_tokens: int = 0
    lengths: Sequence[int] = ()
    rows: int = 0
    held: int = 0


def before_work(model: ModelSpec, run: RunConfig, machine: Machine, work: Work) -> Before | None:
    """Return `before` for `work`."""
    return before(
        model,
        run,
        machine,
        tokens_per_epoch=work.tokens_per_epoch,
        steps=work.steps,
        steps_per_epoch=work.steps_per_epoch,
        holdout_tokens=work.holdout_tokens,
        lengths=work.lengths,
    )


def before(
    model: ModelSpec,
    run: RunConfig,
    machine: Machine,
    *,
    tokens_per_epoch: int,
    steps: int,
    steps_per_epoch: int = 0,
    holdout_tokens: int = 0,
    lengths: Sequence[int] = (),
) -> Before | None:
    """Estimate the time of a run that has not started; None without tokens or for a card that is not in the table.

    Args:
        model: the base's shape.
        run: the settings.
        machine: the device.
        tokens_per_epoch: real tokens of the training rows.
        steps: optimizer steps of the whole run.
        steps_per_epoch: tells how many tokens a step holds; 0: from `num_train_epochs`.
        holdout_tokens: real tokens that each measurement of the hold-out reads.
        lengths: tokens of each row looked at, where they are known: long rows cost more a token than short ones.
    """
    if tokens_per_epoch <= 0 or steps <= 0:
        return None
    tokens = _tokens_of_a_step(run, tokens_per_epoch, steps, steps_per_epoch)
    pace = _pace(model, run, machine, min(tokens / rows_per_step(run), run.max_length), lengths)
    if pace is None:
        return None
    step = pace.seconds_per_token * tokens
    low, high = pace.range
    load, beside = _around(model, run, machine, pace, (steps, holdout_tokens))
    rows = min(tokens / rows_per_step(run), run.max_length)
    recording = min(_RECORDED, steps * micro_batches(run, rows_at_once(run))) * recording_seconds(model, run, machine, rows)
    beside = _sum(beside, (0.5 * recording, recording, 2 * recording))
    cap = run.max_time or math.inf
    training = (min(step * steps * low, cap), min(step * steps, cap), min(step * steps * high, cap))
    epoch = tokens_per_epoch * pace.seconds_per_token
    return Before(
        (step * low, step, step * high),
        _sum(load, training, beside),
        f"estimate from {pace.basis}; measured steps replace it",
        (epoch * low, epoch, epoch * high),
        load,
        beside,
    )


def recording_seconds(model: ModelSpec, run: RunConfig, machine: Machine, tokens: float) -> float:
    """Return the seconds of recording one micro-batch of rows of `tokens` tokens: somewhat more than starting its kernels one by one."""
    speed = speed_of(machine)
    if speed is None or machine.kind != "cuda" or run.cuda_graphs != "on":
        return 0.0
    plain = dataclasses.replace(run, cuda_graphs="off")
    return _RECORDING_PASSES * micro_batch(model, plain, machine, speed, rows_at_once(run), tokens).seconds(checkpointed_layers(model, run))


def _around(model: ModelSpec, run: RunConfig, machine: Machine, pace: _Pace, counts: tuple[int, int]) -> tuple[Triple, Triple]:
    """Return the seconds of loading, and those of measurements and checkpoints; `counts` are steps and held-out tokens."""
    steps, holdout_tokens = counts
    known, (low, high) = measured.around(machine.name, around_key(model, run)), _AROUND_RANGE
    if known is None:
        size = weight_bytes(model, dataclasses.replace(run, method="lora"), machine)
        load = _START_SECONDS + size / _LOADED_BYTES
        save = _SAVE_SECONDS + adapter_params(model, run) * _STATE_BYTES / _SAVED_BYTES
        each = pace.seconds_per_token * forward_share(model, run)
    else:
        load, save, each, (low, high) = known.load_seconds, known.save_seconds, known.eval_seconds_per_token, _KIN_RANGE
    evals = cadence(run.eval_steps, steps, EVALS)
    least, most = saves(0, steps, cadence(run.save_steps, steps, SAVES), evals if holdout_tokens else steps + 1)
    measuring = (1 + measurements(0, steps, evals)) * holdout_tokens * each
    written = (least + 2) * save * low, (most + 2) * save, (most + 2) * save * high  # one on trial before, the adapter after
    beside = _sum((measuring * min(low, pace.range[0]), measuring, measuring * max(high, pace.range[1])), written, LAST_WORDS)
    return (load * low, load, load * high), beside


def _sum(*parts: Triple) -> Triple:
    low, middle, high = (sum(part[place] for part in parts) for place in range(3))
    return low, middle, high


def around_key(model: ModelSpec, run: RunConfig) -> str:
    """Return what kind of run this is for what lies around its steps: loading goes by model and method, saving by rank."""
    return f"{model.name}, {_method(run)}, rank {run.lora_r}"


def seconds_per_token(model: ModelSpec, run: RunConfig, machine: Machine, *, row_tokens: float | None = None) -> float | None:
    """Return the estimated seconds of one token in training, or None for a card that is not in the table.

    A token's share of the optimizer's update is in it. Rows are `row_tokens` long, or `max_length` where that
    is not known.
    """
    pace = _pace(model, run, machine, row_tokens or run.max_length)
    return None if pace is None else pace.seconds_per_token


def step_seconds(model: ModelSpec, run: RunConfig, machine: Machine, *, row_tokens: float | None = None) -> float | None:
    """Return the estimated seconds of one optimizer step: all its micro-batches and the update; None as above."""
    each = seconds_per_token(model, run, machine, row_tokens=row_tokens)
    return None if each is None else each * rows_per_step(run) * (row_tokens or run.max_length)


def step_key(model: ModelSpec, run: RunConfig) -> str:
    """Return what kind of step this is: steps with equal keys take equally long for as many rows of as many tokens.

    Neither the optimizer nor the rank is part of it: both move a step's time by a few percent only.
    """
    extra = " dora" * run.use_dora + " offloaded" * offloads(run) + " plain" * (run.fused_layers == "off")
    extra += " packed" * (run.packing == "on")
    extra += f" {run.grad_matmul} gradients" if eight_bit(model, run) and run.grad_matmul != "auto" else ""
    kind = f"{model.name}, {_method(run)} {run.dtype} {run.attn_implementation}{extra}"
    return f"{kind}, {checkpointed_layers(model, run)} recomputed"


def speed_of(machine: Machine) -> Speed | None:
    """Return what a device reaches: as measured on it, else as its data sheet lets expect; None for an unknown card.

    A processor's pieces are never taken: its products, memory and host are one and the same.
    """
    pieces = measured.speed(machine.name) if machine.kind == "cuda" else None
    return pieces or table_speed(machine)


class _Pace(NamedTuple):
    seconds_per_token: float
    range: tuple[float, float]
    basis: str


def _pace(model: ModelSpec, run: RunConfig, machine: Machine, tokens: float, lengths: Sequence[int] = ()) -> _Pace | None:
    """Return the seconds of a token by the best there is to rest on."""
    speed = speed_of(machine)
    if speed is None:
        return None
    formula = _formula(model, run, machine, speed, rows_at_once(run), checkpointed_layers(model, run), tokens, lengths)
    factor, found = against_steps(model, run, machine, speed, tokens)
    if found is not None:  # padding is in what was measured
        return _Pace(formula * factor, found, "steps measured on this machine")
    formula /= 1 - _padding(run, lengths)
    if machine.kind == "cuda" and measured.speed(machine.name):
        return _Pace(formula, _PIECES_RANGE, "the speed measured on this machine")
    if machine.kind == "cpu":
        return _Pace(formula, _CPU_RANGE, "a laptop-class figure a core")
    return _Pace(formula, _CARD_RANGE, "the card's data sheet")


def _formula(
    model: ModelSpec,
    run: RunConfig,
    machine: Machine,
    speed: Speed,
    rows: int,
    recomputed: int,
    tokens: float,
    lengths: Sequence[int] = (),
    parts: int = 0,
) -> float:
    """Return the seconds of one token in a step of micro-batches of `rows` rows, each `tokens` or one of `lengths` long.

    Rows of a micro-batch are about equally long, since batches are made of neighbours by length: what they differ by is padding,
    which is not counted here, and which rows that lie end to end do not have. The update is spread over
    `parts` micro-batches; 0: as many as `run` has.
    """
    known = spread([length for length in lengths if length <= run.max_length], _LENGTHS_USED)
    means = [float(length) for length in known] or [tokens]
    batches = [micro_batch(model, run, machine, speed, rows, length).seconds(recomputed) for length in means]
    update = optimizer_seconds(model, run, speed) / (parts or micro_batches(run, rows))
    return (statistics.fmean(batches) + update) / (rows * statistics.fmean(means))


def _padding(run: RunConfig, lengths: Sequence[int]) -> float:
    """Return which share of a step's tokens is padding."""
    if run.packing == "on":
        return 0.0
    return padded_share(bucket([length for length in lengths if length <= run.max_length], rows_per_step(run)), rows_at_once(run))


def against_steps(
    model: ModelSpec, run: RunConfig, machine: Machine, speed: Speed, tokens: float
) -> tuple[float, tuple[float, float] | None]:
    """Return how real steps compare with the formula, and the range that is left; (1, None) where none were measured.

    The ratio is interpolated over the tokens at once and kept constant beyond the measured ends: the formula
    knows how time grows with length, the steps know how fast this machine really is.
    """
    every = measured.all_steps(machine.name)
    if not every:
        return 1.0, None
    concrete = dataclasses.replace(run, dtype=compute_type(run, machine))
    key = step_key(model, concrete)
    kind = key.rpartition(", ")[0]
    same, kin = every.get(key, []), {name: points for name, points in every.items() if name.rpartition(", ")[0] == kind}
    rows, wanted = rows_at_once(run), rows_at_once(run) * tokens
    exact = [point for point in same if point.rows == rows]
    used = {key: exact or same} if same else {name: points for name, points in kin.items() if _recomputed(name) is not None}
    points = [_ratio(model, run, machine, speed, name, point) for name, steps in used.items() for point in steps]
    if not points:
        return 1.0, None
    near = exact and min(max(point.tokens_per_row / tokens, tokens / point.tokens_per_row) for point in exact) <= _NEAR
    return _interpolate(sorted(points), wanted), _STEPS_RANGE if near else _KIN_RANGE


def _ratio(model: ModelSpec, run: RunConfig, machine: Machine, speed: Speed, key: str, point: StepTime) -> tuple[float, float]:
    """Return the tokens at once of a measured step, and its seconds over those of the formula."""
    formula = _formula(model, run, machine, speed, point.rows, _recomputed(key) or 0, point.tokens_per_row, parts=point.parts)
    return point.rows * float(point.tokens_per_row), point.seconds_per_token / formula


def _recomputed(key: str) -> int | None:
    """Return the number of recomputed layers that a step's key names; None where a damaged file holds another text."""
    number = key.rpartition(", ")[2].removesuffix(" recomputed")
    return int(number) if number.isdecimal() else None


def _interpolate(points: Sequence[tuple[float, float]], at: float) -> float:
    """Return the value at `at` of the line through `points`, by the logarithm of their place; flat beyond the ends."""
    for (left, low), (right, high) in pairwise(points):
        if left <= at < right:
            return low + (high - low) * math.log(at / left) / math.log(right / left)
    return points[0][1] if at < points[0][0] else points[-1][1]


def _tokens_of_a_step(run: RunConfig, tokens_per_epoch: int, steps: int, steps_per_epoch: int) -> float:
    if steps_per_epoch:
        return tokens_per_epoch / steps_per_epoch
    if run.max_steps or not run.num_train_epochs:
        return min(rows_per_step(run) * run.max_length, tokens_per_epoch)
    return tokens_per_epoch * run.num_train_epochs / steps


def _method(run: RunConfig) -> str:
    return run.method if run.method in ("lora", "lora-8bit") else "qlora"


def forward_share(model: ModelSpec, run: RunConfig) -> float:
    """Return what a forward pass costs of a training pass."""
    return 1 / (2 + checkpointed_layers(model, run) / model.num_hidden_layers)
