"""How long the rows are in tokens: measured where the model's tokenizer lies on this disk, else guessed.

A guess from characters is enough for a first estimate of time, but how many rows are over `max_length` decides
what is trained on: people should see that before they start. No torch is loaded for it, and no network is asked.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tui.engine import builtin
from qlora_tui.engine.budget import Budget
from qlora_tui.engine.errors import BadRow, EngineError
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.places import is_folder
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import gib

if TYPE_CHECKING:
    from qlora_tui.engine.data import Renderer, Row

_CHARACTERS_A_TOKEN = 3.6
_ROW_OVERHEAD = 12
MOST_ROWS = 4000
_STEP = 128
TOO_LONG = {"drop": "dropped", "cut": "cut", "split": "split by turns"}
"""What becomes of rows that are too long, by the values of `too_long`."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the rows looked at, shortest first. `measured`: a tokenizer counted them; `whole`: of every row there is.

    `longest_chat` is the longest row with more than one answer. Of rows that were measured, `first` holds in the same order
    where the first trained token stands, `trained` is the number of all trained tokens, and `refused` holds the rows that
    cannot be written out, as (number, reason). `turns` holds, by role, how many turns were read and how many of them are
    written out; without a tokenizer nobody knows the latter, and it is -1. `notes` say what a person would not expect.
    """

    tokens: tuple[int, ...] = ()
    measured: bool = False
    whole: bool = False
    longest_chat: int = 0
    first: tuple[int, ...] = ()
    trained: int = 0
    refused: tuple[tuple[int, str], ...] = ()
    turns: tuple[tuple[str, int, int], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def unwritten(self) -> float:
        """Return the share of rows that cannot be written out."""
        return len(self.refused) / (len(self.refused) + len(self.tokens)) if self.refused else 0.0

    def fitted(self, run: RunConfig) -> Lengths:
        """Return the lengths once `too_long` was applied: cut rows are as long as the limit, and so is the longest part of one split.

        >>> Lengths((5, 8, 13, 21)).fitted(RunConfig(max_length=10, too_long="cut")).tokens
        (5, 8, 10, 10)
        """
        if run.too_long == "drop" or self.longest <= run.max_length:
            return self
        return replace(self, tokens=tuple(min(length, run.max_length) for length in self.tokens))

    @property
    def longest(self) -> int:
        """Return the tokens of the longest row."""
        return self.tokens[-1] if self.tokens else 0

    def over(self, limit: int) -> float:
        """Return the share of rows that have more than `limit` tokens.

        >>> Lengths((5, 8, 13, 21)).over(8)
        0.5
        """
        return 1 - bisect_right(self.tokens, limit) / len(self.tokens) if self.tokens else 0.0

    def mean(self, limit: int) -> float:
        """Return the mean of the rows that are not over `limit`, which are those trained on."""
        kept = self.tokens[: bisect_right(self.tokens, limit)]
        return sum(kept) / len(kept) if kept else 0.0

    def lost(self, limit: int) -> float:
        """Return the share of rows that would keep no trained token at all, were they cut at `limit`; 0 where that is not known.

        >>> Lengths((5, 8, 13, 21), first=(2, 2, 9, 3)).lost(8)
        0.25
        """
        return sum(first >= limit for first in self.first) / len(self.first) if self.first else 0.0

    def keeps(self, share: float) -> int:
        """Return a limit over which no more than 1 - `share` of the rows are: the next multiple of 128.

        >>> Lengths((100, 200, 300, 4000)).keeps(0.75)
        384
        """
        return multiple(self.at(share))

    def at(self, share: float) -> int:
        """Return the smallest length that `share` of the rows do not exceed.

        >>> Lengths((5, 8, 13, 21)).at(0.5)
        8
        """
        return self.tokens[max(0, math.ceil(len(self.tokens) * share) - 1)] if self.tokens else 0

    def longest_trained(self, limit: int) -> int | None:
        """Return the tokens of the longest row that is kept at `limit`; None unless every row was counted."""
        kept = bisect_right(self.tokens, limit)
        return self.tokens[kept - 1] if kept and self.measured and self.whole else None


def guess(rows: Sequence[Row], most: int = MOST_ROWS) -> Lengths:
    """Return lengths of at most `most` rows, guessed from the number of characters; counted where all were tokenized elsewhere."""
    ids = [row.chat.ids for row in _spread(rows, most) if row.chat.ids is not None]
    if ids and len(ids) == min(len(rows), most):
        counted = sorted((len(tokens), trained.index(1) if 1 in trained else -1) for tokens, trained in ids)
        every, first = (tuple(part) for part in zip(*counted, strict=True))
        return Lengths(every, measured=True, whole=len(rows) <= most, first=first, trained=sum(sum(trained) for _, trained in ids))
    found = [(row, _guessed(row)) for row in _spread(rows, most)]
    chats = [length for row, length in found if _answers(row) > 1]
    turns = _turns(_spread(rows, most), None)
    return Lengths(tuple(sorted(length for _, length in found)), longest_chat=max(chats, default=0), turns=turns)


def measure(rows: Sequence[Row], run: RunConfig, most: int = MOST_ROWS, stopping: Callable[[], None] = lambda: None) -> Lengths | None:
    """Return lengths of at most `most` rows, counted by the model's tokenizer; None where it is not on this disk.

    One that cannot be read leaves the guess, and a note that says so.
    `stopping` is called before every row and raises to interrupt.
    """
    from qlora_tui.engine import data

    if not rows:
        return None
    try:
        renderer = renderer_of(run)
    except EngineError as error:
        return replace(guess(rows, most), notes=(f"the model: {one_line(error.problem.message, limit=300)}",))
    if renderer is None:
        return None
    survey, chats = data.Survey(), []
    for row in _spread(rows, most):
        stopping()
        try:
            tokens = renderer.tokens(row)
        except BadRow as error:
            survey.refuse(row, error)
            continue
        survey.add(tokens)
        chats += [len(tokens.input_ids)] if _answers(row) > 1 else []
    counted = sorted(zip(survey.lengths, survey.first, strict=True))
    return Lengths(
        tuple(length for length, _ in counted),
        measured=True,
        whole=len(rows) <= most,
        longest_chat=max(chats, default=0),
        first=tuple(first for _, first in counted),
        trained=sum(survey.supervised),
        refused=tuple((refusal.row, refusal.reason) for refusal in survey.refused),
        turns=_turns(_spread(rows, most), {refusal.row for refusal in survey.refused}),
        notes=renderer.notes(),
    )


def renderer_of(run: RunConfig) -> Renderer | None:
    """Return what writes rows out for the run's model; None where its tokenizer is not on this disk.

    Raises:
        EngineError: it is, and cannot be read.
    """
    from qlora_tui.engine import data

    folder = tokenizer_folder(run)
    return data.Renderer(data.load_tokenizer(folder, run.chat_template), mask_history=run.mask_history) if folder else None


def _turns(rows: Sequence[Row], refused: set[int] | None) -> tuple[tuple[str, int, int], ...]:
    """Return turns read and written by role, in the order in which roles appear; written ones are -1 where `refused` is not known."""
    read: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for row in rows:
        said = Counter(turn.role for turn in row.chat.turns)
        read += said
        if refused and row.number in refused:
            lost += said
    return tuple((role, many, -1 if refused is None else many - lost[role]) for role, many in read.items())


def _answers(row: Row) -> int:
    return sum(turn.role == "assistant" for turn in row.chat.turns)


def tokenizer_folder(run: RunConfig) -> Path | None:
    """Return where the tokenizer of the run's model lies: a folder, the demo's model, or the hub's cache."""
    name = run.model_name_or_path
    if name == builtin.NAME:
        files = builtin.small_files()
        return files.folder if files.complete else None
    folder = Path(name).expanduser()
    if name and is_folder(folder):
        return folder
    found = list((hub_cache() / f"models--{name.replace('/', '--')}").glob("snapshots/*/tokenizer.json"))
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def hub_cache() -> Path:
    """Return where the hub's library keeps what it fetched."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "huggingface") / "hub"


def _spread(rows: Sequence[Row], most: int) -> list[Row]:
    """Return at most `most` rows, spread evenly: large data must not take minutes."""
    return [rows[index * len(rows) // min(len(rows), most)] for index in range(min(len(rows), most))]


def _guessed(row: Row) -> int:
    if row.chat.ids is not None:
        return len(row.chat.ids[0])
    characters = sum(len(turn.content) for turn in row.chat.turns)
    return max(1, int(characters / _CHARACTERS_A_TOKEN) + _ROW_OVERHEAD * len(row.chat.turns))


def split_rows(run: RunConfig, rows: int, measured: int | None = None) -> tuple[int, int]:
    """Return about how many of `rows` usable rows are trained on, and how many are measured.

    `measured` is the number of rows that the data bring to be measured on, as a valid file or as `eval_data`: then nothing is held out.
    """
    from qlora_tui.engine import data

    used = min(rows, run.max_samples) if run.max_samples else rows
    if run.eval_data or measured is not None:
        return used, min(measured or 0, data.HOLDOUT_CAP)
    held = data.size_of(used, run.val_set_size, [])
    return used - held, held


def used_rows(run: RunConfig, lengths: Lengths, rows: int, measured: int | None = None, copies: int = 0) -> tuple[int, int]:
    """Return about how many of `rows` rows that could be read are trained on, and how many are measured.

    Left out are those that cannot be written out, those that are too long where such are dropped, and exact copies where
    `filter_duplicates` is on. What the triage leaves out is not known without the base. `measured` is as for `split_rows`.
    """
    kept = (1 - lengths.unwritten) * (1 - lengths.fitted(run).over(run.max_length))
    return split_rows(run, max(1, round(rows * kept) - (copies if run.filter_duplicates != "off" else 0)), measured)


def triage_remark(run: RunConfig) -> str:
    """Say that what `perplexity_filter` will leave out is still counted; nothing where it is off."""
    if not run.perplexity_filter:
        return ""
    most = f"at most {run.perplexity_drop_most:.0%}".replace("%", " %")
    return f"perplexity_filter will leave out rows ({most}) that are counted here in rows, steps and time: only the base can say which."


def limit_words(limit: int, longer: float, lost: float, keeps: int, more: str = "", too_long: str = "") -> str:
    """Return what a limit does to the rows in a sentence: as `too_long` has it, or without it what it would do to their answers.

    `more` says what the longer limit `keeps` costs.

    >>> limit_words(2048, 0.12, 0.04, 3072, "+1.9 GiB")
    'at 2,048: 12 % of rows are longer, 4.0 % lose their whole answer; 3,072 would keep 99 %, +1.9 GiB'
    >>> limit_words(512, 0.12, 0.0, 512, "", "drop"), limit_words(512, 0.12, 0.0, 512, "", "cut")
    ('at 512: 12 % of rows are longer: dropped', 'at 512: 12 % of rows are longer: cut, none loses its whole answer')
    """
    if not longer:
        return f"at {limit:,}: no row is longer"
    lose = f"{share(lost)} {'would lose' if too_long == 'drop' else 'lose'} their whole answer" if lost else "none loses its whole answer"
    if too_long == "drop":
        gone = f": dropped (cut, {lose})" if lost else ": dropped"
    elif too_long == "split":
        gone = f": {TOO_LONG[too_long]}"
    else:
        gone = f": cut, {lose}" if too_long else f", {lose}"
    kept = f"; {keeps:,} would keep 99 %{', ' if more else ''}{more}" if keeps > limit else ""
    return f"at {limit:,}: {share(longer)} of rows are longer{gone}{kept}"


def multiple(length: int) -> int:
    """Return the next multiple of 128, which is what limits are set to.

    >>> multiple(3011), multiple(128)
    (3072, 128)
    """
    return -(-length // _STEP) * _STEP


def cost_words(spec: ModelSpec, planned: RunConfig, limit: int, need: Callable[[int], Budget]) -> str:
    """Return what `limit` in place of the run's `max_length` costs in memory, all else as `planned`; empty where that is not known.

    `need` estimates the planned run with a limit.
    """
    if limit <= planned.max_length:
        return ""
    if limit > spec.max_position_embeddings:
        return f"more than the model's {spec.max_position_embeddings:,}"
    try:
        now, then = need(planned.max_length), need(limit)
    except EngineError:
        return ""
    return f"+{gib(max(0, then.total_bytes - now.total_bytes))}{'' if then.fits or not now.fits else ', which does not fit'}"


def share(part: float) -> str:
    """Return a share that is not nothing as a percentage that is not nothing.

    >>> share(0.031), share(0.0004), share(0.27)
    ('3.1 %', 'under 0.1 %', '27 %')
    """
    if part < 0.001:
        return "under 0.1 %"
    return f"{part * 100:.1f} %" if part < 0.1 else f"{part * 100:.0f} %"
