from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine import forecast, machine, models
from qlora_tui.engine.forecast import Pace
from qlora_tui.engine.spec import RunConfig

LLAMA = models.find("meta-llama/Llama-3.1-8B-Instruct")
DEMO = models.find("builtin:smollm2-135m")
H100 = machine.find_card("H100")
TWO_CORES = machine.Machine("cpu", "cpu", 8 << 30, cores=2)


def rate(model, run, device):
    return 1 / forecast.seconds_per_token(model, run, device)


def test_the_card_formula_meets_what_was_measured_on_an_h100():
    # 8 B, NF4, rank 16, 2 x 2048: 6,558 tokens/s with checkpointing, 10,676 without, 2026-11-25
    assert rate(LLAMA, RunConfig(), H100) == pytest.approx(6558, rel=0.15)
    assert rate(LLAMA, RunConfig(gradient_checkpointing=False), H100) == pytest.approx(10676, rel=0.15)


def test_the_processor_formula_meets_the_demo():
    run = RunConfig(gradient_checkpointing=False, max_length=512)
    assert rate(DEMO, run, TWO_CORES) == pytest.approx(100, rel=0.25)


def test_faster_cards_are_faster_and_checkpointing_costs_time():
    rates = [rate(LLAMA, RunConfig(), machine.find_card(name)) for name in ("RTX 3060", "RTX 3090", "RTX 4090", "H100")]
    assert rates == sorted(rates)
    assert rate(LLAMA, RunConfig(), H100) < rate(LLAMA, RunConfig(gradient_checkpointing=False), H100)
    assert rate(LLAMA, RunConfig(), H100) < rate(LLAMA, RunConfig(method="lora"), H100)


def test_a_stranger_card_gets_no_figure():
    stranger = machine.Machine("NVIDIA GB999", "cuda", 80 << 30, bf16=True)
    assert forecast.before(LLAMA, RunConfig(), stranger, tokens_per_epoch=10**6, steps=100) is None


def test_no_data_no_figure():
    assert forecast.before(LLAMA, RunConfig(), H100, tokens_per_epoch=0, steps=100) is None
    assert forecast.before(LLAMA, RunConfig(), H100, tokens_per_epoch=10**6, steps=0) is None


def test_before_is_a_range_that_counts_every_token_and_the_measurements():
    run = RunConfig(num_train_epochs=2.0)
    plain = forecast.before(LLAMA, run, H100, tokens_per_epoch=1_000_000, steps=100)
    low, mid, high = plain.total_seconds
    assert low < mid < high
    assert mid == pytest.approx(2_000_000 * forecast.seconds_per_token(LLAMA, run, H100))
    assert plain.step_seconds[1] == pytest.approx(mid / 100)
    measured = forecast.before(LLAMA, run, H100, tokens_per_epoch=1_000_000, steps=100, holdout_tokens=100_000)
    assert measured.total_seconds[1] > mid
    assert plain.to_json()["total_seconds"] == [low, mid, high]


def test_max_steps_uses_the_tokens_of_a_step():
    run = RunConfig(max_steps=10)
    found = forecast.before(LLAMA, run, H100, tokens_per_epoch=1_000_000, steps=10, steps_per_epoch=100)
    assert found.total_seconds[1] == pytest.approx(100_000 * forecast.seconds_per_token(LLAMA, run, H100))


def test_a_time_limit_caps_the_figure():
    run = RunConfig(max_time=60.0)
    assert forecast.before(LLAMA, run, H100, tokens_per_epoch=10**8, steps=1000).total_seconds[1:] == (60.0, 60.0)


def feed(pace, seconds, tokens=1000):
    for value in seconds:
        pace.feed(value, tokens)
    return pace


def test_pace_says_nothing_before_three_measured_steps():
    pace = feed(Pace(), [9.0, 1.0, 1.0])
    assert pace.left(3, 100) is None
    assert feed(pace, [1.0]).left(4, 100) is not None


def test_a_slow_first_step_and_one_stall_do_not_move_it():
    pace = feed(Pace(), [60.0, *[2.0] * 30, 300.0, *[2.0] * 30])
    assert pace.left(62, 162).seconds_left[1] == pytest.approx(200.0)
    assert "500 tokens/s" in pace.left(62, 162).basis


def test_steps_of_different_length_are_judged_by_tokens():
    pace = Pace()
    for tokens in (500, 1500, 1000) * 10:
        pace.feed(tokens / 100, tokens)
    assert pace.left(30, 40).seconds_left[1] == pytest.approx(100.0)


def test_it_follows_a_change_of_speed():
    pace = feed(Pace(), [1.0] * 100 + [2.0] * 64)
    assert pace.left(164, 264).seconds_left[1] == pytest.approx(200.0)


def test_what_is_known_to_come_is_added():
    pace = feed(Pace(), [1.0] * 10)
    assert pace.left(10, 20, extra_seconds=5.0).seconds_left[1] == pytest.approx(15.0)
    assert pace.left(20, 20).seconds_left == (0.0, 0.0, 0.0)


def test_non_finite_and_empty_steps_are_not_rates():
    pace = feed(Pace(), [1.0, float("nan"), 0.0, 1.0, 1.0])
    pace.feed(1.0, 0)
    assert pace.left(6, 10) is None


@given(st.lists(st.floats(0.01, 100), min_size=4, max_size=80), st.integers(1, 1000))
def test_the_range_holds_its_middle(seconds, remaining):
    pace = feed(Pace(), seconds)
    low, mid, high = pace.left(len(seconds), len(seconds) + remaining).seconds_left
    assert 0 <= low <= mid <= high


def test_more_steps_narrow_the_range():
    def width(steps):
        low, mid, high = feed(Pace(), [1.0, 1.2] * steps).left(2 * steps, 2 * steps + 100).seconds_left
        return (high - low) / mid

    assert width(30) < width(3)


def test_checkpointing_adds_a_forward_pass_of_the_layers():
    with_, without = (forecast.flops_per_token(LLAMA, dataclasses.replace(RunConfig(), gradient_checkpointing=on)) for on in (True, False))
    assert without == pytest.approx(31.6e9, rel=0.03)  # the measured table's own count
    assert with_ - without == pytest.approx(2 * LLAMA.linear_params, rel=0.05)
