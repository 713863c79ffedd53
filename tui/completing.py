"""What Tab offers, worked out by the program itself from the tables that parse: nothing can be offered that is not understood.

A script of the shell asks the program with the line typed so far. argcomplete knows how bash, zsh and fish quote and break
words; what can stand where is known here. (shtab writes a static script, which knows neither run ids nor the keys of `--set`.)
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from argcomplete.completers import ChoicesCompleter, FilesCompleter
from argcomplete.finders import CompletionFinder
from argcomplete.lexers import split_line

from qlora_tui.tui.cli import COMMANDS, PARTS, build

Offer = Iterable[str] | Mapping[str, str]
ASKED = "_ARGCOMPLETE"
"""The variable by which a shell asks."""


def answer(stream: TextIO | None = None, leave: Callable[[int], Any] = os._exit) -> None:
    """Answer the shell, on the descriptor that its script reads, and leave the process."""
    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    before = split_line(line, point)[3][1:]
    words = _command_words(before)
    parser = build(" ".join(words))
    offered = COMMANDS if not words else PARTS.get(words[0], {}) if len(words) == 1 else {}
    if offered and len(before) == len(words):
        parser.add_argument("_command", nargs="?").completer = _table(offered)  # type: ignore[attr-defined]  # argcomplete reads it
    for action in parser._actions:
        if found := _COMPLETERS.get(action.dest) or _COMPLETERS.get(str(action.metavar)):
            action.completer = found  # type: ignore[attr-defined]  # as above
    os.environ[ASKED] = str(1 + len(words))
    CompletionFinder()(
        parser, always_complete_options=False, default_completer=ChoicesCompleter({}), exit_method=leave, output_stream=stream
    )


def _command_words(before: list[str]) -> list[str]:
    """Return the first words of a line that name its command."""
    if not before or before[0] not in COMMANDS:
        return []
    return before[: 2 if len(before) > 1 and before[1] in PARTS.get(before[0], {}) else 1]


def _table(offered: Mapping[str, str]) -> Callable[..., Offer]:
    return lambda **_: offered


def _runs(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Offer:
    from qlora_tui.engine.runs import list_runs
    from qlora_tui.engine.text import one_line

    if "/" in prefix:
        return FilesCompleter()(prefix)
    there = list_runs(Path("runs"), everywhere=True)
    return {"last": "the newest", **{info.id: info.state for info in there if info.id == one_line(info.id)}}


def _presets(**_: Any) -> Offer:
    from qlora_tui.engine import preset

    return {name: preset.load(name).title for name in preset.names()}


def _settings(prefix: str, **_: Any) -> Offer:
    """Return the keys of `--set`, and behind the `=` of one the values that it can have, where there is a list of them."""
    from qlora_tui.engine.spec import KEYS, TRACKERS, WATCHED

    name, equals, _text = prefix.partition("=")
    if not equals:
        return {f"{key.name}=": key.help for key in KEYS.values()}
    key = KEYS.get(name)
    if key is None:
        return ()
    lists = {"watch_stop": WATCHED, "watch_rollback": WATCHED, "report_to": TRACKERS, "notify": ("bell", "command:", "webhook:")}
    values = key.choices or lists.get(name) or {"flag": ("true", "false"), "layers": ("auto", "true", "false")}.get(key.kind, ())
    return [f"{name}={value}" for value in values]


def _models(prefix: str, **_: Any) -> Offer:
    from qlora_tui.engine import models
    from qlora_tui.engine.spec import DEMO_MODEL

    known = [DEMO_MODEL, *(spec.name for spec in models.catalogue())]
    return [*known, *FilesCompleter(directories=True)(prefix)]


def _data(prefix: str, **_: Any) -> Offer:
    from qlora_tui.engine.spec import DEMO_DATA

    return [DEMO_DATA, *FilesCompleter()(prefix)]


def _cards(**_: Any) -> Offer:
    from qlora_tui.engine import cards

    return [card.name for card in cards.cards()]


def _queued(**_: Any) -> Offer:
    from qlora_tui.engine import queue

    return {str(entry.id): entry.name for entry in queue.entries()}


_COMPLETERS: Mapping[str, Callable[..., Offer]] = {
    "RUN": _runs,
    "preset": _presets,
    "NAME": _presets,
    "set": _settings,
    "model_name_or_path": _models,
    "data": _data,
    "path": _data,
    "card": _cards,
    "ID": _queued,
    "FILE": FilesCompleter(),
    "LOG": FilesCompleter(),
    "DIR": FilesCompleter(directories=True),
}
"""What can stand in a place, by the place's own name or by what its help calls it."""
