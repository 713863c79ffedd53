"""Training in float16 under a loss scale, as on cards before Ampere, which have no other type of 16 bits; a later card stands in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model, write_tokenizer
from loop_driver import Ran, drive

from qlora_tui.engine.events import Planned, Stepped
from qlora_tui.engine.fast import compiled
from qlora_tui.engine.machine import look
from qlora_tui.engine.spec import RunConfig, from_values
from qlora_tui.engine.train.scale import LossScale

pytestmark = pytest.mark.gpu


@pytest.fixture
def ran_on(
    tmp_path: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    write_model(tmp_path / "model", hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2)
    write_tokenizer(tmp_path / "model")
    values: dict[str, Any] = {"model_name_or_path": str(tmp_path / "model"), "data": (str(write_jsonl(chat_rows)),), "max_length": 256}
    values |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 40}

    def on(name: str, *, old: bool, **more: Any) -> Ran:
        machine = look()
        with monkeypatch.context() as patched:
            if old:
                machine = dataclasses.replace(machine, bf16=False, compute_capability=(7, 5))
                patched.setattr(compiled, "has_bfloat16", lambda device: False)
                patched.setattr(compiled, "why_not", functools.cache(compiled.why_not.__wrapped__))
            run: RunConfig = from_values({**values, "num_train_epochs": 40.0, **more})
            return drive(run, tmp_path / name, machine=machine)

    return on


INT8 = {"method": "lora-8bit", "grad_matmul": "int8"}


@pytest.mark.parametrize("values", [{}, {"method": "lora"}, {"method": "lora-8bit"}, INT8, {"gradient_checkpointing": "false"}])
def test_it_learns_what_bfloat16_learns(ran_on: Callable[..., Ran], values: dict[str, Any]) -> None:
    new, old = ran_on("new", old=False, **values), ran_on("old", old=True, **values)
    assert new.error is None
    assert old.error is None
    assert [ran.of(Planned)[0].choices["dtype"] for ran in (new, old)] == ["bfloat16", "float16"]
    curves = [torch.tensor([step.loss for step in ran.of(Stepped)]) for ran in (new, old)]
    assert curves[1][-1] < curves[1][0] - 0.5
    assert (curves[1] - curves[0]).abs().mean() < 0.03 * curves[0].mean()


@pytest.mark.parametrize("values", [{}, INT8], ids=["nf4", "int8"])
def test_a_gradient_that_overflows_is_made_again(
    ran_on: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    calm = ran_on("calm", old=True, **values)
    scale = LossScale(True, 2.0**20)  # gradients overflow under it, and not under a thirty-second of it
    monkeypatch.setattr(LossScale, "of", staticmethod(lambda dtype: scale))
    loud = ran_on("loud", old=True, **values)
    assert loud.error is None
    assert scale.factor < 2.0**20
    assert loud.losses == pytest.approx(calm.losses, abs=2e-2)
