"""`builtin:python-docs`: questions about the standard library, answered by its own docstrings.

Rows that are on every machine, so the demo downloads no data and copies none. The sources of the running
interpreter are parsed, never imported: nothing runs, and two calls give the same rows in the same order.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_tui.engine.errors import DataError

NAME = "builtin:python-docs"

_LEFT_OUT = {
    "antigravity",
    "idlelib",
    "lib2to3",
    "test",
    "tests",
    "this",
    "turtledemo",
    "pydoc_data",
    "ensurepip",
    "encodings",
    "distutils",
    "tkinter",
    "turtle",
    "venv",
}
_SHORTEST, _LONGEST = 24, 600
_QUESTIONS = (
    "What does {name} do in Python?",
    "Explain {name} from Python's standard library.",
    "In Python, what is {name} for?",
    "Describe {name} in Python.",
)


def read_docs() -> Iterator[Mapping[str, object]]:
    """Yield one question and answer for every public module, class and function with a docstring, by name.

    Raises:
        DataError: this interpreter ships without the sources of its library.
    """
    found = _answers()
    if not found:
        raise DataError("this Python has no sources of its standard library to read", hint="name a file with --data", where=NAME)
    for name in sorted(found):
        question = _QUESTIONS[sum(name.encode()) % len(_QUESTIONS)].format(name=name)
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": found[name]}]}


@functools.cache
def _answers() -> Mapping[str, str]:
    """Parse the library once a process: it takes a second or two."""
    return dict(_documented(Path(sysconfig.get_path("stdlib"))))


def _documented(library: Path) -> Iterator[tuple[str, str]]:
    for module in sorted(sys.stdlib_module_names - _LEFT_OUT):
        if module.startswith("_"):
            continue
        file = library / f"{module}.py"
        for path in [file] if file.is_file() else sorted((library / module).rglob("*.py")):
            dotted = _dotted(path.relative_to(library))
            if dotted and (tree := _parse(path)):
                yield from _named(dotted, tree)


def _dotted(path: Path) -> str:
    parts = [part for part in path.with_suffix("").parts if part != "__init__"]
    private = any(part.startswith("_") or part in _LEFT_OUT for part in parts)
    return "" if private else ".".join(parts)


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _named(name: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, str]]:
    if answer := _first_paragraph(node):
        yield name, answer
    if not isinstance(node, ast.Module):
        return  # methods repeat one another across classes: too alike to hold out
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            yield from _named(f"{name}.{child.name}", child)


def _first_paragraph(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
    answer = " ".join(text.split("\n\n", 1)[0].split())
    plain = answer.isprintable() and not answer.startswith((">>>", "$"))
    return answer if plain and _SHORTEST <= len(answer) <= _LONGEST else ""
