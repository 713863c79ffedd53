"""What the data page tells about a dataset, as lines: format, faults, lengths, limits, what is trained, copies, hold-out, rows."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence

from textual.content import Content

from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import gib
from qlora_tui.tui import filters
from qlora_tui.tui.datalook import DataLook
from qlora_tui.tui.lengths import TOO_LONG, limit_words, share, used_rows
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.screens.desk import Outlook

_LABEL = 10
_TALL = 18
"""Lines from which lengths get a bar each, below one another."""
_BARS, _LEAST_BARS = 8, 3
_FAULTS = 4
_SAMPLES = 2
_REPEATED = 4


def reading_line(done: int, total: int, width: int) -> Content:
    """Return how far the reading is; nobody knows how much there is on a hub."""
    if not total:
        return cells.assemble([("reading …", cells.DIM)])
    bar = cells.bar([(float(done), "█", cells.MAIN)], float(total), min(30, max(5, width - 40)))
    return cells.assemble([("reading  ", cells.DIM), *bar, (f"  {done * 100 // total} % of {gib(total)}", "")])


def found_lines(
    look: DataLook, run: RunConfig, width: int, height: int = 10, cost: str = "", outlook: Outlook | None = None, known: str = ""
) -> list[Content]:
    """Return what was found in the data in about `height` lines; every text of theirs is made safe here.

    Args:
        look: what was found.
        run: what would be done with it.
        width: cells to draw in.
        height: lines to draw in; faults and first rows take what the rest leaves.
        cost: what the limit that would keep 99 % of the rows costs in memory.
        outlook: how many rows are trained and measured, and the steps; without a model it is guessed here.
        known: what is known of answers that the base knows already.
    """
    if look.problem:
        lines = _wrapped(f"✖ {one_line(look.problem, limit=400)}", cells.BAD, width)
        lines += _wrapped("  " + one_line(look.hint, limit=400), cells.DIM, width) if look.hint else []
        return lines + _fault_lines(look, run, width, max(1, height - len(lines) - 1))
    tall = height >= _TALL
    head = _head_lines(look, width, tall=tall)
    others = [*_limit_lines(look, run, width, cost), *_rest_lines(look, run, width, outlook, known, tall=tall)]
    unwritten = _unwritten_lines(look, width)
    faults = min(look.refused, _FAULTS) + 1 if look.refused else 0
    room = height - len(head) - len(unwritten) - len(others) - faults - 1
    facts = [*unwritten, *_length_lines(look, width, min(_BARS, max(_LEAST_BARS, room)) if tall else 0), *others]
    lines = [*head, *_fault_lines(look, run, width, max(1, height - len(head) - len(facts) - 1)), *facts]
    room = height - len(lines) - 1
    return [*lines, *([Content(" "), *_sample_lines(look, width)[:room]] if room >= _SAMPLES and look.samples else [])]


def _head_lines(look: DataLook, width: int, *, tall: bool) -> list[Content]:
    """Say how many rows there are, of what format, and why it is taken for that; in one line where room is short."""
    rows: list[Part] = [("✔ ", cells.GOOD), (f"{look.rows:,} rows", "bold")]
    why = one_line(look.why, limit=200)
    if tall:
        lines = [cells.assemble([*rows, (f"  {look.format}{_tokens(look)}", "")])]
        return lines + ([cells.assemble([("  " + why, cells.DIM)]).truncate(width, ellipsis=True)] if why else [])
    told = why if why.startswith(f"{look.format}:") else f"{look.format}{': ' if why else ''}{why}"
    return [cells.assemble([*rows, (_tokens(look), ""), (f"  {told}", cells.DIM)]).truncate(width, ellipsis=True)]


def _label(text: str) -> Part:
    return (f"  {text:<{_LABEL}}", cells.DIM)


def _length_lines(look: DataLook, width: int, bars: int) -> list[Content]:
    """Show the lengths with a bar for each of `bars` bins, or in one line without."""
    lengths = look.lengths
    if not lengths.tokens:
        return []
    middle, most, nearly = (lengths.at(part) for part in (0.5, 0.95, 0.99))
    bins = _fewer(look.histogram, bars or 16)
    marks = f"{lengths.tokens[0]:,} to {lengths.longest:,}; p50 {middle:,}, p95 {most:,}, p99 {nearly:,}"
    highest = max((rows for _, _, rows in bins), default=0)
    if not bars:
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
    told = limit_words(run.max_length, over, lengths.lost(run.max_length), lengths.keeps(0.99), cost, run.too_long)
    if not lengths.measured:
        longer = f"by a guess, {share(over)} of rows are longer: {TOO_LONG[run.too_long]}"
        told = f"at {run.max_length:,}: {longer if over else 'no row seems longer'}"
    lost = filters.too_long(look, run)
    if lost.tokens:
        gone = lost.words(about=not (lengths.measured and lengths.whole))
        told += f"; {gone} go" if run.too_long == "drop" else f"; {lost.tokens:,} tokens go"
    style = cells.WARN if over else ""
    mark = "▲ " if over else ""
    kept = (mark + told).replace(" %", "\xa0%").replace(" GiB", "\xa0GiB")  # a figure and its unit stay on one line
    return _labelled("limit", kept, style, width)


def _labelled(label: str, text: str, style: str, width: int) -> list[Content]:
    """Return a fact under its label on as many lines as it takes."""
    wrapped = [line.replace("\xa0", " ") for line in textwrap.wrap(text, max(20, width - _LABEL - 2))]
    return [cells.assemble([_label("" if index else label), (line, style)]) for index, line in enumerate(wrapped)]


def _rest_lines(look: DataLook, run: RunConfig, width: int, outlook: Outlook | None, known: str, *, tall: bool) -> list[Content]:
    """Say what is read and written out, what is trained, copied, held out, repeated, and what the base knows already."""
    lines = [cells.assemble([_label("turns"), part]) for part in _turns_words(look)]
    trained, copies = _trained_words(look), _copies_words(look, run)
    style = cells.WARN if look.copies[0] and run.filter_duplicates == "off" else ""
    more = ": the answers and what ends them" if tall else ""
    lines += [cells.assemble([_label("trained"), (trained + more, "")])] if trained else []
    lines += _labelled("copies", copies, style, width)
    if look.unwritable:
        return [line.truncate(width, ellipsis=True) for line in lines]
    if look.rows:
        lines.append(_held_line(run, look, outlook))
    if look.leaks:
        told = f"{look.leaks:,} of those to measure on are also trained on: not measured"
        lines.append(cells.assemble([_label("leaks"), (told, cells.WARN)]))
    lines += [cells.assemble([_label("note"), (one_line(note, limit=300), "")]) for note in look.lengths.notes]
    lines += _repeated_lines(look, _REPEATED if tall else 1)
    lines += [cells.assemble([_label("triage"), (known, "")])] if known else []
    return [line.truncate(width, ellipsis=True) for line in lines]


def _turns_words(look: DataLook) -> list[Part]:
    """Return turns read against turns written out: what a template loses shows here."""
    turns = look.lengths.turns
    if not turns:
        return []
    seen = len(look.lengths.tokens) + len(look.lengths.refused)
    among = f" in {seen:,} rows looked at" if seen < look.rows else ""
    read = ", ".join(f"{many:,} {one_line(role, limit=12)}" for role, many, _ in turns)
    if turns[0][2] < 0:
        return [(f"{read} read{among}", "")]
    if all(many == written for _, many, written in turns):
        return [(f"{read} read, all of them written out{among}", "")]
    return [(f"{read} read; {', '.join(f'{written:,}' for _, _, written in turns)} written out{among}", cells.WARN)]


def _repeated_lines(look: DataLook, most: int) -> list[Content]:
    """Show passages that many rows share, with their text: a model learns them first."""
    found = look.repeated or ()
    lines = []
    for place, (part, role, text) in enumerate(found[:most]):
        more = f" (1 of {len(found)})" if most == 1 < len(found) else ""
        whose = f", {one_line(role, limit=12)}" if most > 1 else ""
        told = f"in {share(part)} of rows{whose}{more}: "
        lines.append(cells.assemble([_label("" if place else "repeated"), (told, cells.WARN), (one_line(text, limit=400), "")]))
    return lines


def _trained_words(look: DataLook) -> str:
    total = sum(look.lengths.tokens)
    return f"{share(look.lengths.trained / total)} of the tokens" if look.lengths.measured and total else ""


def _copies_words(look: DataLook, run: RunConfig) -> str:
    """Return how many copies there are, and what leaving them out costs, or would."""
    exact, near, among = look.copies
    if not among:
        return ""
    seen = f" among the first {among:,} rows" if among < look.rows else ""
    if not exact and not near:
        return f"none{seen}"
    told = f"{exact:,} exact, {near:,} nearly the same{seen}"
    kind = run.filter_duplicates
    cost = filters.copies(look, "near" if kind == "near" or not exact else "exact")
    if kind == "off":
        return f"{told}; F5 would leave out {cost.words()}"
    return f"{told}; left out: {cost.words()} (F5)" if cost.rows else f"{told}; only exact ones are left out (F5)"


def _held_line(run: RunConfig, look: DataLook, outlook: Outlook | None) -> Content:
    """Say how many rows are measured and trained, and how many steps that is."""
    trained, held = used_rows(run, look.lengths, look.rows, look.measured_on, look.copies[0])
    steps = ""
    if outlook is not None and outlook.rows:
        trained, held, steps = outlook.rows, outlook.held, f", {outlook.steps_per_epoch:,} steps an epoch"
    train = f"{trained:,} to train{steps}"
    if run.eval_data or look.measured_on is not None:
        where = one_line(run.eval_data, limit=30) if run.eval_data else "the file that comes for it"
        rows = f"{held:,} rows of " if look.measured_on is not None else ""
        return cells.assemble([_label("measured"), (f"{rows}{where}; {train}", "")])
    told = f"about {held:,} rows to measure on" if held else "none: nothing is measured"
    return cells.assemble([_label("held out"), (f"{told}; {train}", "")])


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
        way = "" if look.problem else way
        head = [(f"✖ {rows} cannot be used", cells.BAD), (way, cells.DIM)]
    lines = [cells.assemble(head)]
    shown = look.faults if look.refused <= room else look.faults[: max(1, room - 1)]
    if 2 * look.refused < room:
        lines += [line for fault in shown for line in _wrapped("  " + one_line(fault, limit=300), "", width)]
    else:
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
    if look.unwritable:
        return _wrapped(f"✖ no row can be written out for this model: {one_line(reason, limit=300)}", cells.BAD, width)
    told = f"▲ {rows} cannot be written out, such as row {number}: {one_line(reason, limit=200)}"
    return [cells.assemble([(told, cells.WARN)]).truncate(width, ellipsis=True)]


def _wrapped(text: str, style: str, width: int) -> list[Content]:
    return [cells.assemble([(line, style)]) for line in textwrap.wrap(text, width, subsequent_indent="  ")]


def _sample_lines(look: DataLook, width: int) -> list[Content]:
    lines = []
    for role, text in itertools.islice(look.samples, 20):
        style = cells.MAIN if role == "assistant" else cells.DIM
        parts: list[Part] = [(f"  {one_line(role, limit=12):<{_LABEL}}", style), (one_line(text, limit=400), "")]
        lines.append(cells.assemble(parts).truncate(width, ellipsis=True))
    return lines
