"""Runs read back and targets by name, as the tests of exports use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_tui.engine.export import TARGETS, Target
from qlora_tui.engine.export.make import Bench
from qlora_tui.engine.export.source import read_run
from qlora_tui.engine.export.target import Source


def opened(folder: Path) -> Source:
    return read_run(folder, lambda: None, lambda done, total: None)


def bench_of(source: Source, **changes: Any) -> Bench:
    return Bench(**{"source": source, "look": lambda: None, "note": lambda done, total, what: None, **changes})


def target_of(name: str) -> Target:
    return next(target for target in TARGETS if target.name == name)
