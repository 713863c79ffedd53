"""Runs of the tiny model that fall ill on purpose, and their journals."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_model, write_tokenizer

from qlora_tui.engine.spec import RunConfig, from_values


@pytest.fixture(autouse=True)
def bits_can_be_compared(one_thread: None) -> None:
    """All tests of this folder sum in one order."""


@pytest.fixture(scope="session")
def loud_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose head is large enough for a broken adapter to show: the usual one cannot lose much over six nats."""
    folder = tmp_path_factory.mktemp("loud-llama")
    write_model(folder, initializer_range=0.4)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def run_of(loud_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Make a small fp32 run over eighty short rows; keys by name override."""
    words = random.Random(1)
    rows = [{"question": f"say {n}", "answer": "abc " * words.randint(1, 6) + str(n)} for n in range(80)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**values: object) -> RunConfig:
        usual = {
            "model_name_or_path": str(loud_model),
            "data": (str(data),),
            "method": "lora",
            "final_checks": False,
            "max_length": 128,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_steps": 50,
            "save_steps": 5,
            "eval_steps": 1000,
            "val_set_size": 12.0,
            "learning_rate": 2e-3,
            "warmup_steps": 1.0,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": "false",
        }
        return from_values({**usual, **values})

    return make
