"""A finished run over the tiny model, read back; sums in one order, since adapters are compared closely."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from export_runs import opened
from loop_driver import drive

from qlora_tui.engine.export.target import Source
from qlora_tui.engine.preset import to_toml
from qlora_tui.engine.runs import RUN_FILE
from qlora_tui.engine.spec import from_values


@pytest.fixture(autouse=True)
def bits_can_be_compared(one_thread: None) -> None:
    """All tests of this folder sum in one order."""


def train(folder: Path, model: Path, data: Path, values: dict[str, Any]) -> Path:
    usual: dict[str, Any] = {
        "model_name_or_path": str(model),
        "data": (str(data),),
        "method": "lora",
        "final_checks": False,
        "max_length": 256,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "learning_rate": 2e-2,
        "val_set_size": 6.0,
        "gradient_checkpointing": "false",
    }
    run = from_values({**usual, **values})
    done = drive(run, folder)
    assert done.error is None, done.error
    (folder / RUN_FILE).write_text(to_toml(run))
    return folder


@pytest.fixture
def ran(tiny_model: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Train a few steps with a rate high enough that the adapter shows, and return the run's folder."""

    def make(model: Path = tiny_model, **values: Any) -> Path:
        return train(tmp_path / "runs" / "one", model, write_jsonl(chat_rows), values)

    return make


_plain: dict[Path, Path] = {}


@pytest.fixture
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, chat_rows: list[dict[str, Any]], tmp_path: Path) -> Source:
    """A copy of one plain run, trained once, read back."""
    if tiny_model not in _plain:
        home = tmp_path_factory.mktemp("plain")
        (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows))
        _plain[tiny_model] = train(home / "run", tiny_model, home / "data.jsonl", {})
    return opened(shutil.copytree(_plain[tiny_model], tmp_path / "runs" / "one"))
