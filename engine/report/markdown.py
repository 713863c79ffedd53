"""A report as Markdown. Everything foreign is escaped twice: for terminals, and for whoever renders it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from qlora_tui.engine.report.blocks import Bars, Block, Code, Curves, Figures, Points, Quote, Section, Table, Text
from qlora_tui.engine.text import one_line

_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|!&~$])")


def md(value: object) -> str:
    r"""Return `value` as one line that neither a terminal nor a Markdown viewer interprets.

    >>> md("<b>a_b</b>")
    '\\<b\\>a\\_b\\</b\\>'
    """
    return _MARKUP.sub(r"\\\1", one_line(value))


def write(title: str, head: Sequence[Text], sections: Sequence[Section]) -> str:
    """Return the report as Markdown."""
    parts = [f"# {md(title)}", *("\n".join(_block(block)) for block in head)]
    for section in sections:
        parts += [f"## {md(section.title)}", *("\n".join(lines) for block in section.blocks if (lines := list(_block(block))))]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> Iterator[str]:
    match block:
        case Text(text=text, strong=strong):
            yield f"**{md(text)}**" if strong else md(text)
        case Points(items=items):
            yield from (f"- {md(item)}" for item in items)
        case Table():
            yield from _table(block)
        case Code(lines=lines, language=language):
            yield from (f"```{language}", *(one_line(line, limit=4000).replace("`", "'") for line in lines), "```")
        case Quote(title=title, parts=parts):
            yield from ([f"> **{md(title)}**"] if title else [])
            yield from (f"> {md(name)}: {md(text)}  " for name, text in parts)
        case Figures() | Curves() | Bars():
            return


def _table(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(map(md, table.head))} |"
    yield f"|{'---|' * len(table.head)}"
    yield from (f"| {' | '.join(map(md, row))} |" for row in table.rows)
