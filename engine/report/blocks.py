"""What a report is made of: sections of a few kinds of blocks, told once and written twice, as Markdown and as a page.

A block holds plain text, foreign text included, as it came; whoever writes it out escapes it. So no section can forget to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "good", "warn", "bad"]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; `strong` ones are what a reader should see first, coloured by `tone`."""

    text: str
    strong: bool = False
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Points:
    """A list of short facts."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a head; columns after the first hold figures if `figures`. `beside` is not repeated in Markdown."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: bool = True


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to copy, made by us; foreign parts of it are literals already."""

    lines: Sequence[str]
    language: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of those a page shows large, with what it is; Markdown leaves it to the table that has it as well."""

    value: str
    name: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures in a row."""

    items: Sequence[Figure]


@dataclass(frozen=True, slots=True)
class Quote:
    """What a row asks and what stands beside it: `parts` are names and texts of others, shown as they were written."""

    title: str
    parts: Sequence[tuple[str, str]]
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Line:
    """Points of a curve, by x; `look` says how they are drawn."""

    name: str
    points: Sequence[Point]
    look: Literal["faint", "line", "marks", "level"] = "line"


@dataclass(frozen=True, slots=True)
class Curves:
    """Curves over the same steps; a page draws them, Markdown leaves them out."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    wide: bool = True


@dataclass(frozen=True, slots=True)
class Bars:
    """Signed bars in their order, up is good; a page draws them, Markdown leaves them out."""

    title: str
    values: Sequence[float]
    unit: str = ""


Block = Text | Points | Table | Code | Figures | Quote | Curves | Bars


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]
