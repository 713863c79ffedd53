from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from cases import CASES
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine import forecast, machine, measured, models, planner, sizes, steptime
from qlora_tui.engine.forecast import Pace
from qlora_tui.engine.measured import Speed
from qlora_tui.engine.spec import RunConfig

LLAMA = models.find("meta-llama/Llama-3.1-8B-Instruct")
QWEN_14B = models.find("Qwen/Qwen2.5-14B-Instruct")
DEMO = models.find("builtin:smollm2-135m")
H100 = machine.find_card("H100 80GB")
TWO_CORES = machine.Machine("cpu", "cpu", 8 << 30, cores=2)
TWO_ROWS = RunConfig(per_device_train_batch_size=2, gradient_accumulation_steps=8, gradient_checkpointing="true", dtype="bfloat16")


def rate(model, run, device, **more):
    return 1 / forecast.seconds_per_token(model, run, device, **more)


def with_(run=TWO_ROWS, **changes):
    return dataclasses.replace(run, **changes)


@pytest.mark.parametrize(
    ("changes", "tokens_per_second"),
    [
        ({"gradient_accumulation_steps": 1}, 6788),
        ({"gradient_accumulation_steps": 2}, 6976),
        ({"method": "lora"}, 7511),
        ({"gradient_checkpointing": "false"}, 9836),
    ],
    ids=str,
)
def test_the_card_formula_meets_what_was_measured_on_an_h100(changes, tokens_per_second, monkeypatch):
    # 8 B, rank 16, 2 x 2048, our own steps: tests/bench/results/2026-11-25-h100-80gb.md; its host took about 36 us a kernel,
    # and two runs of one setting differed by 7 %
    speed = dataclasses.replace(steptime.table_speed(H100), launch_seconds=36e-6)
    monkeypatch.setattr(forecast, "speed_of", lambda _: speed)
    assert rate(LLAMA, with_(cuda_graphs="off", **changes), H100) == pytest.approx(tokens_per_second, rel=0.12)


MEASURED = [json.loads(line) for line in (Path(__file__).parents[1] / "gpu" / "2026-11-27-h100-graphs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("line", MEASURED, ids=lambda line: line["case"])
def test_the_seconds_of_a_step_meet_every_one_that_was_measured(line, monkeypatch):
    # 38 settings of 13 shapes, 0.5 to 14 B, on the pieces of the card that each run measured before its first step
    case = next(case for case in CASES if case.name == line["case"])
    run = dataclasses.replace(case.run(Path("x"), tiny=False), **line["choices"])
    monkeypatch.setattr(forecast, "speed_of", lambda _: Speed(**line["speed"]))
    each = forecast.seconds_per_token(models.find(case.shape), run, H100, row_tokens=case.length)
    assert each * line["tokens_per_step"] == pytest.approx(line["step_seconds"], rel=0.1)


def test_a_recorded_step_takes_what_its_kernels_take_whatever_the_host():
    slow = dataclasses.replace(steptime.table_speed(H100), launch_seconds=1e-3)
    for pieces in (steptime.table_speed(H100), slow):
        recorded = steptime.micro_batch(LLAMA, with_(cuda_graphs="on"), H100, pieces, 2, 2048)
        assert recorded.seconds(32) == recorded.device_seconds + 32 * recorded.again_device_seconds
    assert steptime.micro_batch(LLAMA, with_(cuda_graphs="off"), H100, slow, 2, 2048).seconds(32) > 10 * recorded.seconds(32)


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.1}, {"attn_implementation": "eager"}], ids=lambda change: next(iter(change)))
def test_what_draws_random_numbers_or_makes_masks_on_the_host_is_not_recorded(changes):
    speed = dataclasses.replace(steptime.table_speed(H100), launch_seconds=1e-3)
    assert steptime.micro_batch(LLAMA, TWO_ROWS, H100, speed, 2, 2048).replayed(32)
    assert not steptime.micro_batch(LLAMA, with_(**changes), H100, speed, 2, 2048).replayed(32)
    assert not steptime.micro_batch(LLAMA, TWO_ROWS, TWO_CORES, speed, 2, 2048).replayed(32)


def test_the_device_part_meets_the_kernels_measured_there():
    # 492 ms of kernels in a checkpointed step, same page
    batch = steptime.micro_batch(LLAMA, TWO_ROWS, H100, steptime.table_speed(H100), 2, 2048)
    assert batch.device_seconds + 32 * batch.again_device_seconds == pytest.approx(0.492, rel=0.05)


