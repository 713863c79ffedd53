"""Values that seldom end well: each told beside its key, none where values are usual."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine import preset
from qlora_tui.engine.spec import KEYS, RunConfig
from qlora_tui.engine.unusual import Known, unusual

USUAL = RunConfig(model_name_or_path="a/b", data=("c.jsonl",))
MANY = Known(rows=20_000, steps=2500, positions=40_960)


@pytest.mark.parametrize(
    ("changes", "known", "name", "told"),
    [
        ({"learning_rate": 1e-3}, MANY, "learning_rate", "may diverge"),
        ({"learning_rate": 1e-5}, MANY, "learning_rate", "learn nothing"),
        ({"lora_alpha": 256}, MANY, "lora_alpha", "16x the rank"),
        ({"lora_alpha": 256}, MANY, "lora_r", "alpha 256 is 16x this"),
        ({"lora_alpha": 4}, MANY, "lora_alpha", "0.25x the rank"),
        ({"lora_r": 256, "lora_alpha": 256}, MANY, "lora_r", "very high"),
        ({"lora_r": 64, "lora_alpha": 64}, Known(rows=300, steps=100), "lora_r", "few rows"),
        ({"num_train_epochs": 3.0}, Known(rows=300, steps=100), "num_train_epochs", "many over 300 rows"),
        ({"num_train_epochs": 8.0}, MANY, "num_train_epochs", "overfit"),
        ({}, Known(rows=300, steps=8), "num_train_epochs", "only 8 steps"),
        ({"warmup_steps": 100.0}, Known(rows=300, steps=100), "warmup_steps", "only 100 steps"),
        ({"warmup_steps": 0.5}, MANY, "warmup_steps", "long"),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}, MANY, "gradient_accumulation_steps", "1 row a step"),
        ({"gradient_accumulation_steps": 64}, Known(rows=40, steps=100), "gradient_accumulation_steps", "more than all"),
        ({"gradient_accumulation_steps": 512}, MANY, "gradient_accumulation_steps", "few steps"),
        ({"val_set_size": 0.0}, MANY, "val_set_size", "nothing is measured"),
        ({"val_set_size": 0.5}, MANY, "val_set_size", "not trained"),
        ({"max_length": 65_536}, MANY, "max_length", "reads 40,960"),
        ({}, Known(rows=9, steps=99, over=0.4), "max_length", "40 % of your rows are dropped"),
        ({"lora_dropout": 0.5}, MANY, "lora_dropout", "much"),
        ({"bnb_4bit_quant_type": "fp4"}, MANY, "method", "nf4"),
        ({"lr_scheduler_type": "constant"}, MANY, "lr_scheduler_type", "never falls"),
    ],
)
def test_each_unusual_value_is_told_beside_its_key(changes, known, name, told):
    found = unusual(dataclasses.replace(USUAL, **changes), known)
    assert told in found[name].short
    assert found[name].why.endswith(".")


@pytest.mark.parametrize("name", preset.names())
def test_ready_made_runs_are_usual(name):
    assert unusual(preset.resolve(preset=name)) == {}


def test_usual_values_are_not_warned_of():
    assert unusual(USUAL, MANY) == {}
    assert unusual(dataclasses.replace(USUAL, use_rslora=True, lora_r=64, lora_alpha=16), MANY) == {}


numbers = {
    "lora_r": st.integers(1, 1024),
    "lora_alpha": st.integers(1, 4096),
    "learning_rate": st.floats(0, 1),
    "num_train_epochs": st.floats(0, 1000),
    "warmup_steps": st.floats(0, 1e6),
    "gradient_accumulation_steps": st.integers(1, 65_536),
    "max_steps": st.integers(0, 10**6),
    "val_set_size": st.floats(0, 1e6),
}


@given(
    values=st.fixed_dictionaries(numbers),
    known=st.builds(Known, st.integers(0, 10**7), st.integers(0, 10**7), st.floats(0, 1), st.integers(0, 10**6)),
)
def test_any_run_gets_words_that_fit_beside_a_field(values, known):
    for name, one in unusual(dataclasses.replace(USUAL, **values), known).items():
        assert name == one.name
        assert name in KEYS
        assert 0 < len(one.short) <= 40
        assert len(one.why) <= 150
