from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine import spec
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import KEYS, RunConfig, find_key, from_values, values_of
from qlora_tui.engine.units import seconds
from qlora_tui.engine.values import read_text, read_value

GOOD = {"model_name_or_path": "builtin:smollm2-135m", "data": ("builtin:python-docs",)}


def values_of_kind(key: spec.Key) -> st.SearchStrategy[spec.Value]:
    """Any value that the key's type and bounds allow."""
    if key.choices:
        return st.sampled_from(key.choices)
    low, high = max(key.low, -1e9), min(key.high, 1e9)
    match key.kind:
        case "integer":
            return st.integers(int(low), int(high))
        case "number" | "duration":
            return st.floats(low, high, allow_nan=False)
        case "flag":
            return st.booleans()
        case "list":
            return st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=4).map(tuple)
        case _:
            return st.text(st.characters(codec="utf-8"), min_size=1)


def any_run() -> st.SearchStrategy[RunConfig]:
    return st.fixed_dictionaries({name: values_of_kind(key) for name, key in KEYS.items()}).map(from_values)


def test_the_table_is_the_record():
    assert list(KEYS) == [item.name for item in dataclasses.fields(RunConfig)]
    assert values_of(RunConfig()) == {name: key.default for name, key in KEYS.items()}


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
def test_every_key_has_a_sentence_and_a_default_it_would_accept(key):
    assert key.help.endswith(".")
    assert "\n" not in key.help
    assert read_value(key, list(key.default) if key.kind == "list" else key.default) == key.default
    assert key.kind not in ("integer", "number", "duration") or key.low <= key.default <= key.high
    assert not key.choices or key.default in key.choices


def test_defaults_with_a_model_and_data_are_without_problems():
    assert problems(from_values(GOOD)) == []


@given(any_run())
def test_values_round_trip_and_bounds_are_never_a_problem(run):
    assert from_values(values_of(run)) == run
    assert from_values(spec.changed(run)) == run
    said = [str(problem) for problem in problems(run)]
    assert not [line for line in said if "out of range" in line or "is not one of" in line]


@given(st.integers(-(10**9), 10**9))
def test_integers_read_as_typed(number):
    assert read_text(KEYS["lora_r"], f" {number} ") == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_read_as_typed(number):
    assert read_text(KEYS["learning_rate"], repr(number)) == number


@given(st.text())
def test_text_is_read_or_refused_with_its_key_never_crashed_on(text):
    for name in ("lora_r", "learning_rate", "max_time", "gradient_checkpointing", "data"):
        refused, value = "", None
        try:
            value = read_text(KEYS[name], text)
        except ConfigError as error:
            refused = str(error)
        assert name in refused or value is not None
        assert not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("learning_rate", "2e-4x"),
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("lora_r", "16.5"),
        ("lora_r", ""),
        ("gradient_checkpointing", "maybe"),
        ("max_time", "2 parsecs"),
        ("max_time", ""),
    ],
)
def test_a_wrong_text_names_key_text_and_place(name, text):
    with pytest.raises(ConfigError, match=name) as caught:
        read_text(KEYS[name], text, where="--set")
    assert str(caught.value).startswith("--set: ")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "2e-4"),
        ("lora_r", True),
        ("lora_r", 1.5),
        ("gradient_checkpointing", 1.5),
        ("gradient_checkpointing", -1),
        ("data", [1]),
        ("learning_rate", math.nan),
    ],
)
def test_a_toml_value_of_another_type_is_refused_not_guessed(name, value):
    with pytest.raises(ConfigError, match=name):
        read_value(KEYS[name], value)


def test_a_single_text_is_a_list_of_one():
    assert read_value(KEYS["data"], "a.jsonl") == ("a.jsonl",)
    for text in ("a.jsonl, b.jsonl", "[a.jsonl,b.jsonl]", """['a.jsonl', "b.jsonl"]"""):
        assert read_text(KEYS["data"], text) == ("a.jsonl", "b.jsonl")
    assert read_text(KEYS["data"], "rows[1]") == ("rows[1]",)


@given(st.integers(0, 99), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_durations_add_up(days, hours, minutes, rest):
    expected = days * 86400 + hours * 3600 + minutes * 60 + rest
    assert seconds(f"{days}d{hours}h{minutes}m{rest}s") == expected
    assert seconds(f"{days} d {hours} h {minutes} min {rest} s") == expected
    assert seconds(str(expected)) == expected


@pytest.mark.parametrize("text", ["", " ", "h", "1x", "-5", "1h-2m", "5 5"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="^" if not text.strip() else None):
        seconds(text)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean lora_r"):
        find_key("lora_rank")
    assert find_key("lora.lora_r") is KEYS["lora_r"]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa", "method": "lora", "use_dora": True}, "use_dora"),
        ({"use_dora": True, "lora_dropout": 0.1}, "lora_dropout"),
        ({"model_name_or_path": ""}, "model_name_or_path"),
        ({"data": ()}, "data"),
        ({"num_train_epochs": 0.0}, "num_train_epochs"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"val_set_size": 1.5}, "val_set_size"),
        ({"warmup_steps": 50.0, "max_steps": 20}, "warmup_steps"),
        ({"lora_target_modules": ()}, "lora_target_modules"),
        ({"method": "full"}, "method"),
        ({"lora_r": 4096}, "lora_r"),
    ],
)
def test_each_fault_is_found_where_it_is(change, where):
    assert [problem.where for problem in problems(from_values({**GOOD, **change}))] == [where]


def test_all_faults_are_listed_at_once():
    found = problems(RunConfig(per_device_train_batch_size=-1, learning_rate=0.0, lora_r=0))
    assert {"model_name_or_path", "data", "per_device_train_batch_size", "learning_rate", "lora_r"} <= {problem.where for problem in found}


@pytest.mark.parametrize(
    "together",
    [
        {"use_dora": True, "use_rslora": True},
        {"init_lora_weights": "pissa", "method": "lora", "use_rslora": True},
        {"init_lora_weights": "pissa", "method": "auto"},
    ],
)
def test_kinds_of_adapter_that_go_together_are_no_problem(together):
    assert problems(from_values({**GOOD, **together, "loraplus_lr_ratio": 16.0})) == []


@pytest.mark.parametrize(("value", "layers"), [("auto", 30), ("true", 30), ("false", 0), ("0", 0), ("12", 12), ("99", 30)])
def test_how_many_layers_are_checkpointed(value, layers):
    run = from_values({**GOOD, "gradient_checkpointing": read_text(KEYS["gradient_checkpointing"], value)})
    assert spec.checkpointed_of(run, 30) == layers


def test_rows_a_step():
    assert spec.rows_per_step(RunConfig(per_device_train_batch_size=4, gradient_accumulation_steps=3)) == 12
