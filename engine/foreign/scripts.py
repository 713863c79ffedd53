"""Scripts and notebooks: the plain values that they give to the calls which make a training run.

Read with `ast`, never run. A name that stands for one plain value is followed; what is computed stays an expression.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.foreign.source import Code, Source, flatten
from qlora_tui.engine.text import one_line

CALLS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "SFTConfig": ("", ("output_dir",)),
    "TrainingArguments": ("", ("output_dir",)),
    "UnslothTrainingArguments": ("", ("output_dir",)),
    "from_pretrained": ("load.", ("model_name",)),
    "get_peft_model": ("peft.", ("model", "peft_config")),
    "LoraConfig": ("peft.", ()),
    "BitsAndBytesConfig": ("bnb.", ("load_in_8bit", "load_in_4bit")),
    "SFTTrainer": ("trainer.", ("model", "args")),
    "UnslothTrainer": ("trainer.", ("model", "args")),
    "load_dataset": ("data.", ("path", "name")),
    "train_test_split": ("split.", ("test_size",)),
    "get_chat_template": ("template.", ("tokenizer", "chat_template")),
    "train_on_responses_only": ("responses.", ("trainer",)),
    "DPOTrainer": ("preference.", ()),
    "ORPOTrainer": ("preference.", ()),
    "KTOTrainer": ("preference.", ()),
    "GRPOTrainer": ("preference.", ()),
    "RewardTrainer": ("preference.", ()),
}
"""For each call that is read: where its arguments stand in a tool's tables, and the names of those without one."""
AGAIN = "again."
"""Arguments of a second call of the same kind stand below this."""
_NO_MODELS = ("Tokenizer", "Processor", "Peft", "Config")
_EDITS = ("map", "filter", "select", "rename_column", "rename_columns", "remove_columns", "concatenate_datasets", "interleave_datasets")
_MAGIC = ("%", "!", "?")


def read(path: Path, text: str, where: str) -> Source:
    """Return the arguments of the calls in `CALLS`, by `call.argument`.

    Raises:
        ConfigError: it is no Python or no notebook, or none of these calls is in it.
    """
    notes: list[str] = []
    notebook = path.suffix.lower() == ".ipynb"
    trees = list(_notebook(text, where, notes)) if notebook else [_tree(text, where)]
    nodes = [node for tree in trees for node in _in_order(tree)]
    names = _constants(nodes)
    tree: dict[str, dict[str, Any]] = {}
    seen: Counter[str] = Counter()
    for node in nodes:
        if isinstance(node, ast.Call) and (call := _known(node)):
            seen[call] += 1
            tree[call if seen[call] == 1 else f"{call}#{seen[call]}"] = _arguments(node, names)
    if not any(tree.values()):
        asks = any(isinstance(node, ast.Call) and _called(node).endswith(("ArgumentParser", "TrlParser")) for node in nodes)
        hint = "it takes them from its command line: import that, as a .sh file" if asks else f"calls such as {', '.join(list(CALLS)[:4])}"
        raise ConfigError("no call that sets a run up stands in it with plain values", hint=hint, where=where)
    edits = sorted({_called(node) for node in nodes if isinstance(node, ast.Call) and _called(node) in _EDITS})
    if edits:
        notes.append(f"The script changes its rows while loading ({', '.join(edits)}); here they are read as their source holds them.")
    leaves = flatten({call: given for call, given in tree.items() if given}, where)
    known = {path_: _table_name(path_) for path_ in leaves}
    return Source(path, "notebook" if notebook else "Python", leaves, known, frozenset(_modules(nodes)), tuple(notes))


def _tree(text: str, where: str) -> ast.AST:
    try:
        with warnings.catch_warnings(action="ignore"):  # "\d" in a foreign text warns
            return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ConfigError(f"it is no Python: {one_line(error.args[0], limit=120)}", where=f"{where}{line}") from None
    except MemoryError:
        raise ConfigError("it is nested too deeply to be a script", where=where) from None


def _notebook(text: str, where: str, notes: list[str]) -> Iterator[ast.AST]:
    """Yield the cells of code, without the lines that are meant for the shell."""
    try:
        cells = json.loads(text)["cells"]
        sources = [cell["source"] for cell in cells if cell.get("cell_type") == "code"]
        codes = [source if isinstance(source, str) else "".join(source) for source in sources]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError("it is no notebook", where=where) from None
    for number, code in enumerate(codes, 1):
        plain = "\n".join("" if line.lstrip().startswith(_MAGIC) else line for line in code.splitlines())
        try:
            yield _tree(plain, where)
        except ConfigError:
            notes.append(f"Its code cell {number} is no Python and was not read.")


