"""The search behind the planner: layers recomputed, rows at once and chunk of the loss, for one base and optimizer.

Time is arithmetic and quickly known; memory takes an estimate, and a wizard asks at every key. So speeds say where
to look, and memory is asked for only where it can decide.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from qlora_tui.engine import onebyte
from qlora_tui.engine.budget import Budget, estimate
from qlora_tui.engine.fused import unpacked_because
from qlora_tui.engine.machine import Machine, find_card
from qlora_tui.engine.measured import Correction, Speed
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.padding import padded_share, row_of_largest
from qlora_tui.engine.sizes import LOGITS_PER_CHUNK, checkpointed_layers, compute_type, eight_bit, element_bytes
from qlora_tui.engine.spec import RunConfig, rows_at_once, rows_per_step
from qlora_tui.engine.steptime import MicroBatch, micro_batch, optimizer_seconds, table_speed
from qlora_tui.engine.units import percent

FEW_LAYERS = 4
"""Recomputing more layers than this saves more memory than the one being recomputed takes."""

_EQUAL = 0.01  # speeds in the same percent count as equal, and the leaner choice is taken
_CHUNK_SHARE, _LEAST_CHUNK, _MOST_CHUNK = 4, 64, 1 << 20
_MOST_ROWS = 4096  # the key's own bound
_APART = 1.3
_CPU_TOKENS, _CPU_ROWS = 2048, 8
_STAND_IN = "RTX 4090"  # ranks the choices for a card that nobody knows; no figure of it is told
_LOOKS = 4
_PADDING_PAYS = 0.02  # of a batch, from where rows are laid end to end; below it both ways take as long


class Asked(NamedTuple):
    """The question: a run on a machine, with what is known of its rows and of the machine; `bucket` are lengths as `padding` has them.

    `most` are the longest rows of a step, longest first; rows that lie end to end need the memory of their sum.
    """

    model: ModelSpec
    run: RunConfig
    machine: Machine
    longest: int | None
    mean: float
    speed: Speed | None
    correction: Correction | None
    bucket: tuple[int, ...] = ()
    most: tuple[int, ...] = ()


class Choice(NamedTuple):
    """One point of the search: rows at once, layers recomputed, tokens of the loss at once, and whether inputs of layers wait in RAM."""

    rows: int
    recomputed: int
    chunk: int
    away: bool = False


class Search:
    """All choices of layers, rows and chunk with one method and optimizer, looked at as seldom as possible."""

    def __init__(self, asked: Asked, method: str, optim: str) -> None:
        run, model, machine = asked.run, asked.model, asked.machine
        dtype = compute_type(run, machine)
        self.asked = asked
        self.base = dataclasses.replace(run, method=method, optim=optim, dtype=dtype)
        self.layers = model.num_hidden_layers
        self.layers_open = run.gradient_checkpointing == "auto"
        self.rows = _rows(run, machine)
        self.chunks = _chunks(model, run, machine)
        self.speed = asked.speed or _stand_in()
        self.base = dataclasses.replace(self.base, grad_matmul=self._fastest_gradients())
        self._update = optimizer_seconds(model, self.base, self.speed) / (rows_per_step(run) * asked.mean)
        self._budgets: dict[Choice, Budget] = {}
        self._batches: dict[tuple[int, int, bool], MicroBatch] = {}

    def _fastest_gradients(self) -> str:
        """Return what gradients on an 8-bit base are best multiplied in: the fastest of what was measured here and what is usual."""
        run, model, machine = self.base, self.asked.model, self.asked.machine
        if run.grad_matmul != "auto" or not eight_bit(model, run):
            return run.grad_matmul
        shares = {"fp8": self.speed.fp8_share, "int8": self.speed.int8_share}
        timed = [kind for kind in machine.narrow if shares[kind]]

        def seconds(kind: str) -> float:
            tried = dataclasses.replace(run, grad_matmul=kind)
            return micro_batch(model, tried, machine, self.speed, self.rows[0], self.asked.mean).device_seconds

        return min(dict.fromkeys((onebyte.usual(machine), *timed, "16bit")), key=seconds)

    def config(self, choice: Choice) -> RunConfig:
        """Return the run with a choice made; what was fixed stays as it was written."""
        changes: dict[str, Any] = {"loss_chunk_size": choice.chunk}
        if self.asked.run.offload_checkpoints == "auto":
            changes["offload_checkpoints"] = "on" if choice.away else "off"
        if self.asked.run.cuda_graphs == "auto":
            changes["cuda_graphs"] = "on" if self.replayed(choice) else "off"
        if self.asked.run.packing == "auto":
            changes["packing"] = "off" if self.why_padded(choice) else "on"
        if self.layers_open:
            changes["gradient_checkpointing"] = {0: "false", self.layers: "true"}.get(choice.recomputed, str(choice.recomputed))
        if self.asked.run.per_device_train_batch_size == 0:
            changes["per_device_train_batch_size"] = choice.rows
            changes["gradient_accumulation_steps"] = rows_per_step(self.asked.run) // choice.rows
        return dataclasses.replace(self.base, **changes)

    def budget(self, choice: Choice) -> Budget:
        """Return what a choice needs; estimated once."""
        if choice not in self._budgets:
            asked, run = self.asked, self.config(choice)
            longest = asked.longest
            if longest is not None and asked.most and run.packing == "on":
                longest = min(longest, row_of_largest(asked.most, choice.rows))
            self._budgets[choice] = estimate(asked.model, run, asked.machine, longest=longest, correction=asked.correction)
        return self._budgets[choice]

    def need(self, choice: Choice) -> int:
        """Return the bytes that must be free for a choice to be safe: the estimate and its margin."""
        budget = self.budget(choice)
        return budget.total_bytes + budget.margin_bytes

    def roomy(self, choice: Choice) -> bool:
        """Say whether a choice fits even if the estimate is too low by its margin."""
        return self.need(choice) <= self.budget(choice).machine.free_bytes

    def seconds(self, choice: Choice) -> float:
        """Return the seconds of one token, by the formula alone: real steps were measured for few choices, and favour none."""
        return self._pieces(choice).seconds(choice.recomputed) / (choice.rows * self.asked.mean) + self._update

    def replayed(self, choice: Choice) -> bool:
        """Say whether a choice's micro-batches are recorded and replayed as CUDA graphs."""
        return self._pieces(choice).replayed(choice.recomputed)

    def why_padded(self, choice: Choice) -> str:
        """Return why rows of a batch are padded and not laid end to end; an empty text where they are not."""
        asked = self.asked
        fuses = asked.machine.fuses and element_bytes(asked.run, asked.machine) == 2
        if reason := unpacked_because(asked.model, self.base, fuses):
            return reason
        if choice.rows == 1:
            return "rows go one at a time"
        if not asked.bucket:
            return "lengths of the rows are not known"
        share = self.padded(choice)
        return f"padding is {percent(share)} of a batch" if share < _PADDING_PAYS else ""

    def padded(self, choice: Choice) -> float:
        """Return which share of a padded batch would be padding."""
        return padded_share(self.asked.bucket, choice.rows)

    def rank(self, choice: Choice) -> int:
        """Return which percent of speed a choice falls into; smaller is faster."""
        return math.floor(math.log(self.seconds(choice)) / math.log1p(_EQUAL))

    def key(self, choice: Choice) -> tuple[int, int, float]:
        """Return what choices are compared by: speed to a percent, then memory."""
        return self.rank(choice), self.need(choice), self.seconds(choice)

    def leanest(self) -> Choice:
        """Return the choice that needs least: one row, the smallest chunk, and as a rule all layers recomputed."""
        return min((Choice(self.rows[0], number, self.chunks[-1]) for number in self.ends()), key=self.need)

    def leanest_away(self) -> Choice | None:
        """Return the leanest choice with inputs of layers in RAM; None where that is not open, saves nothing, or RAM is short."""
        run, most = self.asked.run, self.ends()[0]
        if run.offload_checkpoints != "auto" or self.asked.machine.kind != "cuda" or most < 2:
            return None
        away = Choice(self.rows[0], most, self.chunks[-1], True)
        return away if self.need(away) < self.need(self.leanest()) and self.budget(away).fits_host else None

    def find(self, limit: float = math.inf) -> Choice | None:
        """Return the fastest roomy choice whose rank is at most `limit`; None if there is none.

        The small chunk first: where the usual one is not faster by a percent, it only takes memory.
        """
        best: Choice | None = None
        fitting = [rows for rows in self.rows if rows <= self._most_rows()]
        for chunk in reversed(self.chunks):
            for rows in reversed(fitting):
                found = self._fastest(rows, chunk, limit)
                if found is not None and (best is None or self.key(found) < self.key(best)):
                    best, limit = found, self.rank(found)
            limit -= 1
        usual = best and best._replace(chunk=self.chunks[0])
        return usual if best and usual and self.need(usual) <= self.need(best) else best

    def ends(self) -> tuple[int, ...]:
        """Return the most and the fewest layers that may be recomputed, or the one number that was fixed."""
        return (self.layers, 0) if self.layers_open else (checkpointed_layers(self.asked.model, self.asked.run),)

    def _pieces(self, choice: Choice) -> MicroBatch:
        pieces = self._batches.get((choice.rows, choice.chunk, choice.away))
        if pieces is None:
            run = dataclasses.replace(self.base, loss_chunk_size=choice.chunk)
            if choice.away:
                run = dataclasses.replace(run, offload_checkpoints="on")
            pieces = micro_batch(self.asked.model, run, self.asked.machine, self.speed, choice.rows, self.asked.mean)
            self._batches[choice.rows, choice.chunk, choice.away] = pieces
        return pieces

    def _most_rows(self) -> int:
        """Return the most rows at once that fit at all; 0 if not even the fewest do."""
        low, high, leanest = 0, len(self.rows), self.leanest()
        if not self.roomy(leanest):
            return 0
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.roomy(leanest._replace(rows=self.rows[middle])) else (low, middle)
        return self.rows[low - 1] if low else 0

    def _fastest(self, rows: int, chunk: int, limit: float) -> Choice | None:
        """Return the best roomy choice of so many rows: the fastest percent, and the leanest in it.

        More recomputed layers take more time and, from one on, less memory, so both ends can be searched for. None
        recomputed stands apart: it needs no room in which a layer is recomputed, which is less than a few layers keep.
        """
        least = Choice(rows, self.ends()[-1], chunk)
        if self.rank(least) > limit:
            return None
        if not self.layers_open:
            return least if self.roomy(least) else None
        slowest = self._slowest(least, limit)
        if slowest.recomputed > FEW_LAYERS and not self.roomy(slowest):
            return None
        first = least
        if not self.roomy(least):
            if slowest.recomputed == 0 or not self.roomy(slowest):
                return None
            first = self._first_roomy(least, slowest)
        last = self._slowest(first, self.rank(first))
        return min((choice for choice in {first, last} if self.roomy(choice)), key=self.key)

    def _first_roomy(self, least: Choice, slowest: Choice) -> Choice:
        """Return the fewest recomputed layers that fit: nearly a straight line, so it is met in a few looks."""
        low, high, free = 0, slowest.recomputed, self.budget(least).machine.free_bytes
        looks = 0
        while high - low > 1:
            above, below = self.need(least._replace(recomputed=low)), self.need(least._replace(recomputed=high))
            share = (above - free) / (above - below) if looks < _LOOKS and above > below else 0.5
            middle = min(max(low + math.ceil(share * (high - low)), low + 1), high - 1)
            low, high = (low, middle) if self.roomy(least._replace(recomputed=middle)) else (middle, high)
            looks += 1
        return least._replace(recomputed=high)

    def _slowest(self, choice: Choice, limit: float) -> Choice:
        """Return `choice` with as many recomputed layers as the rank `limit` allows."""
        low, high = choice.recomputed, self.layers
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.rank(choice._replace(recomputed=middle)) <= limit else (low, middle - 1)
        return choice._replace(recomputed=low)


