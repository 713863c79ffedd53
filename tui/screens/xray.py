"""What the data page tells about a dataset, as lines: format, faults, lengths, limits, what is trained, copies, hold-out, rows."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence

from textual.content import Content

from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import gib
from qlora_tui.tui.lengths import limit_words, share, split_rows
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.screens.desk import DataLook

_LABEL = 10
_TALL = 18
"""Lines from which lengths get a bar each, below one another."""
_BARS = 8
_SAMPLES = 2


def reading_line(done: int, total: int, width: int) -> Content:
    """Return how far the reading is; nobody knows how much there is on a hub."""
    if not total:
        return cells.assemble([("reading …", cells.DIM)])
    bar = cells.bar([(float(done), "█", cells.MAIN)], float(total), min(30, max(5, width - 40)))
    return cells.assemble([("reading  ", cells.DIM), *bar, (f"  {done * 100 // total} % of {gib(total)}", "")])


def found_lines(look: DataLook, run: RunConfig, width: int, height: int = 10, cost: str = "") -> list[Content]:
    """Return what was found in the data in about `height` lines; every text of theirs is made safe here.

    Args:
        look: what was found.
        run: what would be done with it.
        width: cells to draw in.
        height: lines to draw in; faults and first rows take what the rest leaves.
        cost: what the limit that would keep 99 % of the rows costs in memory.
    """
    if look.problem:
        lines = [cells.assemble([(f"✖ {one_line(look.problem, limit=400)}", cells.BAD)])]
        if look.hint:
            lines.append(cells.assemble([("  " + one_line(look.hint, limit=400), cells.DIM)]))
        return lines + _fault_lines(look, run, width, max(1, height - 3))
    head = [cells.assemble([("✔ ", cells.GOOD), (f"{look.rows:,} rows", "bold"), (f"  {look.format}{_tokens(look)}", "")])]
    if look.why:
        head.append(cells.assemble([("  " + one_line(look.why, limit=200), cells.DIM)]).truncate(width, ellipsis=True))
    tall = height >= _TALL
    facts = [*_unwritten_lines(look, width), *_length_lines(look, width, tall=tall), *_limit_lines(look, run, width, cost)]
    facts += _rest_lines(look, run, width, tall=tall)
    lines = [*head, *_fault_lines(look, run, width, max(1, height - len(head) - len(facts) - 1)), *facts]
    room = height - len(lines) - 1
    return [*lines, *([Content(" "), *_sample_lines(look, width)[:room]] if room >= _SAMPLES and look.samples else [])]


def _label(text: str) -> Part:
    return (f"  {text:<{_LABEL}}", cells.DIM)


def _length_lines(look: DataLook, width: int, *, tall: bool) -> list[Content]:
    lengths = look.lengths
    if not lengths.tokens:
        return []
    middle, most, nearly = (lengths.at(part) for part in (0.5, 0.95, 0.99))
    bins = _fewer(look.histogram, _BARS if tall else 16)
    marks = f"{lengths.tokens[0]:,} to {lengths.longest:,}; p50 {middle:,}, p95 {most:,}, p99 {nearly:,}"
    highest = max((rows for _, _, rows in bins), default=0)
    if not tall:
        # a bin that is not empty shows as more than the lowest tick
        drawn = "".join(cells.spark([rows], 1, high=float(highest)) if rows else " " for _, _, rows in bins)
        parts = [_label("lengths"), (drawn, cells.MAIN), (f"  {marks}", "")]
        return [cells.assemble(parts).truncate(width, ellipsis=True)]
    counted = len(lengths.tokens)
    lines = [cells.assemble([_label("lengths"), (marks, "")]).truncate(width, ellipsis=True)]
    room = max(10, width - _LABEL - 2 - 18 - 8)
    for low, high, rows in bins:
        bar = "█" * -(-rows * min(room, 60) // max(1, highest))
        span = f"{low:,} - {high:,}"
        lines.append(
            cells.assemble([_label(""), (f"{span:>16}  ", cells.DIM), (bar, cells.MAIN), (f" {share(rows / counted) if rows else ''}", "")])
        )
    return lines


def _fewer(bins: Sequence[tuple[int, int, int]], most: int) -> list[tuple[int, int, int]]:
    """Join neighbours until there are at most `most` bins."""
    found = list(bins)
    while len(found) > most:
        pairs = [found[index : index + 2] for index in range(0, len(found), 2)]
        found = [(pair[0][0], pair[-1][1], sum(rows for _, _, rows in pair)) for pair in pairs]
    return found


def _limit_lines(look: DataLook, run: RunConfig, width: int, cost: str) -> list[Content]:
    """Say what the limit does to the rows; a guess says that it is one."""
    lengths = look.lengths
    if not lengths.tokens:
        return []
    over = lengths.over(run.max_length)
    told = limit_words(run.max_length, over, lengths.lost(run.max_length), lengths.keeps(0.99), cost)
    if not lengths.measured:
        told = (
            f"at {run.max_length:,}: by a guess, {share(over)} of rows are longer"
            if over
            else f"at {run.max_length:,}: no row seems longer"
        )
    style = cells.WARN if over else ""
    mark = "▲ " if over else ""
    wrapped = textwrap.wrap(mark + told, max(20, width - _LABEL - 2))
    return [cells.assemble([_label("" if index else "limit"), (line, style)]) for index, line in enumerate(wrapped)]


def _rest_lines(look: DataLook, run: RunConfig, width: int, *, tall: bool) -> list[Content]:
    """Say what share is trained, how many rows are copies, and what is held out; the first two share a line where room is short."""
    trained, copies = _trained_words(look), _copies_words(look)
    style = cells.WARN if look.copies[0] and run.filter_duplicates == "off" else ""
    lines = []
    if trained and copies and not tall:
        lines.append(cells.assemble([_label("trained"), (f"{trained}   ", ""), ("copies ", cells.DIM), (copies, style)]))
    else:
        more = ": the answers and what ends them" if tall else ""
        lines += [cells.assemble([_label("trained"), (trained + more, "")])] if trained else []
        lines += [cells.assemble([_label("copies"), (copies, style)])] if copies else []
    if look.rows:
        over = round(look.rows * look.lengths.over(run.max_length)) if run.too_long == "drop" else 0
        told = _held_words(run, look, *split_rows(run, max(1, look.rows - over), look.measured_on))
        lines.append(cells.assemble([_label("held out"), (told, "")]))
    return [line.truncate(width, ellipsis=True) for line in lines]


def _trained_words(look: DataLook) -> str:
    total = sum(look.lengths.tokens)
    return f"{share(look.lengths.trained / total)} of the tokens" if look.lengths.measured and total else ""


def _copies_words(look: DataLook) -> str:
    exact, near, among = look.copies
    if not among:
        return ""
    seen = f" among the first {among:,} rows" if among < look.rows else ""
    return f"{exact:,} exact, {near:,} nearly the same{seen}" if exact or near else f"none{seen}"


def _held_words(run: RunConfig, look: DataLook, trained: int, held: int) -> str:
    if look.measured_on is not None:
        where = one_line(run.eval_data, limit=60) if run.eval_data else "the file that the data bring for it"
        return f"none: {held:,} rows of {where} are measured on"
    if run.eval_data:
        return f"none: {one_line(run.eval_data, limit=60)} is measured on"
    return f"about {held:,} rows to measure on, {trained:,} to train" if held else "none: nothing is measured"


def _tokens(look: DataLook) -> str:
    """Return how many tokens there are; what is guessed says so."""
    if not look.tokens:
        return ""
    return f"  {look.tokens:,} tokens" if look.lengths.measured else f"  about {look.tokens:,} tokens, guessed from characters"


def _fault_lines(look: DataLook, run: RunConfig, width: int, room: int) -> list[Content]:
    if not look.refused:
        return []
    rows = f"{look.refused:,} row{'s' if look.refused > 1 else ''}"
    if run.skip_bad_rows:
        head: list[Part] = [(f"▲ {rows} cannot be used and will be left out", cells.WARN), ("   ctrl+o takes that back", cells.DIM)]
    else:
        way = "   mend them, or ctrl+o goes on without them" if width >= 70 else "   ctrl+o: go on without"
        head = [(f"✖ {rows} cannot be used", cells.BAD), (way, cells.DIM)]
    lines = [cells.assemble(head)]
    shown = look.faults if look.refused <= room else look.faults[: max(1, room - 1)]
    lines += [cells.assemble([("  " + one_line(fault, limit=300), "")]).truncate(width, ellipsis=True) for fault in shown]
    if look.refused > len(shown) and room > 1:
        lines.append(cells.assemble([(f"  and {look.refused - len(shown):,} more: qlora-tui data PATH lists them", cells.DIM)]))
    return lines


def _unwritten_lines(look: DataLook, width: int) -> list[Content]:
    """Say which rows the model's template cannot write out: they are left out."""
    refused = look.lengths.refused
    if not refused:
        return []
    number, reason = refused[0]
    rows = f"{len(refused):,} row{'s' if len(refused) > 1 else ''}"
    told = f"▲ {rows} cannot be written by this model's template, such as row {number}: {one_line(reason, limit=200)}"
    return [cells.assemble([(told, cells.WARN)]).truncate(width, ellipsis=True)]


def _sample_lines(look: DataLook, width: int) -> list[Content]:
    lines = []
    for role, text in itertools.islice(look.samples, 20):
        style = cells.MAIN if role == "assistant" else cells.DIM
        parts: list[Part] = [(f"  {one_line(role, limit=12):<{_LABEL}}", style), (one_line(text, limit=400), "")]
        lines.append(cells.assemble(parts).truncate(width, ellipsis=True))
    return lines