def _in_order(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes as they stand in the text; `ast.walk` goes level by level."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += reversed(list(ast.iter_child_nodes(node)))


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""


def _known(call: ast.Call) -> str:
    """Return what a call is listed as, such as `FastLanguageModel.get_peft_model`; empty if it is none of `CALLS`."""
    name = _called(call)
    if name not in CALLS:
        return ""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    if name == "from_pretrained":
        of = owner.id if isinstance(owner, ast.Name) else ""
        return f"{of}.{name}" if of and not any(part in of for part in _NO_MODELS) else ""
    return f"{owner.id}.{name}" if isinstance(owner, ast.Name) and owner.id.startswith("Fast") else name


def _arguments(call: ast.Call, names: Mapping[str, Any]) -> dict[str, Any]:
    _, places = CALLS[_called(call)]
    found: dict[str, Any] = {}
    for place, node in enumerate(call.args):
        found[places[place] if place < len(places) else f"argument {place + 1}"] = _value(node, names)
    for keyword in call.keywords:
        value = _value(keyword.value, names)
        if keyword.arg is not None:
            found[keyword.arg] = value
        elif isinstance(value, dict):
            found |= {str(name): part for name, part in value.items()}
        else:
            found[f"**{ast.unparse(keyword.value)}"] = value
    return found


def _constants(nodes: list[ast.AST]) -> dict[str, Any]:
    """Return the names that are given one plain value and no other."""
    given: dict[str, list[Any]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                _assign(target, node.value, given)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            _assign(node.target, node.value, given)
        elif isinstance(node, (ast.AugAssign, ast.For)):
            _assign(node.target, ast.Name("?"), given)
    values = {name: [_value(node, {}) for node in found] for name, found in given.items()}
    return {name: found[0] for name, found in values.items() if not isinstance(found[0], Code) and all(part == found[0] for part in found)}


def _assign(target: ast.AST, value: ast.AST, given: dict[str, list[Any]]) -> None:
    if isinstance(target, ast.Name):
        given.setdefault(target.id, []).append(value)
    elif isinstance(target, (ast.Tuple, ast.List)):
        parts = (
            value.elts
            if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
            else [ast.Name("?")] * len(target.elts)
        )
        for one, part in zip(target.elts, parts, strict=True):
            _assign(one, part, given)


def _value(node: ast.AST, names: Mapping[str, Any]) -> Any:
    """Return the plain value of an expression, or the expression."""
    match node:
        case ast.Constant(value=(str() | int() | float() | bool() | None) as value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.List(elts=parts) | ast.Tuple(elts=parts) if not any(isinstance(part, ast.Starred) for part in parts):
            return [_value(part, names) for part in parts]
        case ast.Dict(keys=keys, values=parts) if all(isinstance(key, ast.Constant) for key in keys):
            return {key.value: _value(part, names) for key, part in zip(keys, parts, strict=True) if isinstance(key, ast.Constant)}
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=parts) if all(part.arg for part in parts):
            return {part.arg: _value(part.value, names) for part in parts}
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return _computed(node, [_value(inner, names)])
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
            return _computed(node, [_value(left, names), _value(right, names)])
    return Code(one_line(ast.unparse(node) if isinstance(node, ast.expr) else "", limit=120))


def _computed(node: ast.UnaryOp | ast.BinOp, parts: list[Any]) -> Any:
    """Return a small sum of numbers, such as 4 * 1024; of anything else the expression."""
    if all(isinstance(part, (int, float)) and not isinstance(part, bool) and abs(part) < 2**40 for part in parts):
        if isinstance(node, ast.UnaryOp):
            return -parts[0]
        one, other = parts
        match node.op:
            case ast.Add():
                return one + other
            case ast.Sub():
                return one - other
            case ast.Mult():
                return one * other
            case ast.Div() if other:
                return one / other
    return Code(one_line(ast.unparse(node), limit=120))


def _modules(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def _table_name(path: str) -> str:
    """Return what a call's argument is called in the tables: `LoraConfig.r` is `peft.r`, and `SFTConfig.seed` is `seed`."""
    call, _, rest = path.removeprefix("FastLanguageModel.").removeprefix("FastModel.").removeprefix("FastVisionModel.").partition(".")
    if call not in CALLS and "#" not in call:  # AutoModelForCausalLM.from_pretrained.x
        call, _, rest = rest.partition(".")
    plain, again, _ = call.partition("#")
    return f"{AGAIN if again else ''}{CALLS[plain][0]}{rest}"
