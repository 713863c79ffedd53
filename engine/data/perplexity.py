"""Which answers the base already knows: the rule of the triage, and rows taken out of what was prepared.

Perplexity is exp of the mean loss of a row's supervised tokens, in nats. An answer far below the threshold is one that the base
would write itself, learned by heart or boilerplate: training on it costs time and teaches nothing. Very high ones are noise or
another language; they are told and never left out, since new knowledge looks the same. How they are measured is `train`'s.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from qlora_tui.engine.data.prepare import PreparedFacts, Tokenized
from qlora_tui.engine.data.render import TokenRow
from qlora_tui.engine.data.store import TokenRows
from qlora_tui.engine.spec import RunConfig

EXEMPT_TOKENS = 16
"""Shorter answers are never left out: a right "Yes" is likely whatever the base knows."""
USUAL = 3.0
"""The threshold that is offered: most answers that a base makes itself, and hardly one that is new to it, lie under it."""
_EDGES = (1.5, 3.0, 10.0, 30.0, 100.0)
_FINE_EDGES = (1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0)
_LOOK_UP_EVERY = 256
_MOST_NATS = 700.0  # exp of more is no float


@dataclass(frozen=True, slots=True)
class Judged:
    """Places of the training rows that are left out, each with its perplexity, and what a person should know of the choice."""

    left_out: Mapping[int, float]
    notes: tuple[str, ...]


def perplexity(mean: float) -> float:
    """Return exp of `mean` nats a token; what is no number counts as the largest, since nothing is known of it."""
    return math.exp(mean if mean < _MOST_NATS else _MOST_NATS)


def targets(row: TokenRow) -> int:
    """Return how many tokens of `row` are predicted: its first token never is."""
    return row.trained.count(1, 1)


def long_answers(rows: TokenRows, stopping: Callable[[], None]) -> array[int]:
    """Return the places of the rows that are not exempt; `stopping` is called every few rows and raises to interrupt."""
    found = array("q")
    for place, row in enumerate(rows):
        if place % _LOOK_UP_EVERY == 0:
            stopping()
        if targets(row) >= EXEMPT_TOKENS:
            found.append(place)
    return found


def digest(rows: TokenRows, stopping: Callable[[], None]) -> str:
    """Return a digest of the tokens and masks of `rows`, in their order."""
    state = blake2b(digest_size=16)
    for place, row in enumerate(rows):
        if place % _LOOK_UP_EVERY == 0:
            stopping()
        state.update(len(row.trained).to_bytes(8, "little") + row.input_ids.tobytes() + row.trained)
    return state.hexdigest()


def judge(run: RunConfig, rows: int, places: Sequence[int], means: Sequence[float]) -> Judged:
    """Choose what `run` leaves out of `rows` training rows, given the mean nats a token of those at `places`.

    At most `perplexity_drop_most` of all rows go. Where more are under the threshold the lowest go and those nearest to it
    stay: of them it is least certain that the base knows them. Rows that are equal go in their order.
    """
    threshold = run.perplexity_filter
    under = sorted((mean, place) for place, mean in zip(places, means, strict=True) if perplexity(mean) < threshold)
    most = most_of(run, rows)
    notes = [_histogram(places, means, threshold), *_exempt(rows - len(places))]
    if len(under) > most:
        share = share_for(len(under), rows)
        notes.append(
            f"{len(under)} answers are under perplexity {threshold:g}, but at most {run.perplexity_drop_most:.0%} of {rows} rows"
            f" are left out: the {most} lowest went, those nearest to it stay. perplexity_drop_most={share:g} leaves out all of them."
        )
    return Judged({place: perplexity(mean) for mean, place in under[:most]}, tuple(notes))


def most_of(run: RunConfig, rows: int) -> int:
    """Return how many of `rows` training rows may be left out at most."""
    return math.floor(run.perplexity_drop_most * rows + 1e-9)


def share_for(number: int, rows: int) -> float:
    """Return the smallest `perplexity_drop_most`, in whole percents, that lets `number` of `rows` rows go."""
    return math.ceil(100 * number / rows - 1e-9) / 100


def histogram(perplexities: Sequence[float], threshold: float) -> list[tuple[float, float, int]]:
    """Return answers by perplexity in bins from, to, how many; the last ends nowhere, and one begins at `threshold`.

    >>> histogram([1.2, 2.5, 4000.0], 3.0)[:3]
    [(1.0, 1.5, 1), (1.5, 2.0, 0), (2.0, 3.0, 1)]
    """
    edges = [1.0, *sorted({*_FINE_EDGES, threshold}), math.inf]
    ordered = sorted(perplexities)
    below = [0, *(bisect_left(ordered, edge) for edge in edges[1:])]  # nothing is under 1
    steps = zip(itertools.pairwise(edges), itertools.pairwise(below), strict=True)
    return [(low, high, most - least) for (low, high), (least, most) in steps]


def without(tokenized: Tokenized, judged: Judged, threshold: float) -> Tokenized:
    """Return `tokenized` without the training rows that are left out, counted and listed; what is held out stays whole."""
    rows, gone = tokenized.train, judged.left_out
    train = rows.at([place for place in range(len(rows)) if place not in gone])
    reason = f"the base knows the answer: perplexity under {threshold:g}"
    lost, trained, tokens = bytearray(tokenized.lost), 0, 0
    for place in sorted(gone):
        row = rows[place]
        told = {
            "row": row.row,
            "reason": reason,
            "perplexity": round(gone[place], 6),
            "tokens": len(row.input_ids),
            "supervised": targets(row),
        }
        lost += json.dumps(told).encode() + b"\n"
        trained += row.trained.count(1)
        tokens += len(row.input_ids)
    facts = _facts(tokenized.facts, len(gone), tokens, trained, reason)
    longest = max([*train.lengths, *tokenized.holdout.lengths], default=0)
    facts = dataclasses.replace(facts, max_row_tokens=longest, notes=(*facts.notes, *judged.notes))
    return dataclasses.replace(tokenized, train=train, facts=facts, lost=bytes(lost))


def _facts(facts: PreparedFacts, rows: int, tokens: int, trained: int, reason: str) -> PreparedFacts:
    return dataclasses.replace(
        facts,
        train_rows=facts.train_rows - rows,
        tokens=facts.tokens - tokens,
        supervised_tokens=facts.supervised_tokens - trained,
        dropped={**facts.dropped, reason: rows} if rows else facts.dropped,
    )


def _histogram(places: Sequence[int], means: Sequence[float], threshold: float) -> str:
    """Return how many answers lie where, and what the two ends mean."""
    edges = sorted({*_EDGES, threshold})
    counts = [0] * (len(edges) + 1)
    for mean in means:
        counts[sum(perplexity(mean) >= edge for edge in edges)] += 1
    names = [
        f"under {edges[0]:g}",
        *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)),
        f"{edges[-1]:g} and more",
    ]
    told = ", ".join(f"{name}: {count}" for name, count in zip(names, counts, strict=True))
    return (
        f"perplexity of {len(places)} answers by the base: {told}. The base knows the lowest already;"
        " the highest are noise, another language, or new to it, and stay."
    )


def _exempt(short: int) -> list[str]:
    return [f"{short} answers of fewer than {EXEMPT_TOKENS} tokens were not judged by perplexity."] if short else []
