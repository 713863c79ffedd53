"""The triage: the base scores every answer, and what it knows already is left out before the first step.

Scores depend on the tokens, on the base as it is loaded and on how rows are batched, to the last bit of a sum; all of that is in
the cache's key, so a run finds the same rows with and without it. A resume reads the scores of its first attempt.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from qlora_tui.engine import evaluate, measured
from qlora_tui.engine.data import Tokenized, TokenRows, cache, perplexity
from qlora_tui.engine.errors import DataError
from qlora_tui.engine.evaluate import RowLoss
from qlora_tui.engine.events import Event, Wishes
from qlora_tui.engine.load import Loaded
from qlora_tui.engine.meter import out_of_memory, said
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train.fence import Fence
from qlora_tui.engine.train.holdout import poll_for
from qlora_tui.engine.train.step import Halving

SCORES = "perplexity.jsonl"
"""In the run folder: loss and tokens of every answer that was scored, left out or not."""
_DECIDING = ("method", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "attn_implementation", "loss_chunk_size")


@dataclass(slots=True, kw_only=True)
class Triage:
    """Scores the training rows of a run.

    Attributes:
        run: with everything chosen.
        folder: of the run.
        weights: the folder that the base was loaded from.
        device_name: numbers differ from one device to the next.
        loaded, fence, halving, wishes: as for the hold-out.
        say, progress: journal what a callback has to tell.
    """

    run: RunConfig
    folder: Path
    weights: Path
    device_name: str
    loaded: Loaded
    fence: Fence
    halving: Halving
    wishes: Wishes
    say: Callable[[Event], object]
    progress: Callable[[int, int], None]
    _scored: list[RowLoss] = field(default_factory=list)

    def sift(self, tokenized: Tokenized) -> Tokenized:
        """Return `tokenized` without the rows that the base knows, and keep the scores beside the run.

        Raises:
            DataError: nothing is left to train on.
            Stopped: somebody asked to stop.
            WontFit: not even one row at once fits.
        """
        places = perplexity.long_answers(tokenized.train, self._poll)
        losses = self._losses(tokenized.train.at(places)) if places else []
        judged = perplexity.judge(self.run, len(tokenized.train), places, [loss.mean for loss in losses])
        left = perplexity.without(tokenized, judged, self.run.perplexity_filter)
        if not left.train:
            raise DataError(
                "no row is left to train on: the base knows every answer", hint="lower perplexity_filter or perplexity_drop_most"
            )
        return left

    def _losses(self, rows: TokenRows) -> list[RowLoss]:
        path = self.folder / SCORES
        if known := _read(path, rows):
            return known
        rows_at_once = self.halving.rows
        deciding = [str(getattr(self.run, name)) for name in _DECIDING]  # every name is a field of the config
        about = (self.device_name, str(self.loaded.dtype), rows_at_once, measured.versions(), identity(self.weights))
        key = cache.key_of("perplexity", *deciding, *about, perplexity.digest(rows, self._poll))
        columns = cache.kept(key, lambda ids, mask: self._build(rows, ids, mask), self._poll)
        sums, tokens = columns["nll"].cast("d"), columns["tokens"].cast("q")
        losses = [RowLoss(number, nll, count) for number, nll, count in zip(rows.numbers, sums, tokens, strict=True)]
        evaluate.write_rows(path, losses)
        self.progress(len(losses), len(losses))
        return losses

    def _build(self, rows: TokenRows, ids: BinaryIO, mask: BinaryIO) -> Mapping[str, bytes]:
        """Return the columns of a cache entry, which has no tokens; a second call, after a full disk, does not score again."""
        del ids, mask
        if not self._scored:
            self._scored = self._score(rows)
        losses = self._scored
        return {
            "nll": array("d", [loss.nll for loss in losses]).tobytes(),
            "tokens": array("q", [loss.tokens for loss in losses]).tobytes(),
        }

    def _score(self, rows: TokenRows) -> list[RowLoss]:
        """Measure all rows with the adapter off; where memory runs out, again with half as many at once."""
        losses, words = self._attempt(rows)
        while words:
            self.say(self.halving.halve(0, words))
            losses, words = self._attempt(rows)
        return losses

    def _attempt(self, rows: TokenRows) -> tuple[list[RowLoss], str]:
        """Return the losses, or the error's words where memory ran out."""
        try:
            with self.fence.excursion(adapter_off=True):
                return self._measure(rows), ""
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return [], said(error)

    def _measure(self, rows: TokenRows) -> list[RowLoss]:
        work = evaluate.measure(self.loaded, rows, self.halving.rows, self._poll, chunk=self.run.loss_chunk_size)
        try:
            while True:
                self.progress(next(work), len(rows))
        except StopIteration as end:
            losses: list[RowLoss] = end.value
            return losses

    def _poll(self) -> None:
        poll_for(self.wishes)


def identity(folder: Path) -> list[tuple[str, int, int]]:
    """Return what tells the weights in `folder` from others without reading gigabytes: the files' names, sizes and times."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    facts = [(file, file.stat()) for file in files if file.exists()]
    return [(str(file.resolve()), fact.st_size, fact.st_mtime_ns) for file, fact in facts]


def _read(path: Path, rows: TokenRows) -> list[RowLoss]:
    """Return the scores of an earlier attempt if they are those of `rows`, else none: a damaged list is made again."""
    try:
        known = evaluate.read_rows(path)
    except (OSError, ValueError, KeyError, TypeError):
        return []
    same = len(known) == len(rows) and all(
        (loss.row, loss.tokens) == (row.row, perplexity.targets(row)) for loss, row in zip(known, rows, strict=True)
    )
    return known if same else []
