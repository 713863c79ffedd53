"""Which rows meet in a step, and how they become tensors.

The order is a pure function of seed, epoch and row lengths: a resumed run sees the same rows at the same
steps without any saved position but the step number. Only `rows_per_step` matters for the order, so
(4 x 1), (2 x 2) and (1 x 4) see the same rows in the same step.

Rows that lie end to end need no padding: places count from 0 again in each, and attention keeps them apart.

Shapes: B rows, T tokens of the longest row, or of all where they lie end to end (B is 1), N supervised tokens.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_tui.engine.data import TokenRow, lengths_of, numbers_of
from qlora_tui.engine.padding import STEPS_PER_BUCKET


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Where rows lie that go end to end: each is a block that sees only itself. Two are never equal, whatever is in them.

    `places_1T` count from 0 in each row. `bounds` are where rows begin, and the end of the last: one more than rows, in 32 bits.
    No row is longer than `longest`, which a kernel has to know without asking the device.
    """

    places_1T: torch.Tensor
    bounds: torch.Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows on the device, padded on the right, or end to end in one row where there are `blocks`.

    `positions_N` point into the flattened [B*T] hidden states that predict `labels_N`.
    """

    input_ids_BT: torch.Tensor
    positions_N: torch.Tensor
    labels_N: torch.Tensor
    supervised: list[int]
    tokens: int
    blocks: Blocks | None = None


def steps_per_epoch(rows: int, rows_per_step: int) -> int:
    """Return how many optimizer steps see every row once; the last one may be smaller."""
    return -(-rows // rows_per_step)


def epoch_order(lengths: Sequence[int], rows_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the row indices of every step of `epoch`.

    Rows are shuffled, sorted by length within buckets of a few steps, and the steps shuffled again. The one
    smaller step, if any, comes last, so that `step % steps_per_epoch` finds it in every epoch.
    """
    shuffle = random.Random(f"{seed}/{epoch}")
    rows = list(range(len(lengths)))
    shuffle.shuffle(rows)
    size = rows_per_step * STEPS_PER_BUCKET
    steps: list[list[int]] = []
    for start in range(0, len(rows), size):
        bucket = sorted(rows[start : start + size], key=lambda index: (lengths[index], index))
        steps += [bucket[at : at + rows_per_step] for at in range(0, len(bucket), rows_per_step)]
    full = [step for step in steps if len(step) == rows_per_step]
    rest = [step for step in steps if len(step) < rows_per_step]
    shuffle.shuffle(full)
    return full + rest


class Order:
    """Which rows of a data set meet in which step; an epoch's order is kept while it is in use."""

    def __init__(self, rows: Sequence[TokenRow], rows_per_step: int, seed: int) -> None:
        """Take the rows in the order of their source."""
        self.per_epoch = steps_per_epoch(len(rows), rows_per_step)
        self._rows, self._rows_per_step, self._seed = rows, rows_per_step, seed
        self.row_lengths = lengths_of(rows)
        self._epoch, self._steps = -1, list[list[int]]()

    def of(self, step: int) -> list[TokenRow]:
        """Return the rows of `step`, counted from 1 over all epochs."""
        return [self._rows[row] for row in self._of(step)]

    def lengths(self, step: int) -> list[int]:
        """Return the tokens of each row of `step`, without reading them."""
        return [self.row_lengths[row] for row in self._of(step)]

    def epoch(self, step: int) -> list[list[int]]:
        """Return the tokens of each row of every step of the epoch that `step` is in."""
        self._of(step)
        return [[self.row_lengths[row] for row in rows] for rows in self._steps]

    def totals(self, size: int) -> list[int]:
        """Return the tokens of every micro-batch of `size` rows in the first epoch."""
        ordered = [sorted(lengths, reverse=True) for lengths in self.epoch(1)]
        return [sum(step[start : start + size]) for step in ordered for start in range(0, len(step), size)]

    def _of(self, step: int) -> list[int]:
        epoch, index = divmod(step - 1, self.per_epoch)
        if self._epoch != epoch:
            self._epoch, self._steps = epoch, epoch_order(self.row_lengths, self._rows_per_step, self._seed, epoch)
        return self._steps[index]


def longest(rows: Sequence[TokenRow], number: int) -> list[TokenRow]:
    """Return the `number` longest of `rows`, longest first: what the largest batch can hold."""
    lengths, numbers = lengths_of(rows), numbers_of(rows)
    return [rows[place] for place in heapq.nsmallest(number, range(len(rows)), key=lambda place: (-lengths[place], numbers[place]))]


def micro_batches(rows: Sequence[TokenRow], size: int) -> list[list[TokenRow]]:
    """Split the rows of one step into batches of `size`, longest first: a batch that is too big fails at once."""
    ordered = longest(rows, len(rows))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def collate(rows: Sequence[TokenRow], device: torch.device) -> Batch:
    """Pad `rows` on the right with token 0 and find what is supervised.

    Token t is predicted from position t - 1, so a trained token 0 of a row has nothing to be predicted from
    and does not count. Padding is never a target, whatever its id: targets come from positions alone.
    """
    longest = max(len(row.input_ids) for row in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    positions: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for index, row in enumerate(rows):
        ids_BT[index, : len(row.input_ids)] = _ids(row)
        targets = _trained(row)[1:].nonzero().squeeze(1)
        positions.append(targets + index * longest)
        labels.append(ids_BT[index, 1:][targets])
    return Batch(
        _sent(ids_BT, device),
        _sent(torch.cat(positions), device),
        _sent(torch.cat(labels), device),
        [len(part) for part in labels],
        sum(len(row.input_ids) for row in rows),
    )


def pack(rows: Sequence[TokenRow], device: torch.device) -> Batch:
    """Lay `rows` end to end without padding; what is supervised is what `collate` finds, and never a row's first token."""
    lengths = [len(row.input_ids) for row in rows]
    ids_T = torch.cat([_ids(row) for row in rows]).long()
    trained_T = torch.cat([_trained(row) for row in rows])
    blocks = blocks_of(lengths, device)
    firsts = torch.tensor(lengths).cumsum(0)[:-1]
    trained_T[0] = trained_T[firsts] = False
    targets = trained_T.nonzero().squeeze(1)
    return Batch(
        _sent(ids_T[None], device),
        _sent(targets - 1, device),
        _sent(ids_T[targets], device),
        [supervised_tokens(row) for row in rows],
        len(ids_T),
        blocks,
    )


def blocks_of(lengths: Sequence[int], device: torch.device) -> Blocks:
    """Return where rows of `lengths` tokens lie when they go end to end."""
    places_T = torch.cat([torch.arange(length) for length in lengths])
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return Blocks(_sent(places_T[None], device), _sent(bounds, device), max(lengths))


def _ids(row: TokenRow) -> torch.Tensor:
    """Return the row's tokens, in place: a list in between costs more than all else that makes a batch."""
    return torch.frombuffer(row.input_ids, dtype=torch.int32)


def _trained(row: TokenRow) -> torch.Tensor:
    return torch.frombuffer(bytearray(row.trained), dtype=torch.bool)  # torch warns of memory that nobody may write to


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on the device; to a card from pinned memory, so that nobody waits for the batch before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def supervised_tokens(row: TokenRow) -> int:
    """Return how many tokens of `row` are targets."""
    return sum(row.trained[1:])
