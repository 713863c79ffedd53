"""From rows to what a run trains on and what it holds out: chosen, filtered, rendered, made to fit, split and counted.

Everything random hangs on the seed and on the texts, not on the order of the file. The rows are read one after the other
and their tokens go to files, so that a million rows need no more memory than their fingerprints.
"""

from __future__ import annotations

import itertools
import json
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qlora_tui.engine.data import cache, row_store
from qlora_tui.engine.data.ahead import rendered
from qlora_tui.engine.data.chat import Row
from qlora_tui.engine.data.duplicates import copies
from qlora_tui.engine.data.fitting import Fitter
from qlora_tui.engine.data.holdout import HOLDOUT_CAP, Held, hold_out, leaks
from qlora_tui.engine.data.load import Dataset
from qlora_tui.engine.data.prints import Prints, exact_key
from qlora_tui.engine.data.render import Renderer, TokenRow
from qlora_tui.engine.data.store import ENDS, NUMBERS, Columns, TokenRows, Writer
from qlora_tui.engine.data.survey import Survey
from qlora_tui.engine.data.tape import Item, Progress, Stopping, polled
from qlora_tui.engine.data.tokenizer import Tokenizer
from qlora_tui.engine.errors import BadRow, DataError
from qlora_tui.engine.places import replace_file
from qlora_tui.engine.spec import RunConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]

_LISTED_REASONS = 20
_LOOK_UP_EVERY = 16
_DECIDING = (
    "max_length",
    "too_long",
    "mask_history",
    "chat_template",
    "filter_duplicates",
    "max_samples",
    "val_set_size",
    "seed",
)
"""The settings that decide what is trained, next to the texts."""


