"""A report as one HTML page: no script, font or picture from elsewhere; light and dark, on a screen and on paper.

Text of others is made safe for terminals first (a page is a file that people `cat`), and jinja2 escapes it on its way in.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, Template
from markupsafe import Markup, escape

from qlora_tui.engine.report import charts
from qlora_tui.engine.report.blocks import Section, Text
from qlora_tui.engine.text import one_line, safe_text

TEMPLATE = Path(__file__).with_name("page.html")
_LONGEST = 2_000


def write(title: str, head: Sequence[Text], sections: Sequence[Section]) -> str:
    """Return the page."""
    return _template().render(title=title, head=head, sections=sections) + "\n"


@functools.cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"line": one_line, "lines": _lines, "slug": _slug, "curves": charts.curves, "bars": charts.bars}
    environment.tests["block"] = lambda block, kind: type(block).__name__ == kind
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _lines(text: str) -> Markup:
    """Return text of others with its line breaks, each line safe."""
    return Markup("<br>").join(escape(line) for line in safe_text(text, limit=_LONGEST).splitlines())


def _slug(title: str) -> str:
    """Return a name for a section's place on the page, from one of our own titles."""
    return "-".join("".join(char if char.isalnum() else " " for char in title.lower()).split())
