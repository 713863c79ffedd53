"""A finished run over the tiny model, read back; sums in one order, since adapters are compared closely."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loop_driver import drive

from qlora_tui.engine.export import TARGETS, Target
from qlora_tui.engine.export.make import Bench
from qlora_tui.engine.export.source import read_run
from qlora_tui.engine.export.target import Source
from qlora_tui.engine.preset import to_toml
from qlora_tui.engine.runs import RUN_FILE
from qlora_tui.engine.spec import from_values


@pytest.fixture(autouse=True)
def bits_can_be_compared(one_thread: None) -> None:
    """All tests of this folder sum in one order."""


@pytest.fixture
def ran(tiny_model: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Train a few steps with a rate high enough that the adapter shows, and return the run's folder."""

    def make(model: Path = tiny_model, **values: Any) -> Path:
        usual: dict[str, Any] = {
            "model_name_or_path": str(model),
            "data": (str(write_jsonl(chat_rows)),),
            "method": "lora",
            "max_length": 256,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_steps": 3,
            "learning_rate": 2e-2,
            "val_set_size": 6.0,
            "gradient_checkpointing": "false",
        }
        run = from_values({**usual, **values})
        folder = tmp_path / "runs" / "one"
        done = drive(run, folder)
        assert done.error is None, done.error
        (folder / RUN_FILE).write_text(to_toml(run))
        return folder

    return make


@pytest.fixture
def source(ran: Callable[..., Path]) -> Source:
    """A plain run, read back."""
    return opened(ran())


def opened(folder: Path) -> Source:
    return read_run(folder, lambda: None, lambda done, total: None)


def bench_of(source: Source, **changes: Any) -> Bench:
    return Bench(**{"source": source, "look": lambda: None, "note": lambda done, total, what: None, **changes})


def target_of(name: str) -> Target:
    return next(target for target in TARGETS if target.name == name)
