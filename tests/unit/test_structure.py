"""The shape of the code: small files, small functions, documented, and rooms that stay out of each other's way."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_tui.engine.errors import ExitCode
from qlora_tui.engine.events import EVENT_TYPES
from qlora_tui.engine.spec import KEYS
from qlora_tui.tui.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for room in ("engine", "tui") for path in (ROOT / room).rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

FILE_LINES, LOOP_LINES, FUNCTION_LINES = 400, 200, 60
PRINTERS = {"tui/cli.py", "tui/printer.py"}
TORCH_ROOMS = ("fast", "checkpoint", "export", "load", "evaluate", "sample", "meter", "rehearse", "train", "batches")
VAGUE_NAMES = {"utils", "helpers", "common", "misc"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Return the deepest block inside `node`; `elif` is no deeper than its `if`, an inner function starts anew."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        elif_branch = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not elif_branch)))
    return deepest


def calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names)


def commented_lines(path: Path) -> set[int]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


def undocumented(node: ast.AST, where: str) -> Iterator[str]:
    """Name every public class, function and method below `node` that has no docstring."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or child.name.startswith("_"):
            continue
        if ast.get_docstring(child) is None and not overloaded(child):
            yield f"{where}:{child.lineno} {child.name}"
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, where)


def overloaded(node: ast.AST) -> bool:
    """Say whether `node` inherits its words: an overload, or a method that says it overrides."""
    marks = {"overload", "override"}
    return any(isinstance(mark, ast.Name) and mark.id in marks for mark in getattr(node, "decorator_list", []))


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}
    assert {name: lines for name, lines in lengths.items() if name.startswith("engine/train/loop") and lines > LOOP_LINES} == {}


def test_functions_are_short() -> None:
    lengths = {f"{name_of(path)}:{node.name}": length(node) for path, tree in TREES.items() for node in functions(tree)}
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == {}


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_nothing_is_nested_deeply() -> None:
    deep = {}
    for path, tree in TREES.items():
        limit = 4 if name_of(path).startswith("engine/train/") else 3
        deep |= {f"{name_of(path)}:{node.lineno} {node.name}": nesting(node) for node in functions(tree) if nesting(node) > limit}
    assert deep == {}


def test_everything_public_is_documented() -> None:
    bare = [name_of(path) for path, tree in TREES.items() if ast.get_docstring(tree) is None]
    assert bare + [line for path, tree in TREES.items() for line in undocumented(tree, name_of(path))] == []


def test_no_code_is_made_from_text_and_no_name_is_rebound_from_afar() -> None:
    found = [f"{name_of(path)}:{node.lineno}" for path, tree in TREES.items() for node in calls(tree, "exec", "eval", "compile")]
    found += [f"{name_of(path)}:{node.lineno}" for path, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Global)]
    assert found == []


def test_every_getattr_says_why() -> None:
    silent = []
    for path, tree in TREES.items():
        commented = commented_lines(path)
        for node in calls(tree, "getattr", "hasattr", "setattr"):
            lines = range(node.lineno - 1, (node.end_lineno or node.lineno) + 1)
            silent += [] if commented & set(lines) else [f"{name_of(path)}:{node.lineno}"]
    assert silent == []


def test_only_two_files_print() -> None:
    assert {name_of(path) for path, tree in TREES.items() if any(calls(tree, "print"))} <= PRINTERS


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [name_of(path) for path in FILES if {path.stem, path.parent.name} & VAGUE_NAMES] == []


def imported(modules: list[str], heavy: list[str]) -> str:
    """Import `modules` one by one in a fresh interpreter and return the first that pulled in one of `heavy`."""
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    found = [part for part in {heavy!r} if part in sys.modules]
    if found:
        sys.exit(name + " loads " + ", ".join(found))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    return ended.stderr.strip()


HEAVY = ["torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "pyarrow", "numpy", "huggingface_hub", "gguf", "pynvml"]


def test_the_command_line_loads_nothing_heavy() -> None:
    assert imported(["qlora_tui.tui.cli"], [*HEAVY, "textual", "rich", "plotext", "jinja2", "tokenizers", "psutil"]) == ""


def test_rooms_without_a_star_load_nothing_heavy() -> None:
    rooms = [path for path in FILES if name_of(path).startswith("engine/") and not starred(path)]
    assert imported([module_of(path) for path in rooms], [*HEAVY, "textual", "rich", "plotext"]) == ""


@pytest.mark.parametrize("module", ["qlora_tui.tui.app", "qlora_tui.tui.state"])
def test_the_screens_never_load_torch(module: str) -> None:
    assert imported([module], HEAVY) == ""


def starred(path: Path) -> bool:
    return path.relative_to(ROOT / "engine").parts[0].removesuffix(".py") in TORCH_ROOMS


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("qlora_tui", *parts)).removesuffix(".__init__")


def test_the_readme_lists_every_key_with_its_default_and_help() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [key_row(name) for name in KEYS]
    missing = [row for row in rows if row not in readme]
    assert missing == [], "paste these rows into the table of keys in README.md:\n" + "\n".join(rows)


def test_the_readme_names_every_command_preset_and_exit_code() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    expected = [f"`qlora-tui {name}" for name in COMMANDS]
    expected += [f"| `{path.stem}` |" for path in sorted((ROOT / "presets").glob("*.toml"))]
    expected += [f"| {int(code)} |" for code in ExitCode]
    expected += [f"`{name}`" for name in EVENT_TYPES]
    assert [words for words in expected if words not in readme] == []


def key_row(name: str) -> str:
    key = KEYS[name]
    default = ", ".join(key.default) if isinstance(key.default, tuple) else key.default
    shown = f"`{str(default).lower() if isinstance(default, bool) else default}`" if default not in ("", ()) else ""
    choices = f" One of: {', '.join(key.choices)}." if key.choices else ""
    return f"| `{name}` | {shown} | {key.help}{choices} |"
