"""Chat templates run in jinja's sandbox, with the functions and filters that models' templates count on.

transformers runs them too, but turns a function handed to it into text, so its clock cannot be stopped; and it copies
every message several times. The same text comes out (a test compares them).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.nodes import Scope
    from jinja2.parser import Parser

_DATE = datetime(2024, 7, 26)
"""Templates that print today's date get this one: the same rows must give the same tokens tomorrow, or a resume is not exact."""


def compiled(template: str) -> Callable[..., str]:
    """Return a function that renders `template`; it takes what the template may read as keywords.

    Raises:
        jinja2.TemplateSyntaxError: it is no template.
    """
    found = _environment().from_string(template)
    found.globals = dict(found.globals)  # a chain of them is slow to go through, once a chat
    return found.render


def fixed_date() -> str:
    """Return the date of all templates as most of them write it."""
    return _DATE.strftime("%d %b %Y")


def _environment() -> Environment:
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope as ScopeNode
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Lets `{% generation %}`, which marks answers in some templates, be what is inside of it."""

        tags = {"generation"}  # noqa: RUF012  (jinja's way to declare them)

        def parse(self, parser: Parser) -> Scope:
            found = ScopeNode(lineno=next(parser.stream).lineno)
            found.body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return found

    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    found.filters["tojson"] = _to_json
    found.globals |= {"raise_exception": _raise, "strftime_now": _DATE.strftime, "dict": _new_dict}
    return found


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Write a value as JSON; jinja's own filter would write `<` and `>` in another way."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _new_dict(*pairs: Any, **named: Any) -> Mapping[str, Any]:
    """Make a dict; the class itself stays out of the template's reach."""
    return dict(*pairs, **named)
