"""What a dataset holds and what would be trained: the numbers of `qlora-tui data`.

What would be trained comes from `prepare` itself, so a report cannot differ from the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from qlora_tui.engine.data.boilerplate import boilerplate
from qlora_tui.engine.data.chat import ROLES, Row
from qlora_tui.engine.data.duplicates import first_of_equal, groups
from qlora_tui.engine.data.holdout import hold_out, leaks
from qlora_tui.engine.data.load import Dataset
from qlora_tui.engine.data.prepare import Tokenized, prepare
from qlora_tui.engine.data.preview import special
from qlora_tui.engine.data.prints import Prints
from qlora_tui.engine.data.render import Renderer, TokenRow
from qlora_tui.engine.data.survey import Survey, survey
from qlora_tui.engine.data.tokenizer import Tokenizer
from qlora_tui.engine.errors import DataError
from qlora_tui.engine.spec import RunConfig, rows_per_step

Tell = Callable[[str, int, int], None]
_TOLD_EVERY = 1000


def describe(
    run: RunConfig,
    dataset: Dataset,
    tokenizer: Tokenizer | None,
    examples: int = 0,
    *,
    eval_dataset: Dataset | None = None,
    tell: Tell = lambda doing, done, total: None,
) -> dict[str, Any]:
    """Return the facts of `qlora-tui data` as JSON-ready values; what needs a tokenizer is null without one.

    `tell` gets what is being done, and the rows it was done with, of how many.

    `prepared` equals the event of that name of a run. `tokens`, `histogram`, `limits` and `too_long` measure every row that can be
    rendered, whatever becomes of it. `duplicates.near` counts rows that share at least seven tenths of their word pairs with an
    earlier one, exact copies not included. Texts in it are the dataset's own: whoever shows them escapes them.
    """
    notes: list[str] = []
    prepared = _prepare(run, dataset, tokenizer, eval_dataset, notes, tell) if tokenizer else None
    renderer = Renderer(tokenizer, mask_history=run.mask_history) if tokenizer else None
    measured = _survey(dataset, prepared, renderer) if renderer else Survey()
    if run.perplexity_filter:
        notes.append("perplexity_filter is not applied here: it needs the model, so a run may train fewer rows; --perplexity applies it.")
    faults = [asdict(refusal) for refusal in (*dataset.refused, *measured.refused)]
    unusable = {refusal.row for refusal in measured.refused}
    counts = _Counts(dataset.rows, unusable, tell)
    tokens = measured.tokens() if tokenizer else None
    return {
        "format": dataset.format,
        "why": dataset.why,
        "rows": len(dataset.rows) + len(dataset.refused),
        "usable": counts.usable,
        "refused": sorted(faults, key=lambda fault: int(fault["row"])),
        "turns_in": counts.roles(counts.read),
        "turns_out": counts.roles(counts.written) if tokenizer else None,
        "trained_turns": counts.trained if tokenizer else None,
        "tokens": tokens,
        "supervised_share": tokens["supervised"] / tokens["total"] if tokens and tokens["total"] else None,
        "histogram": measured.histogram() if tokenizer else None,
        "limits": measured.limits(run.max_length) if tokenizer else None,
        "too_long": measured.too_long(run.max_length) if tokenizer else None,
        "duplicates": _duplicates(counts.prints),
        "boilerplate": boilerplate(dataset.rows),
        "holdout": _holdout(run, counts, prepared, eval_dataset, notes),
        "steps_per_epoch": steps_per_epoch(run, prepared.facts.train_rows) if prepared else None,
        "prepared": _prepared(run, prepared) if prepared else None,
        "sources": [asdict(source) for source in dataset.sources],
        "notes": [*(prepared.facts.notes if prepared else (*dataset.notes, *(renderer.notes() if renderer else ()))), *notes],
        "examples": _examples(dataset.rows, unusable, renderer, examples) if renderer else [],
    }


def steps_per_epoch(run: RunConfig, rows: int) -> int:
    """Return how many optimizer steps see `rows` once."""
    return -(-rows // rows_per_step(run))


def _prepare(
    run: RunConfig, dataset: Dataset, tokenizer: Tokenizer, eval_dataset: Dataset | None, notes: list[str], tell: Tell
) -> Tokenized | None:
    try:
        return prepare(run, dataset, tokenizer, eval_dataset=eval_dataset, progress=partial(tell, "writing the rows out"))
    except DataError as error:
        notes.append(error.problem.message)
        return None


def _survey(dataset: Dataset, prepared: Tokenized | None, renderer: Renderer) -> Survey:
    """Return the measures of every row: those that were kept while preparing, unless that left rows out."""
    if prepared is not None and prepared.survey.rows == len(dataset.rows):
        return prepared.survey
    return survey(dataset.rows, renderer)


class _Counts:
    """Turns and fingerprints, counted in one pass over the rows."""

    def __init__(self, rows: Sequence[Row], unusable: set[int], tell: Tell) -> None:
        self.prints = Prints(sketches=True)
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.trained = self.usable = 0
        self.characters: list[int] = []
        for place, row in enumerate(rows):
            if place % _TOLD_EVERY == 0:
                tell("comparing the rows", place, len(rows))
            self.prints.add(row.chat)
            self.characters.append(sum(len(turn.content) for turn in row.chat.turns))
            said = Counter(turn.role for turn in row.chat.turns)
            self.read += said
            if row.number in unusable:
                continue
            self.usable += 1
            self.written += said
            self.trained += sum(turn.role == "assistant" and turn.trained for turn in row.chat.turns)

    def roles(self, counted: Counter[str]) -> dict[str, int]:
        return {role: counted[role] for role in ROLES if role != "tool" or self.read["tool"]}


def count_copies(rows: Iterable[Row], stopping: Callable[[], None] = lambda: None) -> dict[str, int]:
    """Return how many rows are exact copies of earlier ones, and how many are nearly; slow, `stopping` raises to interrupt."""
    prints = Prints(sketches=True)
    for row in rows:
        stopping()
        prints.add(row.chat)
    return _duplicates(prints)


def count_leaks(trained: Iterable[Row], measured: Iterable[Row], stopping: Callable[[], None] = lambda: None) -> int:
    """Return how many of the rows to be measured on are also trained on, or nearly; slow, `stopping` raises to interrupt."""
    prints = Prints(sketches=True)
    for row in trained:
        stopping()
        prints.add(row.chat)
    before = len(prints)
    for row in measured:
        stopping()
        prints.add(row.chat)
    return len(leaks(prints, before, stopping))


def _duplicates(prints: Prints) -> dict[str, int]:
    exact = len(prints) - len({*first_of_equal(prints)})
    return {"exact": exact, "near": len(prints) - len({*groups(prints, sources=False)}) - exact}


def _holdout(run: RunConfig, counts: _Counts, prepared: Tokenized | None, eval_dataset: Dataset | None, notes: list[str]) -> dict[str, int]:
    """Return the rows held out, and of `eval_data` those that are trained on too, else the groups on both sides, which are none."""
    if prepared is not None:
        return {"rows": prepared.facts.holdout_rows, "leaks": prepared.facts.leaks + prepared.facts.overlap}
    if eval_dataset is not None:
        trained = len(counts.prints)
        for row in eval_dataset.rows:
            counts.prints.add(row.chat)
        leaked = len(leaks(counts.prints, trained))
        return {"rows": len(eval_dataset.rows) - leaked, "leaks": leaked}
    held = hold_out(counts.prints, counts.characters, run, notes)
    return {"rows": len(held.places), "leaks": held.overlap}


def _prepared(run: RunConfig, prepared: Tokenized) -> Mapping[str, Any]:
    facts = prepared.facts
    return {
        "rows": facts.rows,
        "train_rows": facts.train_rows,
        "holdout_rows": facts.holdout_rows,
        "tokens": facts.tokens,
        "supervised_tokens": facts.supervised_tokens,
        "steps_per_epoch": steps_per_epoch(run, facts.train_rows),
        "refused": dict(facts.refused),
        "dropped": dict(facts.dropped),
        "max_row_tokens": facts.max_row_tokens,
        "notes": list(facts.notes),
    }


def _examples(rows: Sequence[Row], unusable: set[int], renderer: Renderer, wanted: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in rows if wanted else ():
        if row.number not in unusable:
            found.append(_example(renderer.tokens(row), renderer.tokenizer))
        if len(found) >= wanted:
            break
    return found


def _example(row: TokenRow, tokenizer: Tokenizer) -> dict[str, Any]:
    runs: list[list[int]] = []
    before = 0
    for index, trained in zip(row.input_ids, row.trained, strict=True):
        if trained and not before:
            runs.append([])
        if trained:
            runs[-1].append(index)
        before = trained
    return {
        "row": row.row,
        "tokens": [tokenizer.token(index) for index in row.input_ids],
        "ids": list(row.input_ids),
        "trained": list(row.trained),
        "special": list(map(int, special(row.input_ids, tokenizer))),
        "trained_text": [tokenizer.decode(ids) for ids in runs],
    }
