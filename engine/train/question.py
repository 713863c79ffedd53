"""Held-out answers after the wrong question: what tells the content of answers from their manner.

A held-out loss falls as well where only the manner of the answers was learned: how long they are, how they begin, which words
they like. Manner helps an answer after any question, content after its own alone. So each answer is measured once more after
the question of another held-out row, base against tuned, and what it gained there is taken from what it gained at home.

Only rows with one trained part that follows something are used: of a chat with several answers the later questions would
stay the right ones, and a plain text has no question. They are cut together as token ids, so the answers stay the same to
the token.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_tui.engine import evaluate
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.evaluate import RowLoss, Scorecard
from qlora_tui.engine.events import Finding

MOST_PAIRS, LEAST_PAIRS = 64, 8
"""Answers that are measured after another question at most; with fewer than the least there is nothing to say."""
LEAST_SHARE = 0.05
"""Of a gain: what only the own question brings has to be this much, so that nothing tiny counts because it is sure."""
_SHORTEST_QUESTION = 2
"""Tokens: one alone is the token that every text begins with, or a first token that nothing can predict."""

_SHUFFLED = (
    "are the answers beside the right questions? a column may be shuffled",
    "read rows: qlora-tui data --examples",
    "a real evaluation, by qlora-tui judge or a task of your own",
)
_STYLE = (
    "none needed if manner is what you want to teach",
    "read rows: qlora-tui data --examples",
    "a real evaluation, by qlora-tui judge or a task of your own",
)
_RULE = f"what only the own question brings is not surely above zero, or below {LEAST_SHARE:.0%} of the gain"


@dataclass(frozen=True, slots=True)
class Pair:
    """A held-out row's answer after another row's question; `place` is that of the row among those held out."""

    place: int
    row: TokenRow


@dataclass(frozen=True, slots=True)
class Own:
    """What the answers of the pairs gained, in nats a token, means of rows; each `interval` is one of 95 %, paired by row.

    `more` is what they gained after their own question beyond what they gained after the other. `helps` is by how much the
    own question makes an answer likelier than the other one does, to the tuned model: manner leaves `more` at zero, and answers
    that do not belong to their questions leave both there.
    """

    gain: float
    other_gain: float
    more: float
    interval: tuple[float, float]
    helps: float
    helps_interval: tuple[float, float]


def pairs(rows: Sequence[TokenRow], longest: int, seed: int) -> list[Pair]:
    """Return at most `MOST_PAIRS` answers of the held-out `rows`, each after a question that is not its own; none if too few.

    The question is that of the next row, in a circle, whose question and answer are both other ones, and after which the answer
    ends within `longest` tokens. Where labels are few, the next row often has the same: its question would not be wrong.
    """
    chosen = sorted(random.Random(f"{seed}/question").sample(range(len(rows)), min(len(rows), MOST_PAIRS)))
    parts = [(place, *found) for place in chosen if (found := _split(rows[place])) is not None]
    made = []
    for at, (place, asked, answer) in enumerate(parts):
        others = ((other, said) for _, other, said in (*parts[at + 1 :], *parts[:at]))
        fits = (other for other, said in others if other != asked and said != answer and len(other) + len(answer) <= longest)
        if (other := next(fits, None)) is not None:
            made.append(Pair(place, TokenRow(rows[place].row, other + answer, b"\0" * len(other) + b"\1" * len(answer))))
    return made if len(made) >= LEAST_PAIRS else []


def _split(row: TokenRow) -> tuple[array[int], array[int]] | None:
    """Return the ids before the trained part and those of it; None where there is no question, or more than one answer."""
    first, end = row.trained.find(1), row.trained.rfind(1) + 1
    if first < _SHORTEST_QUESTION or 0 in row.trained[first:end]:
        return None
    return row.input_ids[:first], row.input_ids[first:end]


def own(base: Sequence[RowLoss], tuned: Sequence[RowLoss], other_base: Sequence[RowLoss], other_tuned: Sequence[RowLoss]) -> Own:
    """Compare four measurements of the same answers: after their own question and after another one, by base and tuned.

    Raises:
        ValueError: they are not of the same answers.
    """
    every = list(zip(base, tuned, other_base, other_tuned, strict=True))
    if any(len({(loss.row, loss.tokens) for loss in four}) != 1 for four in every):
        raise ValueError("the four measurements are not of the same answers")
    gains = [before.mean - after.mean for before, after, _, _ in every]
    others = [before.mean - after.mean for _, _, before, after in every]
    more, interval = evaluate.mean_interval([mine - other for mine, other in zip(gains, others, strict=True)])
    helps, helps_interval = evaluate.mean_interval([other.mean - mine.mean for _, mine, _, other in every])
    return Own(evaluate.mean_interval(gains)[0], evaluate.mean_interval(others)[0], more, interval, helps, helps_interval)


def manner(step: int, card: Scorecard, found: Own) -> Finding | None:
    """Return the finding that a sure gain may be one of manner alone, or None; `card` is the scorecard of all held-out rows."""
    low, high = found.interval
    if not (card.interval[0] > 0 and (low <= 0 or found.more < LEAST_SHARE * found.gain)):
        return None
    gained = f"held-out answers gained {found.gain:.2f} nats a token after their own question and {found.other_gain:.2f} after another one"
    helped = found.helps_interval[0] > 0 and found.helps >= LEAST_SHARE * found.gain
    right = f"helps by {found.helps:.2f} nats, hardly more than it helped the base" if helped else "is no clear help"
    apart = f"{abs(found.more):.2f} {'more' if found.more >= 0 else 'less'} ({low:+.2f} to {high:+.2f})"
    doubt = f"{gained}, {apart}: perhaps only their manner was learned, not what they say"
    numbers = {
        "gain": found.gain,
        "other_gain": found.other_gain,
        "more": found.more,
        "interval": found.interval,
        "helps": found.helps,
        "helps_interval": found.helps_interval,
        "rule": _RULE,
    }
    return Finding("manner", "warn", step, f"{doubt}; the right question {right}", _STYLE if helped else _SHUFFLED, numbers)
