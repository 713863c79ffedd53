"""The scorecard and what was measured beside it, in lines: after a run without a screen, and for `qlora-tui eval`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_tui.engine.events import Evaluated, Probed
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import count, percent

PROBES: Mapping[str, str] = {"general": "general text", "train": "training rows", "other_question": "after another row's question"}
_FIGURES = ("row", "base_loss", "loss")
_TEXT = 70


def card_lines(card: Evaluated, most: int = 3) -> list[str]:
    """Return the comparison of base and tuned in a few lines, with the rows that lost most, at most `most` of them."""
    if card.base_loss is None or card.drop is None:
        return [f"held-out loss: {card.loss:.4f} on {count(card.rows)} rows"]
    lines = [f"held-out loss: base {card.base_loss:.4f} -> tuned {card.loss:.4f} at step {card.step}. {one_line(card.verdict)}"]
    if card.interval is not None and card.better_share is not None:
        share = f"{percent(card.better_share)} of {count(card.rows)} rows got better"
        lines.append(f"  mean row {change(card.drop)}, 95 % interval {card.interval[0]:+.4f} to {card.interval[1]:+.4f}; {share}")
    return lines + [f"  {text}" for text in worst_lines(card, most)]


def worst_lines(card: Evaluated, most: int) -> list[str]:
    """Return the rows that lost most against the base, one a line, worst first."""
    told = [row for row in card.worst[:most] if all(isinstance(row.get(name), (int, float)) for name in _FIGURES)]
    return [f"worse: row {row['row']}, {row['base_loss']:.2f} -> {row['loss']:.2f}: {about(row)}" for row in told]


def about(row: Mapping[str, Any]) -> str:
    """Return what a row asks and answers, short enough for one line."""
    told = [one_line(row.get(name, ""), limit=_TEXT) for name in ("prompt", "answer")]
    return " -> ".join(text for text in told if text)


def probe_line(probed: Probed) -> str:
    """Return what one of the last checks found.

    >>> print(probe_line(Probed(3, "general", "", 23, 4000, 3.0, 3.1, -0.1, (-0.2, 0.0), 0.2)))
    general text: base 3.0000 -> tuned 3.1000, mean row 0.1000 nats worse (-0.2000 to +0.0000), on 23 rows
    """
    losses = f"base {probed.base_loss:.4f} -> tuned {probed.loss:.4f}"
    told = f"mean row {change(probed.drop)} ({probed.interval[0]:+.4f} to {probed.interval[1]:+.4f}), on {count(probed.rows)} rows"
    own = ""
    if probed.own_more is not None and probed.own_interval is not None:
        low, high = probed.own_interval
        own = f"; after their own question {change(probed.own_more, 'more', 'less')} ({low:+.4f} to {high:+.4f})"
    return f"{PROBES.get(probed.name, one_line(probed.name))}: {losses}, {told}{own}"


def change(drop: float, gained: str = "better", lost: str = "worse") -> str:
    """Return a drop as people say it.

    >>> change(1.25), change(-0.5)
    ('1.2500 nats better', '0.5000 nats worse')
    """
    return f"{abs(drop):.4f} nats {gained if drop >= 0 else lost}"
