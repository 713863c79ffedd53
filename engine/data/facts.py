"""What a dataset holds and what would be trained: the numbers of `qlora-tui data`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qlora_tui.engine.data.chat import ROLES, Row
from qlora_tui.engine.data.load import Dataset
from qlora_tui.engine.data.prepare import exact_key, hold_out, near_key, without_leaks
from qlora_tui.engine.data.render import Renderer, TokenRow
from qlora_tui.engine.data.tokenizer import Tokenizer
from qlora_tui.engine.errors import BadRow
from qlora_tui.engine.spec import RunConfig


def describe(
    run: RunConfig, dataset: Dataset, tokenizer: Tokenizer | None, examples: int = 0, *, eval_dataset: Dataset | None = None
) -> dict[str, Any]:
    """Return the facts of `qlora-tui data` as JSON-ready values; what needs a tokenizer is null without one.

    `duplicates.near` counts rows that equal an earlier row but for case and spaces, exact copies not included.
    Texts in it are the dataset's own: whoever shows them escapes them.
    """
    rendered, refused = _render_all(dataset.rows, tokenizer)
    usable = [row for row in dataset.rows if tokenizer is None or row.number in rendered]
    kept = [row for row in usable if tokenizer is None or len(rendered[row.number].input_ids) <= run.max_length]
    notes: list[str] = []
    faults = [asdict(refusal) for refusal in dataset.refused] + refused
    return {
        "format": dataset.format,
        "why": dataset.why,
        "rows": len(dataset.rows) + len(dataset.refused),
        "usable": len(usable),
        "refused": sorted(faults, key=lambda fault: int(fault["row"])),
        "turns_in": _by_role(dataset.rows),
        "turns_out": _by_role(usable) if tokenizer else None,
        "trained_turns": sum(turn.role == "assistant" and turn.trained for row in usable for turn in row.chat.turns) if tokenizer else None,
        "tokens": _tokens(list(rendered.values())) if tokenizer else None,
        "too_long": _too_long(list(rendered.values()), run.max_length) if tokenizer else None,
        "duplicates": _duplicates(dataset.rows),
        "holdout": _holdout(run, kept, eval_dataset, notes),
        "sources": [asdict(source) for source in dataset.sources],
        "notes": notes + ([tokenizer.note] if tokenizer and tokenizer.note else []),
        "examples": _examples(usable, rendered, tokenizer, examples) if tokenizer else [],
    }


def _render_all(rows: Sequence[Row], tokenizer: Tokenizer | None) -> tuple[dict[int, TokenRow], list[dict[str, Any]]]:
    if tokenizer is None:
        return {}, []
    renderer = Renderer(tokenizer)
    rendered: dict[int, TokenRow] = {}
    refused: list[dict[str, Any]] = []
    for row in rows:
        try:
            rendered[row.number] = renderer.tokens(row)
        except BadRow as error:
            refused.append({"row": row.number, "line": row.line, "field": error.field, "reason": str(error), "source": ""})
    return rendered, refused


def _by_role(rows: Sequence[Row]) -> dict[str, int]:
    counted = Counter(turn.role for row in rows for turn in row.chat.turns)
    return {role: counted[role] for role in ROLES}


def _tokens(rows: Sequence[TokenRow]) -> dict[str, int]:
    lengths = sorted(len(row.input_ids) for row in rows)
    return {
        "p50": _percentile(lengths, 50),
        "p95": _percentile(lengths, 95),
        "p99": _percentile(lengths, 99),
        "max": lengths[-1] if lengths else 0,
        "total": sum(lengths),
        "supervised": sum(sum(row.trained) for row in rows),
    }


def _percentile(ordered: Sequence[int], share: int) -> int:
    """Return the smallest length that `share` percent of the rows do not exceed."""
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)] if ordered else 0


def _too_long(rows: Sequence[TokenRow], longest: int) -> dict[str, int]:
    longer = [row for row in rows if len(row.input_ids) > longest]
    return {"rows": len(longer), "answer_lost": sum(not any(row.trained[:longest]) for row in longer)}


def _duplicates(rows: Sequence[Row]) -> dict[str, int]:
    exact = len(rows) - len({exact_key(row.chat) for row in rows})
    near = len(rows) - len({near_key(row.chat) for row in rows})
    return {"exact": exact, "near": near - exact}


def _holdout(run: RunConfig, rows: Sequence[Row], eval_dataset: Dataset | None, notes: list[str]) -> dict[str, int]:
    if eval_dataset is not None:
        fresh, leaks = without_leaks(eval_dataset.rows, rows)
        return {"rows": len(fresh), "leaks": leaks}
    held = hold_out(rows, run, notes)
    trained = {near_key(row.chat) for row in rows if row.number not in held}
    return {"rows": len(held), "leaks": sum(near_key(row.chat) in trained for row in rows if row.number in held)}


def _examples(rows: Sequence[Row], rendered: dict[int, TokenRow], tokenizer: Tokenizer, wanted: int) -> list[dict[str, Any]]:
    return [_example(rendered[row.number], tokenizer) for row in rows[:wanted]]


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
        "trained_text": [tokenizer.decode(ids) for ids in runs],
    }
