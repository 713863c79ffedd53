"""How often the tuned answer was preferred, with an interval: in numbers, in a sentence, as JSON and for the report.

The win rate is (wins + ties / 2) / judged pairs. Its interval is Wilson's: it stays within 0 and 1, and is sound for twenty pairs
where the usual one is not. Ties make outcomes less spread than Wilson assumes, so with many of them it is a little too wide, never
too narrow.

Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from qlora_tui.engine.judge.kept import Pairs, Said, read_pairs

_Z = NormalDist().inv_cdf(0.975)
_SURE_ENOUGH = 20
"""Fewer pairs than this show only what is plain to see anyway."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What one judge preferred. `same` counts pairs of equal answers, which nobody is asked about and which are ties.

    `skipped` and `unclear` pairs do not count; `dollars` is what the judge has cost in this run.
    """

    by: str
    wins: int = 0
    losses: int = 0
    ties: int = 0
    same: int = 0
    skipped: int = 0
    unclear: int = 0
    dollars: float = 0.0

    @property
    def judged(self) -> int:
        """Return how many pairs count."""
        return self.wins + self.losses + self.ties + self.same

    @property
    def rate(self) -> float | None:
        """Return the share that the tuned answers won, ties half; None before anything was judged."""
        return (self.wins + (self.ties + self.same) / 2) / self.judged if self.judged else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the rate."""
        return None if self.rate is None else wilson(self.rate, self.judged)


def wilson(share: float, number: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `number` independent outcomes.

    >>> [round(end, 3) for end in wilson(0.5, 20)]
    [0.299, 0.701]
    """
    wide = _Z**2 / number
    middle = (share + wide / 2) / (1 + wide)
    reach = _Z * math.sqrt(share * (1 - share) / number + wide / (4 * number)) / (1 + wide)
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))  # rounding must not put the share outside


def tally(pairs: Pairs, judge: str) -> Tally:
    """Return how `judge` has judged the answers that are there now."""
    verdicts = pairs.verdicts(judge)
    asked = [answer for answer in pairs.answers if not answer.same]
    said: list[Said | None] = [verdicts.get(answer.pair) for answer in asked]
    same = sum(answer.same for answer in pairs.answers)
    counts = {name: said.count(name) for name in ("tuned", "base", "tie", "skip", "unclear")}
    return Tally(
        judge, counts["tuned"], counts["base"], counts["tie"], same, counts["skip"], counts["unclear"], dollars=pairs.dollars(judge)
    )


def tallies(pairs: Pairs) -> list[Tally]:
    """Return what each judge preferred, the person first."""
    return [tally(pairs, judge) for judge in pairs.judges()]


def percents(found: Tally) -> str:
    """Return the win rate as people read it; empty before there is one.

    >>> percents(Tally("me", 8, 1, 1))
    '85 % (95 % interval 54-97)'
    """
    if found.rate is None or found.interval is None:
        return ""
    low, high = found.interval
    return f"{found.rate * 100:.0f} % (95 % interval {low * 100:.0f}-{high * 100:.0f})"


def words_of(found: Tally) -> str:
    """Say in one sentence what a judge preferred, the interval included in the verdict."""
    if found.interval is None:
        return "nothing is judged yet"
    low, high = found.interval
    if low > 0.5:
        verdict = "the tuned answers are preferred"
    elif high < 0.5:
        verdict = "the base's answers are preferred: do not use this adapter for this"
    else:
        verdict = "no clear preference: the interval holds 50 %"
    few = f"; {_count(found.judged, 'pair')} {'is' if found.judged == 1 else 'are'} few" if found.judged < _SURE_ENOUGH else ""
    return f"{verdict}, win rate {percents(found)}{few}"


def document(folder: Path) -> dict[str, Any]:
    """Return what is known of a run's answers and judgements as JSON tells it; shares are between 0 and 1."""
    pairs = read_pairs(folder)
    judges = [
        {
            "judge": found.by,
            "judged": found.judged,
            "wins": found.wins,
            "losses": found.losses,
            "ties": found.ties + found.same,
            "same": found.same,
            "skipped": found.skipped,
            "unclear": found.unclear,
            "win_rate": found.rate,
            "interval": found.interval,
            "dollars": round(found.dollars, 6),
            "verdict": words_of(found),
        }
        for found in tallies(pairs)
    ]
    wanted = pairs.sheet.rows if pairs.sheet else 0
    return {"run": folder.name, "wanted": wanted, "answered": len(pairs.answers), "judges": judges}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