def test_the_processor_formula_meets_the_demo():
    run = RunConfig(gradient_checkpointing="false", max_length=512)
    assert rate(DEMO, run, TWO_CORES) == pytest.approx(100, rel=0.1)


def test_faster_cards_are_faster_and_checkpointing_costs_time():
    rates = [rate(LLAMA, TWO_ROWS, machine.find_card(name)) for name in ("RTX 3060", "RTX 3090", "RTX 4090", "H100 80GB")]
    assert rates == sorted(rates)
    assert rate(LLAMA, TWO_ROWS, H100) < rate(LLAMA, with_(gradient_checkpointing="false"), H100)
    assert rate(LLAMA, TWO_ROWS, H100) < rate(LLAMA, with_(method="lora"), H100)


@pytest.mark.parametrize(
    ("faster", "slower"),
    [
        ({"gradient_checkpointing": "7"}, {"gradient_checkpointing": "8"}),
        ({"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2}),
        ({"gradient_accumulation_steps": 8}, {"gradient_accumulation_steps": 1}),
        ({"optim": "adamw_torch"}, {"optim": "adamw_8bit"}),
        ({"lora_r": 8}, {"lora_r": 256}),
        ({"use_dora": False}, {"use_dora": True}),
        ({"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"loss_chunk_size": 523}, {"loss_chunk_size": 16}),
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_that_costs_time_is_in_it(faster, slower):
    assert rate(LLAMA, with_(**faster), H100) > rate(LLAMA, with_(**slower), H100)


def test_a_16_bit_base_is_not_dequantized_and_only_a_4_bit_one_minds_how_fast_that_goes():
    slow = Speed(7e14, 2e12, 1e9, 30e-6)
    speed = dataclasses.replace(slow, dequant_bytes=1e12)

    def seconds(run, pieces):
        return steptime.micro_batch(LLAMA, run, H100, pieces, 2, 2048).seconds(32)

    assert seconds(with_(method="lora"), slow) == seconds(with_(method="lora"), speed)
    # three passes of 2.5 bytes a weight, and nothing beside it matters
    assert seconds(TWO_ROWS, slow) == pytest.approx(3 * 2.5 * LLAMA.linear_params / 1e9, rel=0.03)


def test_short_rows_cost_less_a_token_once_the_batch_is_large_and_the_mean_of_both_lies_between():
    run = with_(per_device_train_batch_size=64, gradient_accumulation_steps=1, max_length=16_384)
    short, long = (forecast.seconds_per_token(LLAMA, run, H100, row_tokens=tokens) for tokens in (512, 16_384))
    assert short < 0.75 * long

    def epoch(lengths):
        found = forecast.before(LLAMA, run, H100, tokens_per_epoch=10**7, steps=10, steps_per_epoch=10, lengths=lengths)
        return found.total_seconds[1] / 10**7

    assert epoch([512] * 40) == pytest.approx(short, rel=0.02)
    assert epoch([16_384] * 40) == pytest.approx(long, rel=0.02)
    assert short < epoch([512] * 39 + [16_384]) < epoch([512] * 20 + [16_384] * 20) < long


def test_a_step_is_its_micro_batches_and_one_update():
    speed = steptime.table_speed(H100)
    batch = steptime.micro_batch(LLAMA, TWO_ROWS, H100, speed, 2, 2048).seconds(32)
    update = steptime.optimizer_seconds(LLAMA, TWO_ROWS, H100, speed)
    assert forecast.step_seconds(LLAMA, TWO_ROWS, H100) == pytest.approx(8 * batch + update)


def test_a_stranger_card_gets_no_figure():
    stranger = machine.Machine("NVIDIA GB999", "cuda", 80 << 30, bf16=True)
    assert forecast.before(LLAMA, RunConfig(), stranger, tokens_per_epoch=10**6, steps=100) is None
    assert forecast.step_seconds(LLAMA, RunConfig(), stranger) is None
    measured.remember_speed(stranger.name, "libs", Speed(7e14, 2e12, 7e11, 3e-3))
    assert forecast.before(LLAMA, RunConfig(), stranger, tokens_per_epoch=10**6, steps=100) is not None


def test_no_data_no_figure():
    assert forecast.before(LLAMA, RunConfig(), H100, tokens_per_epoch=0, steps=100) is None
    assert forecast.before(LLAMA, RunConfig(), H100, tokens_per_epoch=10**6, steps=0) is None


def test_before_is_a_range_that_counts_every_token_and_the_measurements():
    run = with_(num_train_epochs=2.0)
    plain = forecast.before(LLAMA, run, H100, tokens_per_epoch=1_000_000, steps=100)
    low, mid, high = plain.total_seconds
    assert low < mid < high
    assert mid == pytest.approx(2_000_000 * forecast.seconds_per_token(LLAMA, run, H100, row_tokens=20_000 / 16))
    assert plain.step_seconds[1] == pytest.approx(mid / 100)
    assert plain.epoch_seconds[1] == pytest.approx(mid / 2)
    measured_too = forecast.before(LLAMA, run, H100, tokens_per_epoch=1_000_000, steps=100, holdout_tokens=100_000)
    assert measured_too.total_seconds[1] > mid
    assert plain.to_json()["total_seconds"] == [low, mid, high]


def test_max_steps_uses_the_tokens_of_a_step():
    run = with_(max_steps=10)
    found = forecast.before(LLAMA, run, H100, tokens_per_epoch=1_000_000, steps=10, steps_per_epoch=100)
    assert found.total_seconds[1] == pytest.approx(100_000 * forecast.seconds_per_token(LLAMA, run, H100, row_tokens=10_000 / 16))


def test_a_time_limit_caps_the_figure():
    run = RunConfig(max_time=60.0)
    assert forecast.before(LLAMA, run, H100, tokens_per_epoch=10**8, steps=1000).total_seconds == (60.0, 60.0, 60.0)


def width(found):
    low, mid, high = found.total_seconds
    return (high - low) / mid


def outlook(run=TWO_ROWS):
    return forecast.before(LLAMA, run, H100, tokens_per_epoch=16 * 1500 * 100, steps=100, steps_per_epoch=100)


def test_what_was_measured_narrows_the_range_and_the_basis_says_so():
    table = outlook()
    measured.remember_speed(H100.name, "libs", Speed(7e14, 2.9e12, 7e11, 3e-3))
    pieces = outlook()
    measured.remember_steps(H100.name, planner.step_key(LLAMA, with_(gradient_checkpointing="false")), 1500, 2, 1e-4)
    kin = outlook()
    measured.remember_steps(H100.name, planner.step_key(LLAMA, TWO_ROWS), 1400, 2, 1.5e-4)
    steps = outlook()
    widths = [width(found) for found in (table, pieces, kin, steps)]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 4
    assert "data sheet" in table.basis
    assert "speed measured on this machine" in pieces.basis
    assert "steps measured on this machine" in steps.basis


def test_real_steps_replace_the_formula_where_they_were_measured_and_are_interpolated_between():
    key = planner.step_key(LLAMA, TWO_ROWS)
    formula = {tokens: forecast.seconds_per_token(LLAMA, TWO_ROWS, H100, row_tokens=tokens) for tokens in (256, 512, 1024, 2048)}
    measured.remember_steps(H100.name, key, 512, 2, 2.0 * formula[512])
    measured.remember_steps(H100.name, key, 2048, 2, 1.0 * formula[2048])

    def factor(tokens, run=TWO_ROWS):
        return forecast.seconds_per_token(LLAMA, run, H100, row_tokens=tokens) / formula[tokens]

    assert [factor(tokens) for tokens in (256, 512, 1024, 2048)] == pytest.approx([2.0, 2.0, 1.5, 1.0])
    assert factor(512, with_(dtype="auto")) == pytest.approx(2.0)


def test_steps_of_another_kind_do_not_count():
    plain = forecast.seconds_per_token(LLAMA, TWO_ROWS, H100)
    for other in (with_(method="lora"), with_(dtype="float32"), with_(use_dora=True), with_(attn_implementation="eager")):
        measured.remember_steps(H100.name, planner.step_key(LLAMA, other), 2048, 2, 1.0)
    measured.remember_steps(H100.name, planner.step_key(QWEN_14B, TWO_ROWS), 2048, 2, 1.0)
    measured.remember_steps("another card", planner.step_key(LLAMA, TWO_ROWS), 2048, 2, 1.0)
    assert forecast.seconds_per_token(LLAMA, TWO_ROWS, H100) == plain
    measured.remember_steps(H100.name, planner.step_key(LLAMA, with_(optim="adamw_torch")), 2048, 2, 1.0)
    assert forecast.seconds_per_token(LLAMA, TWO_ROWS, H100) == pytest.approx(1.0)


def test_a_step_key_that_makes_no_sense_is_passed_over():
    kind = planner.step_key(LLAMA, TWO_ROWS).rpartition(", ")[0]
    plain = forecast.seconds_per_token(LLAMA, TWO_ROWS, H100)
    measured.remember_steps(H100.name, f"{kind}, many recomputed", 2048, 2, 1.0)
    assert forecast.seconds_per_token(LLAMA, TWO_ROWS, H100) == plain


def told(run=TWO_ROWS, model=LLAMA, device=H100, hours=1.0, epoch_hours=0.5, **more):
    low, mid, high = (share * hours * 3600 for share in (0.9, 1.0, 1.1))
    found = forecast.Before((1.0, 1.0, 1.0), (low, mid, high), "a test", (0.0, epoch_hours * 3600, 1e9))
    return forecast.remarks(model, run, device, found, **more)


def test_an_ordinary_run_gets_no_remark():
    assert told(longest_chat=4096) == []
    assert forecast.remarks(LLAMA, TWO_ROWS, H100, None) == []


@pytest.mark.parametrize(
    ("crossed", "words"),
    [
        (lambda: told(hours=12.1), "max_time=12h"),
        (lambda: told(epoch_hours=12.0), "max_samples at 50 %"),
        (lambda: told(with_(max_length=16_384)), "lower max_length"),
        (lambda: told(with_(max_length=16_384, attn_implementation="eager")), "attn_implementation=sdpa does not"),
        (lambda: told(model=QWEN_14B, device=machine.find_card("RTX 4090")), "gradient_checkpointing=true"),
        (lambda: told(with_(method="lora"), model=QWEN_14B, device=machine.find_card("RTX 4090")), "method=qlora"),
        (lambda: told(model=QWEN_14B, device=machine.find_card("RTX 3060")), "smaller model"),
        (lambda: told(with_(memory_limit_gib=24.0), model=QWEN_14B), "13 B on 24 GB"),
        (lambda: told(with_(max_length=8000), longest_chat=5000), "nothing is packed"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_each_threshold_has_one_sentence_that_says_what_to_change(crossed, words):
    (sentence,) = crossed()
    assert words in sentence
    assert sentence.endswith(".")


def test_a_length_is_only_remarked_on_where_rows_reach_it():
    assert told(with_(max_length=16_384), longest=3000) == []
    assert told(with_(max_length=2048), longest_chat=9000) == []
    assert told(model=QWEN_14B) == []


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


def test_the_operations_are_the_models_and_checkpointing_adds_a_forward_pass_of_the_layers():
    # one operation a second and nothing else: short rows, since attention is counted at a lower rate than products;
    # the base's products are 8 % faster than the one that is measured
    batch = steptime.micro_batch(LLAMA, RunConfig(), H100, Speed(1.0, math.inf, math.inf, 0.0), 1, 16)
    adapter = 6 * sizes.adapter_params(LLAMA, RunConfig())
    head = 4 * LLAMA.vocab_size * LLAMA.hidden_size
    assert batch.seconds(0) / 16 == pytest.approx(0.92 * (4 * LLAMA.linear_params + head) + adapter, rel=2e-3)
    assert (batch.seconds(32) - batch.seconds(0)) / 16 == pytest.approx(0.92 * 2 * LLAMA.linear_params, rel=0.01)


@given(
    model=st.sampled_from([LLAMA, QWEN_14B, DEMO]),
    device=st.sampled_from([H100, TWO_CORES, machine.find_card("T4")]),
    rows=st.integers(1, 64),
    accumulation=st.integers(1, 64),
    tokens=st.integers(16, 32_768),
    recomputed=st.integers(0, 200),
    method=st.sampled_from(["qlora", "lora", "auto"]),
)
def test_any_run_has_a_finite_positive_time_that_more_rows_at_once_never_raise(
    model, device, rows, accumulation, tokens, recomputed, method
):
    run = RunConfig(
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=2 * accumulation,
        max_length=tokens,
        gradient_checkpointing=str(recomputed) if recomputed else "false",
        method=method,
    )
    seconds = forecast.step_seconds(model, run, device)
    assert 0 < seconds < 1e9
    wider = dataclasses.replace(run, per_device_train_batch_size=2 * rows, gradient_accumulation_steps=accumulation)
    assert forecast.step_seconds(model, wider, device) <= seconds * 1.001
