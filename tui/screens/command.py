"""The command that does what the wizard is about to do: what people paste into a script."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping

from qlora_tui.engine.spec import KEYS, RunConfig, values_of
from qlora_tui.engine.values import Value


def equivalent(run: RunConfig, *, preset: str = "", base: RunConfig | None = None) -> str:
    """Return the command line that starts `run` without screens.

    Args:
        run: what will run.
        preset: the ready-made run it began from, named instead of repeating its keys.
        base: the values that this preset gives; without it, the defaults.
    """
    start = values_of(base) if base is not None and preset else {name: key.default for name, key in KEYS.items()}
    differing = {name: value for name, value in values_of(run).items() if value != start[name]}
    words = ["qlora-tui", "demo"] if preset == "demo" else ["qlora-tui"]
    words.append("--no-ui")
    if preset and preset != "demo":
        words += ["--preset", preset]
    words += _flags(differing)
    return shlex.join(words)


def on_lines(command: str, width: int) -> list[str]:
    r"""Return `command` broken between its options, so that what is copied off the screen still runs.

    >>> on_lines("qlora-tui --no-ui --set lora_r=7 --data 'a b.jsonl'", 34)
    ['qlora-tui --no-ui --set lora_r=7 \\\\', "  --data 'a b.jsonl'"]
    """
    groups: list[str] = []
    for word in shlex.split(command):
        quoted = shlex.quote(word)
        if word.startswith("--") or not groups:
            groups.append(quoted)
        else:
            groups[-1] += f" {quoted}"
    lines = groups[:1]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) + 3 <= width:
            lines[-1] += f" {group}"
        else:
            lines[-1] += " \\"
            lines.append(f"  {group}")
    return lines


def _flags(values: Mapping[str, Value]) -> list[str]:
    named = {"model_name_or_path": "--model", "data": "--data", "runs_dir": "--runs-dir"}
    words: list[str] = []
    for name, value in values.items():
        text = _typed(value)
        words += [named[name], text] if name in named else ["--set", f"{name}={text}"]
    return words


def _typed(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return json.dumps(value, ensure_ascii=False) if any("," in part for part in value) else ",".join(value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
