"""A small run over the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_kernels
import pytest

from qlora_tui.engine import onebyte
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.spec import RunConfig, from_values


@pytest.fixture(autouse=True)
def bits_can_be_compared(one_thread: None) -> None:
    """All tests of this folder sum in one order."""


@pytest.fixture
def fused_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse layers as on a card, with the kernels' plain twins; bfloat16 runs alone are fused, as there."""
    plain_kernels.stand_in(monkeypatch)


@pytest.fixture(params=["fp8", "int8"])
def narrow_on_cpu(fused_on_cpu: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Fuse layers, and multiply gradients on an 8-bit base in 8 bits, which torch can on a processor too."""
    kind: str = request.param
    monkeypatch.setattr(Machine, "narrow", (kind,))
    monkeypatch.setattr(onebyte, "usual", lambda machine: kind)
    return kind


@pytest.fixture
def run_of(tiny_model: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]]) -> Callable[..., RunConfig]:
    """Make a small fp32 run; keys by name override."""
    data = write_jsonl(chat_rows)

    def make(**values: Any) -> RunConfig:
        usual = {
            "model_name_or_path": str(tiny_model),
            "data": (str(data),),
            "method": "lora",
            "max_length": 256,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 6,
            "learning_rate": 5e-3,
            "gradient_checkpointing": "false",
            "final_checks": False,  # half a second a run; test_scorecard.py has them on
        }
        return from_values({**usual, **values})

    return make
