"""From rows to what a run trains on and what it holds out: chosen, rendered, split and counted.

Everything random hangs on the seed and on the texts, not on the order of the file. The hold-out is taken by
groups of equal text, so nothing that is measured was also trained on.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from qlora_tui.engine.data.chat import Chat, Row
from qlora_tui.engine.data.load import Dataset
from qlora_tui.engine.data.render import Renderer, TokenRow
from qlora_tui.engine.data.tokenizer import Tokenizer
from qlora_tui.engine.errors import BadRow, DataError
from qlora_tui.engine.spec import RunConfig

HOLDOUT_CAP = 500
"""A share holds out no more rows than this: the error of the mean is small by then, and measuring costs time."""
_LISTED_REASONS = 20
_LOOK_UP_EVERY = 16

Rendered = Callable[[Row], TokenRow]


@dataclass(frozen=True, slots=True)
class PreparedFacts:
    """What will be trained, in numbers; tokens are those of one pass over the training rows."""

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


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Rows to train on and rows to measure on, in the order of the source, and the numbers about them."""

    train: list[TokenRow]
    holdout: list[TokenRow]
    facts: PreparedFacts


def prepare(
    run: RunConfig,
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    eval_dataset: Dataset | None = None,
    stopping: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    renderer: Renderer | None = None,
) -> Tokenized:
    """Choose, render and split the rows of `dataset` as `run` says.

    `stopping` is called every few rows and raises to interrupt; `progress` gets rows done and rows in all.
    With an `eval_dataset` nothing is held out of `dataset`, and measured rows that are also trained are left out.

    Raises:
        DataError: no row is left to train on; the commonest reasons are named.
    """
    render = renderer or Renderer(tokenizer)
    measured = eval_dataset.rows if eval_dataset else ()
    total = len(dataset.rows) + len(measured)
    work = _Work(run.max_length, render.tokens, stopping, lambda done: progress(done, total))
    usable = work.take(_chosen(dataset.rows, run), run.max_samples)
    if not usable:
        raise _nothing_left(work, dataset)
    notes: list[str] = []
    leaks = 0
    if eval_dataset is None:
        held = hold_out([row for row, _ in usable], run, notes)
        train = [tokens for row, tokens in usable if row.number not in held]
        holdout = [tokens for row, tokens in usable if row.number in held]
    else:
        train = [tokens for _, tokens in usable]
        fresh, leaks = without_leaks(measured, [row for row, _ in usable])
        holdout = [tokens for _, tokens in work.take(_shuffled(fresh, run.seed), HOLDOUT_CAP)]
        notes += _about_eval(len(fresh), len(holdout), leaks)
    progress(total, total)
    refused = Counter(refusal.reason for refusal in dataset.refused) + work.refused
    return Tokenized(
        train,
        holdout,
        _facts(train, holdout, leaks, len(dataset.rows) + len(dataset.refused), refused, work.dropped, [*render.notes(), *notes]),
    )


def hold_out(rows: Sequence[Row], run: RunConfig, notes: list[str]) -> frozenset[int]:
    """Return the numbers of the rows to measure on: whole groups of equal text, drawn by seed; at least one row stays to train."""
    wanted = _holdout_size(len(rows), run.val_set_size, notes)
    groups: dict[bytes, list[int]] = {}
    for row in rows:
        groups.setdefault(near_key(row.chat), []).append(row.number)
    order = sorted(groups)
    random.Random(run.seed).shuffle(order)
    held: set[int] = set()
    for key in order:
        if len(held) + len(groups[key]) <= wanted:
            held.update(groups[key])
    if len(held) < wanted:
        notes.append(f"{len(held)} rows are held out, not {wanted}: the others have the same text as rows that are trained.")
    return frozenset(held)


def without_leaks(measured: Sequence[Row], trained: Iterable[Row]) -> tuple[list[Row], int]:
    """Return the rows to measure on that are not also trained on, each text once, and how many were trained on too."""
    seen = {near_key(row.chat) for row in trained}
    fresh = [row for row in measured if near_key(row.chat) not in seen]
    return fresh, len(measured) - len(fresh)


def exact_key(chat: Chat) -> bytes:
    """Return a fingerprint of a chat's roles and texts."""
    return _digest(f"{turn.role}\0{turn.content}" for turn in chat.turns)


