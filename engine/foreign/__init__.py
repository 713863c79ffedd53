"""Configs of other tools, as runs of ours: what is mapped, what is changed and why, what is dropped and what that means.

A tool is one file and its name in `TOOLS`. No file of another tool is ever run.
"""

from __future__ import annotations

from pathlib import Path

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.foreign.axolotl import AXOLOTL
from qlora_tui.engine.foreign.ledger import Imported, Ledger
from qlora_tui.engine.foreign.llamafactory import LLAMAFACTORY
from qlora_tui.engine.foreign.reading import read
from qlora_tui.engine.foreign.settle import settle
from qlora_tui.engine.foreign.source import Source
from qlora_tui.engine.foreign.table import Tool
from qlora_tui.engine.foreign.trl import TRL
from qlora_tui.engine.foreign.unsloth import UNSLOTH
from qlora_tui.engine.text import one_line

TOOLS: tuple[Tool, ...] = (AXOLOTL, LLAMAFACTORY, TRL, UNSLOTH)
"""Every tool whose configs are read."""
_SHOWN = 6


def load(path: Path, tool: str = "") -> Imported:
    """Return the run that the config at `path` describes; `tool` names whose it is, empty: found out by its settings.

    Raises:
        ConfigError: it cannot be read, is no tool's that is known, or is for something that is not done here.
    """
    return convert(read(path), tool)


def convert(source: Source, tool: str = "") -> Imported:
    """Return the run that `source` describes.

    Raises:
        ConfigError: as `load`.
    """
    chosen, why = next(((one, "as you said") for one in TOOLS if one.name == tool), None) or recognize(source)
    ledger = Ledger(chosen.title, source)
    chosen.start(ledger)
    chosen.table.apply(ledger)
    chosen.finish(ledger)
    settle(ledger)
    return ledger.close(why)


def title_of(path: Path) -> str:
    """Return the tool whose config lies at `path`, by its name.

    Raises:
        ConfigError: it cannot be read, or has the marks of none.
    """
    return recognize(read(path))[0].title


def recognize(source: Source) -> tuple[Tool, str]:
    """Return the tool that `source` is of, and how that is known.

    Raises:
        ConfigError: it has the marks of none, or of two alike.
    """
    for one in reversed(TOOLS):  # a script of Unsloth uses TRL's classes too
        if named := sorted(one.programs & source.hints):
            return one, f"{'imports' if source.kind in ('Python', 'notebook') else 'starts'} {named[0]}"
    names = {source.name(path) for path in source.leaves}
    signs = {one.title: sorted(one.signs & names) for one in TOOLS}
    best = sorted(TOOLS, key=lambda one: len(signs[one.title]), reverse=True)
    first, second = (len(signs[one.title]) for one in best[:2])
    where = one_line(source.path)
    if not first:
        held = ", ".join(one_line(name, limit=40) for name in list(source.leaves)[:_SHOWN]) or "nothing"
        raise ConfigError(
            f"none of its settings is known from {_titles()}; it holds {held}", hint="say whose it is: --from NAME", where=where
        )
    if first == second:
        either = " or ".join(one.title for one in best if len(signs[one.title]) == first)
        raise ConfigError(f"it could be of {either}", hint=f"say which: --from {best[0].name}", where=where)
    told = signs[best[0].title]
    return best[0], f"{', '.join(told[:_SHOWN])}{' ...' if len(told) > _SHOWN else ''}"


def _titles() -> str:
    return ", ".join(one.title for one in TOOLS[:-1]) + f" or {TOOLS[-1].title}"