@dataclass(frozen=True, slots=True)
class PreparedFacts:
    """What will be trained, in numbers; tokens are those of one pass over the training rows.

    `leaks` counts rows of `eval_data` that are also trained on and therefore not measured; `overlap` counts groups of like rows
    on both sides of the hold-out, which is 0 unless something is broken.
    """

    rows: int
    train_rows: int
    holdout_rows: int
    tokens: int
    supervised_tokens: int
    holdout_tokens: int
    max_row_tokens: int
    leaks: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    overlap: int = 0


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Rows to train on and rows to measure on, in the order of the source, and the numbers about them.

    `lost` is the list of rows that are neither, as JSON lines of row and reason; `survey` measures every row that was rendered;
    `highest` is the highest token id of all rows.
    """

    train: TokenRows
    holdout: TokenRows
    facts: PreparedFacts
    lost: bytes = b""
    survey: Survey = field(default_factory=Survey, compare=False)
    highest: int = 0

    @property
    def lengths(self) -> array[int]:
        """Tokens of every row, trained or held out."""
        return self.train.lengths + self.holdout.lengths

    def write_lost(self, path: Path) -> None:
        """Write the list of rows that are not used, so that a person can look at them; no file if there is none."""
        if self.lost:
            replace_file(path, self.lost)


def prepare(
    run: RunConfig,
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    eval_dataset: Dataset | None = None,
    stopping: Stopping = lambda: None,
    progress: Progress = lambda done, total: None,
    renderer: Renderer | None = None,
) -> Tokenized:
    """Choose, render and split the rows of `dataset` as `run` says, or take them from the cache.

    `stopping` is called every few rows and raises to interrupt; `progress` gets rows done and rows in all.
    With an `eval_dataset` nothing is held out of `dataset`, and measured rows that are also trained are left out.

    Raises:
        DataError: no row is left to train on; the commonest reasons are named.
    """
    total = len(dataset.rows) + (len(eval_dataset.rows) if eval_dataset else 0)
    progress(0, total)
    render = renderer or Renderer(tokenizer, mask_history=run.mask_history)
    work = _Work(run, dataset, eval_dataset, render, stopping, lambda done: progress(done, total))
    key = cache.key_of(
        [str(getattr(run, name)) for name in _DECIDING],  # every name is a field of the config
        tokenizer.digest(),
        [_digest(each, stopping) for each in (dataset, eval_dataset) if each is not None],
    )
    columns = cache.kept(key, work.build, stopping)
    progress(total, total)
    return _read(columns, dataset.notes)


class _Work:
    """One preparation: goes through the rows once or twice and writes what is used of them."""

    def __init__(
        self,
        run: RunConfig,
        dataset: Dataset,
        eval_dataset: Dataset | None,
        renderer: Renderer,
        stopping: Stopping,
        progress: Callable[[int], None],
    ) -> None:
        self.run, self.dataset, self.measured, self.renderer = run, dataset, eval_dataset, renderer
        self.stopping, self.progress = stopping, progress

    def build(self, ids: BinaryIO, mask: BinaryIO) -> dict[str, bytes]:
        """Write tokens into the files and return the other columns.

        Raises:
            DataError: no row is left to train on.
            OSError: the disk is full.
        """
        self.writer, self.survey, self.fitter = Writer.into(ids, mask), Survey(), Fitter(self.run, self.renderer.tokens)
        self.refused: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.lost, self.done = bytearray(), 0
        self.told: Mapping[str, str] = {}
        for refusal in self._polled(self.dataset.refused):
            self.refused[refusal.reason] += 1
            self._lose(refusal.row, refusal.reason, line=refusal.line, field=refusal.field, source=refusal.source)
        notes: list[str] = []
        wanted = self.measured is not None or self.run.val_set_size > 0
        prints = Prints(sketches=True, exact=False) if wanted else None
        weights = self._take(self.dataset.rows, self._chosen(), self.run.max_samples, prints)
        if not weights:
            raise self._nothing_left()
        trained, leaked = len(self.writer), 0
        held = Held()
        if self.measured is not None and prints is not None:
            leaked = self._take_eval(self.measured.rows, prints, notes)
        elif prints is not None:
            held = hold_out(prints, self._longest(weights), self.run, notes, weights=weights, stopping=self.stopping)
        train, holdout = self._sides(weights, held, trained)
        facts = self._facts(train, holdout, leaked, held.overlap, [*self.renderer.notes(), *self.fitter.notes(), *notes])
        numbers, ends = self.writer.numbers.tobytes(), self.writer.ends.tobytes()
        told = json.dumps({**asdict(facts), "highest": self.writer.highest}).encode()
        columns = {NUMBERS: numbers, ENDS: ends, "train": train.tobytes(), "holdout": holdout.tobytes()}
        return {**columns, "facts": told, "lost": bytes(self.lost), **self.survey.columns(self.stopping)}

    def _take(self, rows: Sequence[Row], places: Sequence[int], enough: int, prints: Prints | None) -> array[int]:
        """Write usable rows until there are enough (0: all); return, by usable row, into how many it was split."""
        weights = array("i")
        source = self._looked_up(rows, places)
        before = -1
        while self.done != before and not (enough and len(weights) >= enough):
            before = self.done
            wanted = itertools.islice(source, enough - len(weights)) if enough else source  # rows are read ahead, but never too many
            for row, tokens in rendered(self.renderer, wanted, self.stopping):
                parts = self._usable(row, tokens)
                for part in parts:
                    self.writer.add(part)
                if parts:
                    weights.append(len(parts))
                if parts and prints is not None:
                    prints.add(row.chat)
        return weights

    def _looked_up(self, rows: Sequence[Row], places: Sequence[int]) -> Iterator[Row]:
        """Yield the rows at `places`, hearing a wish to stop and telling progress every few rows."""
        inorder = isinstance(places, range) and len(places) == len(rows)
        for row in rows if inorder else map(rows.__getitem__, places):
            if self.done % _LOOK_UP_EVERY == 0:
                self.stopping()
                self.progress(self.done)
            self.done += 1
            yield row

    def _usable(self, row: Row, tokens: TokenRow | BadRow) -> list[TokenRow]:
        if isinstance(tokens, BadRow):
            self.survey.refuse(row, tokens)
            self.refused[str(tokens)] += 1
            self._lose(row.number, str(tokens), line=row.line)
            return []
        self.survey.add(tokens)
        parts, reason = self.fitter.fit(row, tokens)
        if not parts:
            self.dropped[reason] += 1
            self._lose(row.number, reason, tokens=len(tokens.input_ids))
        return parts

    def _lose(self, row: int, reason: str, **more: Any) -> None:
        self.lost += json.dumps({"row": row, "reason": reason, **more, **self.told}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"

    def _chosen(self) -> Sequence[int]:
        """Return the positions of the rows to take, in the order to take them: without copies, shuffled if not all are wanted."""
        rows, mode = self.dataset.rows, self.run.filter_duplicates
        places: Sequence[int] = range(len(rows))
        if mode != "off":
            removed = self._copies(near=mode == "near")
            places = [place for place in places if place not in removed]
        return _shuffled(rows, places, self.run.seed, self.stopping) if self.run.max_samples else places

    def _copies(self, *, near: bool) -> Mapping[int, int]:
        rows = self.dataset.rows
        prints = Prints(sketches=near)
        for row in self._polled(rows):
            prints.add(row.chat)
        found = copies(prints, rows, near=near, stopping=self.stopping)
        first = {place: rows[place].number for place in self._polled({*found.values()})}
        for place, other in self._polled(sorted(found.items())):
            self.dropped[f"{'near or exact' if near else 'exact'} copy of an earlier row"] += 1
            self._lose(rows[place].number, f"copy of row {first[other]}")
        return found

    def _polled(self, items: Iterable[Item]) -> Iterator[Item]:
        return polled(items, self.stopping)

    def _take_eval(self, rows: Sequence[Row], prints: Prints, notes: list[str]) -> int:
        """Write the rows of `eval_data` that are not trained on, at most the cap; return how many were."""
        trained = len(prints)
        for row in self._polled(rows):
            prints.add(row.chat)
        leaked = {place - trained for place in leaks(prints, trained, self.stopping)}
        fresh = [place for place in range(len(rows)) if place not in leaked]
        self.told = {"of": "eval_data"}
        for place in self._polled(sorted(leaked)):
            self._lose(rows[place].number, "also trained on, or nearly")
        before = len(self.writer)
        self._take(rows, _shuffled(rows, fresh, self.run.seed, self.stopping), HOLDOUT_CAP, None)
        used = len(self.writer) - before
        if leaked:
            notes.append(f"{len(leaked)} rows of eval_data are also trained on, or nearly: they are not measured.")
        if len(fresh) > used >= HOLDOUT_CAP:
            notes.append(f"{used} of {len(fresh)} rows of eval_data are measured, drawn by seed.")
        return len(leaked)

    def _longest(self, weights: array[int]) -> Numbers:
        """Return the tokens of each usable row, of a split one those of its last part."""
        import numpy as np

        return self._lengths()[np.cumsum(np.array(weights, np.int64)) - 1]

    def _lengths(self) -> Numbers:
        """Return the tokens of every row written."""
        import numpy as np

        ends = np.array(self.writer.ends, np.int64)
        ends[1:] -= ends[:-1].copy()
        return ends

    def _sides(self, weights: array[int], held: Held, trained: int) -> tuple[Numbers, Numbers]:
        """Return the places of the token rows to train and to measure, each in the order of the source."""
        import numpy as np

        measured = np.ones(len(self.writer), bool)
        inside = np.zeros(len(weights), bool)
        inside[list(held.places)] = True
        measured[:trained] = np.repeat(inside, np.array(weights, np.int64))
        numbers = np.array(self.writer.numbers, np.int64)
        train, holdout = (places[np.argsort(numbers[places], kind="stable")] for places in map(np.flatnonzero, (~measured, measured)))
        return train, holdout

    def _facts(self, train: Numbers, holdout: Numbers, leaked: int, overlap: int, notes: list[str]) -> PreparedFacts:
        import numpy as np

        lengths, supervised = self._lengths(), np.array(self.writer.supervised, np.int64)
        return PreparedFacts(
            rows=len(self.dataset.rows) + len(self.dataset.refused),
            train_rows=len(train),
            holdout_rows=len(holdout),
            tokens=int(lengths[train].sum()),
            supervised_tokens=int(supervised[train].sum()),
            holdout_tokens=int(lengths[holdout].sum()),
            max_row_tokens=int(lengths.max()),
            leaks=leaked,
            refused=_listed(self.refused),
            dropped=_listed(self.dropped),
            notes=tuple(notes),
            overlap=overlap,
        )

    def _nothing_left(self) -> DataError:
        reasons = (self.refused + self.dropped).most_common(3)
        told = "; ".join(f"{count} rows: {reason}" for reason, count in reasons) or "there is no usable row"
        names = ", ".join(source.name for source in self.dataset.sources)
        hint = "raise max_length, or take shorter rows" if self.dropped else ""
        return DataError(f"no row is left to train on ({told})", hint=hint, where=names)


def _read(columns: Columns, notes: Sequence[str]) -> Tokenized:
    told = json.loads(bytes(columns["facts"]))
    highest = told.pop("highest")
    facts = PreparedFacts(**{**told, "notes": (*notes, *told["notes"])})
    train, holdout = (TokenRows(columns, array("q", bytes(columns[side]))) for side in ("train", "holdout"))
    return Tokenized(train, holdout, facts, bytes(columns["lost"]), Survey.read(columns), highest)


def _digest(dataset: Dataset, stopping: Stopping) -> str:
    """Return a digest of all rows and refusals: everything that was read of them, and where each stood."""
    state = blake2b(digest_size=16)
    for packed in polled(row_store.packed(dataset.rows), stopping):
        state.update(packed)
    for refusal in polled(dataset.refused, stopping):
        state.update(repr((refusal.row, refusal.reason)).encode("utf-8", "replace"))
    return state.hexdigest()


def _shuffled(rows: Sequence[Row], places: Sequence[int], seed: int, stopping: Stopping) -> list[int]:
    """Return the positions in an order that the texts and the seed decide."""
    import numpy as np

    keys, numbers = bytearray(), array("q")
    for place in polled(places, stopping):
        row = rows[place]
        keys += exact_key(row.chat)
        numbers.append(row.number)
    halves = np.frombuffer(bytes(keys), ">u8").reshape(-1, 2).astype(np.uint64)  # big-endian numbers compare as their bytes do
    order: list[int] = np.asarray(places, np.int64)[np.lexsort((np.array(numbers, np.int64), halves[:, 1], halves[:, 0]))].tolist()
    stopping()
    random.Random(seed).shuffle(order)
    return order


def _listed(reasons: Counter[str]) -> dict[str, int]:
    """Keep the commonest reasons and add up the rest, so that odd data cannot fill a journal with sentences."""
    common = dict(reasons.most_common(_LISTED_REASONS))
    rest = sum(reasons.values()) - sum(common.values())
    return common | {"other reasons": rest} if rest else common