def near_key(chat: Chat) -> bytes:
    """Return a fingerprint that is equal for texts that differ in case or spaces only."""
    return _digest(f"{turn.role}\0{' '.join(turn.content.casefold().split())}" for turn in chat.turns)


class _Work:
    """Renders rows until there are enough, counting what falls away."""

    def __init__(self, longest: int, render: Rendered, stopping: Callable[[], None], progress: Callable[[int], None]) -> None:
        self.longest, self.render, self.stopping, self.progress = longest, render, stopping, progress
        self.refused: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.done = 0

    def take(self, rows: Sequence[Row], enough: int) -> list[tuple[Row, TokenRow]]:
        """Return usable rows with their tokens, in source order; `enough` 0 means all."""
        taken: list[tuple[Row, TokenRow]] = []
        for row in rows:
            if enough and len(taken) >= enough:
                break
            if self.done % _LOOK_UP_EVERY == 0:
                self.stopping()
                self.progress(self.done)
            self.done += 1
            tokens = self._usable(row)
            if tokens:
                taken.append((row, tokens))
        return sorted(taken, key=lambda pair: pair[0].number)

    def _usable(self, row: Row) -> TokenRow | None:
        try:
            tokens = self.render(row)
        except BadRow as error:
            self.refused[str(error)] += 1
            return None
        if len(tokens.input_ids) > self.longest:
            self.dropped[f"longer than max_length {self.longest}"] += 1
            return None
        return tokens


def _chosen(rows: Sequence[Row], run: RunConfig) -> Sequence[Row]:
    return _shuffled(rows, run.seed) if run.max_samples else rows


def _shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    order = sorted(rows, key=lambda row: (exact_key(row.chat), row.number))
    random.Random(seed).shuffle(order)
    return order


def _holdout_size(rows: int, wanted: float, notes: list[str]) -> int:
    size = int(wanted) if wanted >= 1 else round(rows * wanted)
    if wanted < 1:
        size = max(size, 1) if wanted and rows >= 10 else size
        if size > HOLDOUT_CAP:
            notes.append(
                f"{HOLDOUT_CAP} rows are held out, not {size}: more would cost time and tell no more. A number in val_set_size is obeyed."
            )
            size = HOLDOUT_CAP
    if size > rows - 1 and wanted and rows:
        notes.append(f"There are {rows} rows: {rows - 1} are held out, so that one is left to train.")
    return max(0, min(size, rows - 1))


def _about_eval(fresh: int, used: int, leaks: int) -> list[str]:
    notes = []
    if leaks:
        notes.append(f"{leaks} rows of eval_data are also trained on: they are not measured.")
    if fresh > used >= HOLDOUT_CAP:
        notes.append(f"{used} of {fresh} rows of eval_data are measured, drawn by seed.")
    return notes


def _facts(
    train: list[TokenRow], holdout: list[TokenRow], leaks: int, rows: int, refused: Counter[str], dropped: Counter[str], notes: list[str]
) -> PreparedFacts:
    return PreparedFacts(
        rows=rows,
        train_rows=len(train),
        holdout_rows=len(holdout),
        tokens=sum(len(row.input_ids) for row in train),
        supervised_tokens=sum(sum(row.trained) for row in train),
        holdout_tokens=sum(len(row.input_ids) for row in holdout),
        max_row_tokens=max(len(row.input_ids) for row in (*train, *holdout)),
        leaks=leaks,
        refused=_listed(refused),
        dropped=_listed(dropped),
        notes=tuple(notes),
    )


def _listed(reasons: Counter[str]) -> dict[str, int]:
    """Keep the commonest reasons and add up the rest, so that odd data cannot fill a journal with sentences."""
    common = dict(reasons.most_common(_LISTED_REASONS))
    rest = sum(reasons.values()) - sum(common.values())
    return common | {"other reasons": rest} if rest else common


def _nothing_left(work: _Work, dataset: Dataset) -> DataError:
    reasons = (work.refused + work.dropped).most_common(3)
    told = "; ".join(f"{count} rows: {reason}" for reason, count in reasons) or "there is no usable row"
    names = ", ".join(source.name for source in dataset.sources)
    hint = "raise max_length, or take shorter rows" if work.dropped else ""
    return DataError(f"no row is left to train on ({told})", hint=hint, where=names)


def _digest(parts: Iterable[str]) -> bytes:
    state = blake2b(digest_size=16)
    for part in parts:
        state.update(part.encode("utf-8", "surrogatepass") + b"\1")
    return state.digest()