def _stand_in() -> Speed:
    """Return a common card's speed, by which the choices for an unknown card are ranked."""
    speed = table_speed(find_card(_STAND_IN))
    assert speed is not None
    return speed


def _rows(run: RunConfig, machine: Machine) -> tuple[int, ...]:
    """Return the rows at once to choose from, fewest first; all give the same steps."""
    if run.per_device_train_batch_size:
        return (rows_at_once(run),)
    each_step = rows_per_step(run)
    small = [rows for rows in range(1, math.isqrt(each_step) + 1) if each_step % rows == 0]
    divisors = [rows for rows in sorted({*small, *(each_step // rows for rows in small)}) if rows <= _MOST_ROWS]
    if machine.kind == "cuda":
        return _thinned(divisors)
    return (max(rows for rows in divisors if rows == 1 or rows <= min(_CPU_ROWS, _CPU_TOKENS // run.max_length)),)


def _thinned(divisors: list[int]) -> tuple[int, ...]:
    """Return some of `divisors`, each clearly more than the one before: 17 or 18 rows at once make no difference."""
    kept = divisors[:1]
    for rows in divisors:
        if rows >= kept[-1] * _APART:
            kept.append(rows)
    return tuple(kept)


def _chunks(model: ModelSpec, run: RunConfig, machine: Machine) -> tuple[int, ...]:
    """Return the chunks of the loss to choose from, the usual one first; a smaller one saves memory and costs launches."""
    if run.loss_chunk_size:
        return (run.loss_chunk_size,)
    usual = min(max(1, LOGITS_PER_CHUNK // model.vocab_size), _MOST_CHUNK)
    small = max(usual // _CHUNK_SHARE, _LEAST_CHUNK)
    return (usual, small) if machine.kind == "cuda" and small < usual else (usual,)
