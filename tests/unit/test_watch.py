"""Detectors: a trace that must fire, one that must not, and memory that survives a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine.events import Device, Evaluated, Finding, Stepped
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import WATCHED, from_values
from qlora_tui.engine.watch import DETECTORS, HeldRow, Setting, Watch
from qlora_tui.engine.watch.attention import Seen, judge
from qlora_tui.engine.watch.rule import Rolling, paired
from qlora_tui.engine.watch.throttling import Throttling

SETTING = Setting(400, 20, 16)


def step(number: int, loss: float, norm: float = 1.0, **changes: object) -> Stepped:
    finite = math.isfinite(loss) and math.isfinite(norm)
    made = Stepped(number, 1000, number / 300, loss, norm, False, not finite, 2e-4, 100, 50, 1.0, 0.0, (number,))
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def findings(watch: Watch, losses: Iterable[float], start: int = 1, norm: Callable[[int], float] = lambda _: 1.0) -> list[Finding]:
    return [finding for number, loss in enumerate(losses, start) for finding in watch.see(step(number, loss, norm(number)))]


def healthy(seed: int, steps: int = 250) -> list[float]:
    """Loss 1.8 falling to 1.1 with the noise of a step of sixteen rows."""
    noise = random.Random(seed)
    return [1.1 + 0.7 * math.exp(-number / 80) + noise.gauss(0, 0.15) for number in range(steps)]


def held(level: float, rows: int = 24, noise: float = 0.01, seed: int = 0) -> list[HeldRow]:
    numbers = random.Random(seed)
    return [HeldRow(level * (0.5 + row / rows) + numbers.gauss(0, noise), 40) for row in range(rows)]


def measured(watch: Watch, number: int, level: float, rows: int = 24) -> list[Finding]:
    return watch.measured(Evaluated(number, level, rows, 0.1), held(level, rows, seed=number))


def told(found: list[Finding]) -> list[tuple[str, int, str, str]]:
    return [(finding.detector, finding.step, finding.severity, finding.message) for finding in found]


def named(found: Iterable[Finding], detector: str) -> list[tuple[int, str]]:
    return [(finding.step, finding.severity) for finding in found if finding.detector == detector]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_left_alone(seed: int) -> None:
    watch = Watch(SETTING, stop=WATCHED)
    assert measured(watch, 0, 1.8) == []
    assert findings(watch, healthy(seed)) + measured(watch, 250, 1.15) == []


def test_every_detector_can_be_named_in_the_config_and_carries_its_rule() -> None:
    assert tuple(kind.name for kind in DETECTORS) == WATCHED
    assert all(kind.rule for kind in DETECTORS)
    (unknown,) = [found for found in problems(from_values({"watch_stop": ("spikes",)})) if found.where == "watch_stop"]
    assert "did you mean spike?" in str(unknown)


def test_two_nats_that_stay_stop_once_an_episode_and_name_the_rows() -> None:
    losses = healthy(0, 100) + [4.5] * 5 + healthy(1, 30) + [4.5] * 3
    found = findings(Watch(SETTING), losses, norm=lambda number: 6.0 if losses[number - 1] == 4.5 else 1.0)
    assert named(found, "spike") == [(101, "info"), (102, "stop"), (137, "stop")]
    stop = found[1]
    assert stop.numbers["rows"] == [101, 102]
    assert "median of accepted steps" in stop.numbers["rule"]
    assert stop.advice[0].startswith("half the learning rate")
    assert "fp4" in stop.advice[-1]
    assert "experimental" in stop.advice[-1]


def test_advice_begins_with_the_articles_rate_where_the_rate_is_higher() -> None:
    watch = Watch(SETTING)
    for number, loss in enumerate(healthy(0, 60), 1):
        watch.see(step(number, loss))
    found = [finding for number in (61, 62) for finding in watch.see(step(number, 9.0, 9.0, lr=3e-3))]
    assert found[-1].advice[0] == "learning_rate=0.0001"


def test_one_hard_step_is_a_note_at_most() -> None:
    found = findings(Watch(SETTING), [*healthy(0, 100), 5.0, *healthy(1, 40)], norm=lambda number: 5.0 if number == 101 else 1.0)
    assert named(found, "spike") == [(101, "info")]


def test_a_jump_with_a_calm_gradient_is_told_as_other_rows() -> None:
    found = findings(Watch(SETTING, stop=WATCHED), [*healthy(0, 100), *[loss + 2.5 for loss in healthy(1, 60)]])
    assert {finding.severity for finding in found} == {"info"}
    assert [finding.step for finding in found if "as when the rows change" in finding.message] == [102, 117]


def test_held_out_rows_have_the_last_word() -> None:
    for level, severity in ((1.2, "info"), (3.5, "stop")):
        watch = Watch(SETTING)
        measured(watch, 0, 1.8)
        findings(watch, healthy(0, 100))
        measured(watch, 100, 1.2)
        found = findings(watch, [4.5, 4.5], 101, lambda _: 6.0)
        assert watch.asks_holdout(found)
        (spike,) = [item for item in watch.weighed(found, held(level)) if "in a row" in item.message]
        assert (spike.severity, watch.action(spike)) == (severity, "stop" if severity == "stop" else "tell")


def test_losing_what_was_gained_since_the_base_is_an_illness_too() -> None:
    watch = Watch(SETTING)
    measured(watch, 0, 4.0)
    findings(watch, [4.0] * 8 + healthy(0, 90))
    found = findings(watch, [4.0, 4.0], 99, lambda _: 6.0)
    (spike,) = [item for item in watch.weighed(found, held(4.0)) if item.detector == "spike" and "in a row" in item.message]
    assert spike.severity == "stop"


def test_a_step_that_blew_up_at_once_is_seen_before_there_is_a_baseline() -> None:
    found = findings(Watch(SETTING), [1.8, 1.9, 1.7, 9.0, 12.0], norm=lambda number: 1.0 if number < 4 else 30.0)
    assert named(found, "spike") == [(4, "info"), (5, "stop")]


def test_one_bad_start_is_not() -> None:
    assert findings(Watch(SETTING), [9.0, *healthy(0, 60)]) == []


def test_what_nobody_asked_to_stop_warns() -> None:
    losses = [*healthy(0, 100), 4.5, 4.5]
    found = findings(Watch(SETTING, stop=()), losses, norm=lambda number: 6.0 if number > 100 else 1.0)
    assert named(found, "spike")[-1] == (102, "warn")
    watch = Watch(SETTING, roll_back=("spike",))
    found = findings(watch, losses, norm=lambda number: 6.0 if number > 100 else 1.0)
    assert watch.action(found[-1]) == "roll_back"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_three_non_finite_losses_in_a_row_end_the_run_whatever_was_asked(value: float) -> None:
    found = findings(Watch(SETTING, stop=()), [1.0, value, value, value])
    assert [finding.severity for finding in found] == ["warn", "warn", "stop"]


def test_a_non_finite_gradient_counts_like_a_loss() -> None:
    (finding,) = Watch(SETTING).see(step(1, 1.0, math.nan))
    assert (finding.detector, finding.severity) == ("non_finite", "warn")
    assert "gradient" in finding.message


def test_good_steps_between_bad_ones_do_not_end_the_run_until_they_keep_coming() -> None:
    found = findings(Watch(SETTING), [math.nan, 1.0] * 4)
    assert [finding.severity for finding in found] == ["warn", "warn", "warn", "stop"]


def test_a_loss_that_creeps_up_is_drift_and_with_a_calm_gradient_a_note() -> None:
    losses = healthy(0, 150) + [1.15 * 1.006**number for number in range(120)]
    ill = findings(Watch(SETTING, stop=WATCHED), losses, norm=lambda number: 1.01 ** max(0, number - 150))
    assert [severity for _, severity in named(ill, "drift")] == ["stop"]
    calm = findings(Watch(SETTING, stop=WATCHED), losses)
    assert [severity for _, severity in named(calm, "drift")] == ["info"]


def test_an_adapter_worse_than_the_base_does_harm() -> None:
    watch = Watch(SETTING, stop=WATCHED)
    measured(watch, 0, 1.8)
    (found,) = [finding for finding in measured(watch, 33, 3.0) if finding.detector == "drift"]
    assert "1.17 nats" in found.message
    assert "worse than under the base" in found.message


def test_swings_are_told_after_step_200_and_only_with_the_gradient() -> None:
    noise = random.Random(1)
    losses = [1.5 + noise.gauss(0, 0.05) for _ in range(260)] + [1.5 * (1.4 if number % 2 else 0.7) for number in range(80)]
    ill = findings(Watch(SETTING, stop=WATCHED), losses, norm=lambda number: 2.0 if number > 260 else 1.0)
    assert [severity for _, severity in named(ill, "oscillation")] == ["stop"]
    calm = findings(Watch(SETTING, stop=WATCHED), losses)
    assert [severity for _, severity in named(calm, "oscillation")] == ["info"]
    early = findings(Watch(SETTING, stop=WATCHED), losses[140:])
    assert named(early, "oscillation") == []


def test_a_gradient_far_outside_three_times_is_named_with_its_rows() -> None:
    norms = {101: 50.0, 104: 50.0, 107: 50.0}
    found = findings(Watch(SETTING, stop=WATCHED), healthy(0, 120), norm=lambda number: norms.get(number, 1.0))
    (gradient,) = [finding for finding in found if finding.detector == "gradient"]
    assert (gradient.step, gradient.numbers["rows"]) == (107, [101, 104, 107])


def test_clipping_most_steps_is_a_note() -> None:
    watch = Watch(SETTING, stop=WATCHED)
    found = [finding for number, loss in enumerate(healthy(0, 130), 1) for finding in watch.see(step(number, loss, clipped=True))]
    assert named(found, "gradient") == [(100, "info")]


def test_overfitting_is_told_row_by_row_and_only_while_training_gets_better() -> None:
    watch = Watch(SETTING, stop=WATCHED)
    found = measured(watch, 0, 1.8)
    for number, level in ((50, 1.3), (100, 1.2), (150, 1.23), (200, 1.27)):
        findings(watch, healthy(number, 250)[number - 50 : number], number - 49)
        found += measured(watch, number, level)
    (over,) = [finding for finding in found if finding.detector == "overfitting"]
    assert (over.step, over.numbers["best_step"]) == (200, 100)
    assert "take the checkpoint of the best measurement" in over.advice[0]


def test_too_few_held_out_rows_or_none_cannot_judge_and_say_so() -> None:
    for rows, words in ((0, "no held-out rows"), (10, "10 held-out rows are too few")):
        watch = Watch(SETTING)
        if rows:
            assert named(measured(watch, 0, 1.8, rows), "overfitting") == []
        found = [finding for number in (299, 301, 302) for finding in watch.see(step(number, 1.0, epoch=number / 300))]
        assert [(finding.step, finding.severity) for finding in found] == [(301, "info")]
        assert words in found[0].message


def test_rows_that_the_base_knows_are_told_before_step_1() -> None:
    found = [finding for finding in measured(Watch(SETTING), 0, 0.9) if finding.detector == "memorisation"]
    assert "perplexity under 3" in found[0].message
    assert "perplexity_filter=3" in found[0].advice[0]


def test_learning_by_heart_needs_a_second_pass_and_held_out_rows_that_do_not_follow() -> None:
    for level, expected in ((1.2, ["stop"]), (0.2, [])):
        watch = Watch(SETTING, stop=WATCHED)
        measured(watch, 0, 1.8)
        measured(watch, 300, level)
        assert [severity for _, severity in named(findings(watch, [0.1] * 80, 301), "memorisation")] == expected


def test_a_loss_as_at_the_start_is_not_learning_unless_held_out_rows_gained() -> None:
    flat = [1.8 + random.Random(number).gauss(0, 0.1) for number in range(480)]
    alone = Watch(SETTING, stop=WATCHED)
    assert [severity for _, severity in named(findings(alone, flat), "not_learning")] == ["stop"]
    watch = Watch(SETTING, stop=WATCHED)
    measured(watch, 0, 1.8)
    measured(watch, 1, 1.2)
    assert named(findings(watch, flat), "not_learning") == []


def test_noise_that_repeats_every_epoch_is_not_learning() -> None:
    watch = Watch(SETTING, stop=WATCHED)
    measured(watch, 0, 1.8)
    findings(watch, [1.8 - number / 400 for number in range(400)])
    found = measured(watch, 400, 1.8) + measured(watch, 420, 1.81)
    assert [(finding.step, "repeats every epoch" in finding.message) for finding in found if finding.detector == "not_learning"] == [
        (420, True)
    ]


def test_a_gradient_of_zero_and_a_layer_that_stands_still_are_not_learning() -> None:
    assert named(findings(Watch(SETTING, stop=WATCHED), [1.8] * 5, norm=lambda _: 0.0), "not_learning") == [(3, "stop")]
    (found,) = Watch(SETTING).adapter(3, ["layers.0.q_proj.lora_B"], 14)
    assert found.severity == "warn"
    assert Watch(SETTING).adapter(3, [], 14) == []


def test_slow_steps_and_waiting_are_told_by_the_token() -> None:
    watch, found = Watch(SETTING, stop=WATCHED), list[Finding]()
    for number in range(1, 120):
        slow = number > 80
        found += watch.see(step(number, 1.5, seconds=8.0 if slow else 1.0, data_seconds=4.0 if slow else 0.0))
    assert named(found, "throughput") == [(90, "stop")]
    assert [severity for _, severity in named(found, "data_wait")] == ["stop"]
    watch = Watch(SETTING, stop=WATCHED)
    long = [finding for number in range(1, 120) for finding in watch.see(step(number, 1.5, seconds=8.0, tokens=800))]
    assert named(long, "throughput") == []


def test_a_card_that_slows_itself_down_is_told_once_until_it_is_over() -> None:
    watch, found = Throttling(), list[Finding]()
    hot = Device(temperature_c=91.0, power_watts=300.0, power_limit_watts=450.0, throttle="too hot")
    for number in range(200):
        finding = watch.see(hot if number < 100 else Device(), 7)
        found += [finding] if finding else []
    assert [(finding.severity, finding.step) for finding in found] == [("warn", 7)]
    assert "too hot at 91 °C (300 of 450 W)" in found[0].message
    watch = Throttling()
    notes = [finding for _ in range(60) if (finding := watch.see(Device(throttle="power limit"), 1))]
    assert [finding.severity for finding in notes] == ["info"]


FUSED = {"_scaled_dot_product_flash_attention": 28}


@pytest.mark.parametrize(
    ("seen", "severity", "words"),
    [
        (Seen(FUSED, 2048, 100 << 20, 200 << 20, 128, "bfloat16"), "info", "ran fused: flash in 28 calls; memory 100 MiB at 1024 tokens"),
        (Seen({"_softmax": 28}, 2048, 100 << 20, 390 << 20, 128, "bfloat16", "eager"), "warn", "attn_implementation=eager asks for it"),
        (Seen({"_softmax": 28}, 2048, 0, 0, 288, "bfloat16"), "warn", "288 wide and the flash kernel ends at 256"),
        (
            Seen(FUSED, 2048, 100 << 20, 390 << 20, 128, "float32"),
            "warn",
            "yet memory grows with the square of the length: float32: the flash kernel takes 16-bit types only",
        ),
        (Seen({"_softmax": 2, **FUSED}, 2048, 0, 0, 128, "bfloat16", capability=(7, 5)), "warn", "this card has 7.5"),
        (Seen({}, 2048, 0, 0, 128, "bfloat16"), "info", "in a way of its own"),
    ],
)
def test_the_attention_kernel_is_judged_by_what_ran_and_by_memory(seen: Seen, severity: str, words: str) -> None:
    found = judge(seen)
    assert found.severity == severity
    assert words in found.message


def test_a_resumed_watch_judges_like_an_uninterrupted_one() -> None:
    losses = [*healthy(3, 90), 4.4, 4.4, 4.4, *healthy(4, 10), math.nan, math.nan, math.nan]
    norm = lambda number: 5.0 if losses[number - 1] > 4 else 1.0  # noqa: E731
    first = Watch(SETTING, stop=WATCHED)
    measured(first, 0, 1.8)
    whole = findings(first, losses, norm=norm)
    assert {finding.detector for finding in whole} == {"spike", "gradient", "non_finite"}
    for cut in (10, 50, 91, 92, 104):
        first, second = Watch(SETTING, stop=WATCHED), Watch(SETTING, stop=WATCHED)
        measured(first, 0, 1.8)
        early = findings(first, losses[:cut], norm=norm)
        second.restore(json.loads(json.dumps(first.state())))
        assert told(early + findings(second, losses[cut:], cut + 1, norm)) == told(whole)


NUMBER = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, -1.0, 1e308, -1e308, 1e-320]))


@given(st.lists(st.tuples(NUMBER, NUMBER, NUMBER), max_size=90), st.lists(NUMBER, min_size=20, max_size=20))
def test_no_number_whatever_ends_the_watch(steps: list[tuple[float, float, float]], rows: list[float]) -> None:
    watch = Watch(Setting(), stop=WATCHED)
    for number, (loss, norm, level) in enumerate(steps):
        found = watch.see(step(number, loss, norm, epoch=2.0))
        lines = [HeldRow(row, 20) for row in rows]
        found += watch.measured(Evaluated(number, level, 20, 0.0), lines) if number % 7 == 0 else []
        watch.weighed(found, lines)
    json.dumps(watch.state())


def test_memory_does_not_grow() -> None:
    watch = Watch(SETTING, stop=WATCHED)
    sizes = []
    for number in range(1, 1500):
        watch.see(step(number, 1.0 + (number % 7) / 10))
        if number % 50 == 0:
            watch.measured(Evaluated(number, 1.2, 900, 0.1), held(1.2, 900))
        if number in (700, 1499):
            sizes.append(len(json.dumps(watch.state())))
    assert sizes[1] < sizes[0] * 1.2


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.integers(1, 12))
def test_a_window_keeps_the_newest(values: list[float], size: int) -> None:
    window = Rolling(size)
    for value in values:
        window.add(value)
    assert window.values == values[-size:]
    assert min(window.values) <= window.median <= max(window.values)
    assert window.sigma >= 0


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20), st.floats(-5, 5))
def test_a_shift_of_every_row_has_no_spread(rows: list[float], shift: float) -> None:
    mean, error = paired(rows, [row + shift for row in rows])
    assert mean == pytest.approx(shift, abs=1e-9)
    assert error == pytest.approx(0.0, abs=1e-9)
