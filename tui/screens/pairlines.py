"""A pair of answers in lines: the prompt, then both answers beside each other, or under each other where that is too narrow."""

from __future__ import annotations

import itertools

from textual.content import Content

from qlora_tui.engine.judge import ME, Answered, Pairs, Said, percents, tallies, words_of
from qlora_tui.engine.text import one_line, safe_text
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.cells import Part

BESIDE = 64
"""Cells from which two answers stand beside each other."""
_LONGEST = 50_000
_SIDES = ("left", "right")
_NAMES = {"tuned": "tuned", "base": "base", "tie": "a tie", "skip": "skipped"}


def pair_lines(
    answer: Answered, tuned_first: bool, width: int, *, prompt_lines: int = 0, said: Said | None = None, opened: bool = False
) -> list[Content]:
    """Return a pair in lines of at most `width` cells.

    Args:
        answer: the pair.
        tuned_first: the tuned answer stands left.
        width: cells of a line.
        prompt_lines: so many lines of the prompt at most; 0 shows all of it.
        said: what the person said of it already.
        opened: say which answer is whose, and show what the row itself answers.
    """
    order = ("tuned", "base") if tuned_first else ("base", "tuned")
    texts = {"base": (answer.base, answer.cut[0]), "tuned": (answer.tuned, answer.cut[1])}
    heads = [f"{side}{f': {name}' if opened else ''}" for side, name in zip(_SIDES, order, strict=True)]
    lines = [cells.assemble([(f" prompt, row {answer.row:,}", cells.DIM)]), *_prompt(answer.prompt, width, prompt_lines), Content(" ")]
    if answer.same:
        lines += [*_wrapped("both answered the same: a tie that nobody is asked about", width, cells.WARN), Content(" ")]
    elif said is not None:
        lines += [*_wrapped(_said(said, order, opened=opened), width, cells.MAIN), Content(" ")]
    sides = [texts[name] for name in order]
    lines += _beside(heads, sides, width) if width >= BESIDE else _under(heads, sides, width)
    if opened and answer.wanted.strip():
        lines += [Content(" "), *_wrapped("what the row itself answers", width, cells.DIM), *_wrapped(answer.wanted, width)]
    return lines


def summary_lines(pairs: Pairs, width: int) -> list[Content]:
    """Return what each judge preferred, for when there is nothing left to judge."""
    lines: list[Content] = []
    found = [one for one in tallies(pairs) if one.judged or one.skipped]
    if not found:
        return [cells.assemble([(" nothing is judged: all answers are the same, or none is made", "")])]
    for one in found:
        name = "you, blind" if one.by == ME else one_line(one.by)
        low = one.interval[0] if one.interval else 0.0
        style = cells.GOOD if low > 0.5 else ""
        lines.append(cells.assemble([(f" {name}", f"bold {cells.MAIN}"), (f"  {percents(one)}", "bold")]).truncate(width, ellipsis=True))
        lines += _wrapped(words_of(one), width, style)
        counts = f"{one.wins} tuned, {one.ties} tie, {one.losses} base"
        more = [f"{number} {what}" for what, number in (("equal", one.same), ("skipped", one.skipped), ("unclear", one.unclear)) if number]
        lines += [*_wrapped(", ".join([counts, *more]), width, cells.DIM), Content(" ")]
    tail = "A tie counts half; the interval is Wilson's. It is kept in judgements.jsonl and told in report.md. p looks back at the pairs."
    return [*lines, *_wrapped(tail, width, cells.DIM)]


def _said(said: Said, order: tuple[str, str], *, opened: bool) -> str:
    if said in ("tie", "skip"):
        return f"you said: {_NAMES[said]}" + (" (revealed before it was judged)" if opened and said == "skip" else "")
    return f"you said: {_SIDES[order.index(said)]}" + (f", the {said} answer" if opened else "")


def _prompt(text: str, width: int, most: int) -> list[Content]:
    lines = _wrapped(text, width, "bold")
    if not most or len(lines) <= most:
        return lines
    return [*lines[: most - 1], *_wrapped(f"… {len(lines) - most + 1} more lines (o)", width, cells.DIM)]


def _beside(heads: list[str], sides: list[tuple[str, bool]], width: int) -> list[Content]:
    room = (width - 3) // 2
    columns = [_column(head, side, room) for head, side in zip(heads, sides, strict=True)]
    return [
        _padded(left, room) + cells.assemble([(" │ ", cells.DIM)]) + right
        for left, right in itertools.zip_longest(*columns, fillvalue=Content(""))
    ]


def _padded(line: Content, width: int) -> Content:
    return line + Content(" " * max(0, width - line.cell_length))


def _under(heads: list[str], sides: list[tuple[str, bool]], width: int) -> list[Content]:
    first, second = (_column(head, side, width) for head, side in zip(heads, sides, strict=True))
    return [*first, Content(" "), *second]


def _column(head: str, side: tuple[str, bool], width: int) -> list[Content]:
    text, cut = side
    lines = [cells.assemble([(f" {head}", f"bold {cells.MAIN}")]).truncate(width, ellipsis=True)]
    lines += _wrapped(text, width) if text.strip() else [cells.assemble([(" (an empty answer)", cells.DIM)])]
    return [*lines, cells.assemble([(" … cut off here", cells.DIM)])] if cut else lines


def _wrapped(text: str, width: int, style: str = "") -> list[Content]:
    """Return foreign text in lines behind a margin of one cell; control characters are made visible."""
    found: list[Content] = []
    for line in safe_text(text, limit=_LONGEST).expandtabs(4).strip("\n").split("\n"):
        parts: list[Part] = [(line, style)]
        found += [cells.assemble([(" ", "")]) + piece for piece in cells.assemble(parts).wrap(max(8, width - 1)) or [Content("")]]
    return found
