"""Sections on what was done with an adapter after its run: answers that were judged, and exports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qlora_tui.engine import judge
from qlora_tui.engine.export import records, words
from qlora_tui.engine.report.blocks import Block, Points, Table, Text
from qlora_tui.engine.report.seen import Seen
from qlora_tui.engine.units import count


def judged(seen: Seen, folder: Path) -> Iterator[Block]:
    """Say which answers were preferred, by whom and how sure that is."""
    pairs = judge.read_pairs(folder)
    found = [one for one in judge.tallies(pairs) if one.judged]
    if not found:
        return
    yield Text(f"Base and tuned answered {count(len(pairs.answers))} held-out prompts, greedily.")
    rows = [[_judge(one), *map(count, (one.judged, one.wins, one.ties + one.same, one.losses)), judge.percents(one)] for one in found]
    yield Table(["judge", "pairs", "tuned", "tie", "base", "win rate"], rows)
    yield Points([_sentence(one) for one in found])
    yield Text(
        "A tie counts half; the interval is Wilson's. An endpoint is asked twice, with the places swapped, and disagreement with itself is "
        "a tie. Equal answers are ties that nobody is asked about."
    )


def exports(seen: Seen, folder: Path) -> Iterator[Block]:
    """Say what was exported and how far it is from the adapter; a record that another version or a hand left odd is said to be so."""
    for record in records.read_list(folder):
        try:
            told = [f"{word}: {text}" for word, text in words.lines(record)]
        except (KeyError, TypeError, ValueError, AttributeError):
            told = [f"{records.LIST} holds a record that this version cannot read"]
        yield Points(told)


def _judge(found: judge.Tally) -> str:
    return "you, blind" if found.by == judge.ME else found.by


def _sentence(found: judge.Tally) -> str:
    name = "by you" if found.by == judge.ME else f"by {found.by}"
    left = {"skipped": found.skipped, "without a verdict": found.unclear}
    told = ", ".join(f"{count(number)} {what}" for what, number in left.items() if number)
    cost = f" It cost ${found.dollars:.2f}." if found.dollars else ""
    return f"{name}: {judge.words_of(found)}{f' ({told})' if told else ''}.{cost}"
