"""The parity gate: the same rows through the adapter and through an export, and what may differ.

An export claims to be the adapter on the original 16-bit base; so that is what it is held against. That the base was in 4 bits
while training is another difference, which no export brings about; it is shown beside it and judged nowhere.

Three things are compared. The loss of every row: rounding moves it a little, an adapter that is missing or a wrong weight
moves it far. The tokens that an answer begins after: one that differs is a fault. The token at which an answer ends: if the
export does not stop there, it never stops.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from qlora_tui.engine.data import Tokenizer
from qlora_tui.engine.export.serving import prompts_with
from qlora_tui.engine.export.target import F16, Q8_0, Rows, Served
from qlora_tui.engine.text import one_line

LIMITS = {"float32": 0.03, "bfloat16": 0.06}
"""Nats a token that the rows may differ by on average, by the type that is computed in; the figures are in the README."""
Q8_LIMIT, SMALLER_LIMIT = 0.1, 0.3
"""The same for weights in 8 bits, and in fewer."""
_TELLING = 0.002
"""Where the adapter moves the rows by less, whether it is in an export cannot be told from losses."""


@dataclass(frozen=True, slots=True)
class Means:
    """Nats a supervised token, row by row: by the adapter on the 16-bit base, by that base alone, and by the export.

    `quantized` are those of the adapter on the base as it was trained, as the run measured them; empty where it did not.
    """

    adapter: Sequence[float]
    base: Sequence[float]
    export: Sequence[float]
    quantized: Sequence[float] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What the gate found. Losses are means over rows; `difference` is the mean over rows of how far each is off."""

    passed: bool
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    engine: str
    rows: int
    data: str
    loss: float
    adapter_loss: float
    base_loss: float
    quantized_loss: float | None
    difference: float
    worst: float
    worst_row: int
    limit: float
    prompts: int
    prompt_tokens_differing: int
    stop: str


def limit_of(type_name: str, kind: str) -> float:
    """Return how far rows may be off on average, in nats a token, computed in this type and with weights of this kind."""
    more = {"": 0.0, F16: 0.0, Q8_0: Q8_LIMIT}
    return max(LIMITS[type_name], more.get(kind, SMALLER_LIMIT))


def judge(rows: Rows, means: Means, served: Served, tokenizer: Tokenizer, limit: float) -> Parity:
    """Return what the gate says of an export."""
    off = [abs(export - adapter) for export, adapter in zip(means.export, means.adapter, strict=True)]
    faults, notes = _loss_faults(means, off, limit)
    prompts, differing, fault = _prompt_fault(rows, served, tokenizer)
    faults += [*fault, *_stop_fault(rows, served, tokenizer), *served.faults]
    worst = max(range(len(off)), key=off.__getitem__)
    return Parity(
        passed=not faults,
        faults=tuple(faults),
        notes=(*notes, *served.notes, *_prompt_notes(prompts, len(rows.chats), tokenizer)),
        engine=served.engine,
        rows=len(off),
        data=rows.name,
        loss=statistics.fmean(means.export),
        adapter_loss=statistics.fmean(means.adapter),
        base_loss=statistics.fmean(means.base),
        quantized_loss=statistics.fmean(means.quantized) if means.quantized else None,
        difference=statistics.fmean(off),
        worst=off[worst],
        worst_row=rows.tokens[worst].row,
        limit=limit,
        prompts=prompts,
        prompt_tokens_differing=differing,
        stop="" if rows.stop is None else tokenizer.token(rows.stop),
    )


def _loss_faults(means: Means, off: Sequence[float], limit: float) -> tuple[list[str], list[str]]:
    """Return what is wrong with the losses, and what they cannot tell."""
    distance = statistics.fmean(off)
    from_base = statistics.fmean(abs(export - base) for export, base in zip(means.export, means.base, strict=True))
    moved = statistics.fmean(abs(adapter - base) for adapter, base in zip(means.adapter, means.base, strict=True))
    if not distance <= limit:  # written so that what is not a number fails too
        near = ": it is the base, without the adapter" if from_base < distance and from_base <= limit else ""
        return [f"its rows differ from the adapter's by {distance:.4f} nats on average, and at most {limit:g} may be rounding{near}"], []
    if moved < _TELLING:
        return [], [f"the adapter moves these rows by {moved:.4f} nats only, so losses cannot tell whether it is in the export"]
    if from_base < distance:
        return [f"it is nearer to the base ({from_base:.4f} nats) than to the adapter ({distance:.4f}): the adapter is not in it"], []
    return [], []


def _prompt_fault(rows: Rows, served: Served, tokenizer: Tokenizer) -> tuple[int, int, list[str]]:
    """Return how many prompts were compared, how many of their tokens differ, and the sentence about the first that does."""
    compared, differing, first = 0, 0, ""
    for expected, found in zip(prompts_with(tokenizer, rows.chats), served.prompts(rows.chats), strict=True):
        if expected is None or found is None:
            continue
        compared += 1
        differing += sum(left != right for left, right in zip_longest(expected, found))
        if expected != found and not first:
            place = next(index for index, (left, right) in enumerate(zip_longest(expected, found)) if left != right)
            shown = [one_line(repr(tokenizer.decode(ids[place : place + 8])), limit=80) for ids in (expected, found)]
            first = f"token {place + 1} of a prompt begins {shown[1]}, and {shown[0]} was trained"
    return compared, differing, [f"it writes chats otherwise than they were trained ({differing} tokens): {first}"] if first else []


def _stop_fault(rows: Rows, served: Served, tokenizer: Tokenizer) -> list[str]:
    if rows.stop is None or rows.stop in served.stops:
        return []
    known = ", ".join(one_line(tokenizer.token(stop), limit=40) for stop in sorted(served.stops)) or "nothing"
    return [
        f"answers were trained to end with {one_line(tokenizer.token(rows.stop), limit=40)}, and it stops at {known}: it would not stop"
    ]


def _prompt_notes(compared: int, chats: int, tokenizer: Tokenizer) -> list[str]:
    if compared == chats:
        return []
    why = "tools, or are texts of another form than chats" if tokenizer.template else "no single question"
    return [f"{chats - compared} of {chats} prompts have {why} and were not compared"]
