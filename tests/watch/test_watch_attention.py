"""Which attention operators really run: counted on a CPU by the same means, judged on a card."""

from __future__ import annotations

from pathlib import Path

import pytest
from loop_driver import CPU

from qlora_tui.engine.load import Loaded, load
from qlora_tui.engine.spec import from_values
from qlora_tui.engine.train.attention import calls_of, tell_kernel
from qlora_tui.engine.train.fence import Fence


def loaded_as(folder: Path, attention: str) -> Loaded:
    run = from_values({"model_name_or_path": str(folder), "method": "lora", "attn_implementation": attention})
    return load(run, folder, CPU)


def test_every_layers_operator_is_counted_whatever_was_asked_for(tiny_model: Path) -> None:
    fused = calls_of(loaded_as(tiny_model, "sdpa"), 64)
    assert "_softmax" not in fused
    assert sum(fused.values()) == 2
    assert calls_of(loaded_as(tiny_model, "eager"), 64) == {"_softmax": 2}


def test_on_a_cpu_nothing_is_judged(tiny_model: Path) -> None:
    loaded = loaded_as(tiny_model, "eager")
    assert list(tell_kernel(from_values({}), loaded, Fence(loaded), 64, 16)) == []


@pytest.mark.gpu
@pytest.mark.parametrize(("attention", "severity"), [("sdpa", "info"), ("eager", "warn")])
def test_on_a_card_the_kernel_is_named_and_memory_measured(tiny_model: Path, attention: str, severity: str) -> None:
    from qlora_tui.engine.machine import look

    run = from_values({"model_name_or_path": str(tiny_model), "method": "lora", "attn_implementation": attention})
    loaded = load(run, tiny_model, look())
    (told,) = tell_kernel(run, loaded, Fence(loaded), 512, 16)
    assert told.severity == severity
    assert told.numbers["full_bytes"] > told.numbers["half_bytes"] > 0
    assert ("fused" in told.message and "slow" not in told.message) is (attention == "sdpa")
