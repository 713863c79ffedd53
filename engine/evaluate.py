"""The hold-out measured: the loss of every row, and base against tuned on the same rows.

Loss is the sum of token losses over the number of supervised tokens; the comparison rests on row means,
paired by row, because rows differ far more from each other than a model changes on one of them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_tui.engine.data import TokenRow, lengths_of
from qlora_tui.engine.fast.loss import token_losses
from qlora_tui.engine.load import Loaded
from qlora_tui.engine.places import replace_file
from qlora_tui.engine.score import student_t, verdict

Beside = Callable[[], AbstractContextManager[None]]
"""Makes the context in which a batch is measured, such as one that lends it memory."""

WORST = 5
"""So many rows that got worse are told with their text."""


@dataclass(frozen=True, slots=True)
class RowLoss:
    """Summed negative log-likelihood of one row's supervised tokens, in nats."""

    row: int
    nll: float
    tokens: int

    @property
    def mean(self) -> float:
        """Return nats a supervised token."""
        return self.nll / self.tokens


@dataclass(frozen=True, slots=True)
class Scorecard:
    """Base against tuned. `drop` is the mean over rows of base minus tuned; positive is better."""

    base_loss: float
    loss: float
    drop: float
    interval: tuple[float, float]
    better_share: float
    verdict: str


def measure(
    loaded: Loaded, rows: Sequence[TokenRow], batch: int, poll: Callable[[], None], *, chunk: int = 0, beside: Beside = nullcontext
) -> Generator[int, None, list[RowLoss]]:
    """Measure `rows`, yielding how many are done; returns one loss a row, in the order of `rows`.

    Rows go through sorted by length so that little is padded; the result does not depend on `batch` beyond
    rounding. The caller has put the model into eval mode. `poll` is called between batches and may raise; `chunk` is
    the tokens whose logits are held at once, as in `fast.loss.token_losses`. Each batch is measured inside `beside()`.
    """
    order = sorted(range(len(rows)), key=lengths_of(rows).__getitem__)
    losses: dict[int, RowLoss] = {}
    for start in range(0, len(order), batch):
        poll()
        chosen = order[start : start + batch]
        with beside():
            measured = _measure_batch(loaded, [rows[index] for index in chosen], chunk)
        losses.update(zip(chosen, measured, strict=True))
        yield len(losses)
    return [losses[index] for index in range(len(rows))]


@torch.no_grad()
def _measure_batch(loaded: Loaded, rows: list[TokenRow], chunk: int) -> list[RowLoss]:
    batch = loaded.batch(rows)
    hidden_BTH = loaded.hidden(batch.input_ids_BT, batch.blocks)
    hidden_NH = hidden_BTH.view(-1, hidden_BTH.shape[-1])[batch.positions_N]
    losses_N = token_losses(hidden_NH, loaded.head, batch.labels_N, chunk).double()
    parts = losses_N.split(batch.supervised)
    return [RowLoss(row.row, float(part.sum()), len(part)) for row, part in zip(rows, parts, strict=True)]


def mean_loss(losses: Sequence[RowLoss]) -> float:
    """Return nats a supervised token over all rows."""
    return sum(loss.nll for loss in losses) / sum(loss.tokens for loss in losses)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; infinite for fewer than two values, or no numbers: they say nothing of spread."""
    known = len(values) > 1 and all(map(math.isfinite, values))  # `stdev` ends in an AttributeError at others
    return statistics.stdev(values) / math.sqrt(len(values)) if known else math.inf


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the mean of `values` and its 95 % interval by Student's t, endless for a single one."""
    mean = statistics.fmean(values)
    reach = student_t(len(values) - 1) * standard_error(values) if len(values) > 1 else math.inf
    return mean, (mean - reach, mean + reach)


def compare(base: Sequence[RowLoss], tuned: Sequence[RowLoss]) -> Scorecard:
    """Return the scorecard of two measurements of the same rows.

    Raises:
        ValueError: the rows are not the same, or there are none.
    """
    if not base or [loss.row for loss in base] != [loss.row for loss in tuned]:
        raise ValueError("base and tuned were not measured on the same rows")
    drops = [before.mean - after.mean for before, after in zip(base, tuned, strict=True)]
    drop, interval = mean_interval(drops)
    better = sum(value > 0 for value in drops) / len(drops)
    return Scorecard(mean_loss(base), mean_loss(tuned), drop, interval, better, verdict(drop, interval))


def regressions(base: Sequence[RowLoss], tuned: Sequence[RowLoss], most: int = WORST) -> list[tuple[RowLoss, RowLoss]]:
    """Return base and tuned loss of the rows that got worse, the worst first, at most `most` of them."""
    lost = [(before, after) for before, after in zip(base, tuned, strict=True) if after.mean > before.mean]
    return sorted(lost, key=lambda pair: (pair[0].mean - pair[1].mean, pair[0].row))[:most]


def write_rows(path: Path, losses: Sequence[RowLoss]) -> None:
    """Write one JSON line a row, replacing the file whole."""
    lines = [json.dumps({"row": loss.row, "nll": loss.nll, "tokens": loss.tokens}) for loss in losses]
    replace_file(path, "\n".join(lines) + "\n")


def read_rows(path: Path) -> list[RowLoss]:
    """Read what `write_rows` wrote."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [RowLoss(int(row["row"]), float(row["nll"]), int(row["tokens"])) for row in rows]
