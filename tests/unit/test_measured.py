from __future__ import annotations

import dataclasses
import json
import math
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui.engine import measured
from qlora_tui.engine.measured import Speed, StepTime
from qlora_tui.engine.places import place

CARD, LIBS = "NVIDIA Test Card", "torch 1, transformers 2"
SPEED = Speed(7e14, 2e12, 7e11, 3e-3)


def path():
    return place("state") / measured.FILE


def remember(*ratios, card=CARD, libs=LIBS):
    for ratio in ratios:
        measured.remember_memory(card, libs, {"load": 500, "train": 1000, "eval": 700}, {"train": round(1000 * ratio), "eval": 9000})


def test_nothing_is_known_at_first_and_nothing_is_written_by_asking():
    assert measured.correction(CARD, LIBS) is None
    assert measured.speed(CARD) is None
    assert measured.steps(CARD, "key") == []
    assert measured.stamp() == (0, 0)
    assert not path().exists()


def test_one_run_is_no_bias_and_two_are():
    remember(1.1)
    assert measured.correction(CARD, LIBS) is None
    remember(1.1)
    assert measured.correction(CARD, LIBS) == measured.Correction(1.1, 0.01, 2)


def test_the_bias_is_that_of_the_phase_predicted_biggest_and_one_odd_run_does_not_move_it():
    remember(1.05, 1.05, 1.06, 1.04, 1.30)
    found = measured.correction(CARD, LIBS)
    assert found.bias == pytest.approx(1.05)
    assert found.error == pytest.approx(1.30 / 1.05 - 1)


@pytest.mark.parametrize(("ratio", "bias"), [(3.0, 1.25), (0.1, 0.8)])
def test_a_bias_beyond_reason_is_not_corrected_away(ratio, bias):
    remember(ratio, ratio)
    found = measured.correction(CARD, LIBS)
    assert found.bias == bias
    assert found.error == pytest.approx(abs(ratio / bias - 1))


def test_only_the_last_twenty_runs_count_and_fifty_are_kept():
    remember(*[1.2] * 60, *[0.9] * 20)
    assert measured.correction(CARD, LIBS) == measured.Correction(0.9, 0.01, 20)
    (runs,) = json.loads(path().read_text())["memory"].values()
    assert len(runs) == 50


def test_other_cards_and_other_libraries_are_other_records():
    remember(1.1, 1.1)
    assert measured.correction("another", LIBS) is None
    assert measured.correction(CARD, "torch 2") is None
    assert measured.correction_now(CARD) is None
    remember(0.9, 0.9, libs=measured.versions())
    assert measured.correction_now(CARD).bias == 0.9


def test_phases_that_were_not_both_predicted_and_measured_are_no_record():
    measured.remember_memory(CARD, LIBS, {"train": 10}, {"eval": 10})
    measured.remember_memory(CARD, LIBS, {"train": 0}, {"train": 10})
    assert not path().exists()


def test_the_newest_speed_counts_and_a_broken_one_is_not_kept():
    measured.remember_speed(CARD, LIBS, Speed(1.0, 1.0, 1.0, 1.0))
    measured.remember_speed(CARD, LIBS, SPEED)
    for broken in (0.0, -1.0, math.nan, math.inf):
        measured.remember_speed(CARD, LIBS, Speed(broken, 1.0, 1.0, 1.0))
        measured.remember_speed(CARD, LIBS, Speed(1.0, 1.0, 1.0, 1.0, int8_share=broken or -2.0))
    assert measured.speed(CARD) == SPEED
    measured.remember_speed(CARD, LIBS, dataclasses.replace(SPEED, int8_share=0.6))
    assert measured.speed(CARD).int8_share == 0.6


def test_a_speed_without_shares_is_read_as_older_versions_wrote_it():
    measured.remember_speed(CARD, LIBS, SPEED)
    book = json.loads(path().read_text())
    del book["speed"][CARD]["pieces"][4:]
    path().write_text(json.dumps(book))
    assert measured.speed(CARD) == SPEED


def test_steps_come_back_by_rows_and_length_and_a_newer_one_of_that_length_wins():
    for tokens, rows, seconds in [(2000, 2, 1e-4), (500, 2, 2e-4), (2040, 2, 3e-4), (2000, 1, 4e-4)]:
        measured.remember_steps(CARD, "key", tokens, rows, seconds)
    measured.remember_steps(CARD, "other", 100, 1, 1e-4)
    measured.remember_steps(CARD, "key", 0, 1, 1e-4)
    measured.remember_steps(CARD, "key", 100, 1, math.nan)
    assert measured.steps(CARD, "key") == [StepTime(2000, 1, 4e-4), StepTime(500, 2, 2e-4), StepTime(2040, 2, 3e-4)]
    assert set(measured.all_steps(CARD)) == {"key", "other"}


def test_the_file_stays_small():
    for index in range(100):
        measured.remember_steps(CARD, f"key {index}", 100, 1, 1e-4)
        measured.remember_speed(f"card {index}", LIBS, SPEED)
        remember(1.0, libs=f"torch {index}")
    book = json.loads(path().read_text())
    assert len(book["speed"]) == len(book["memory"]) == len(book["steps"][CARD]) == 40
    assert measured.speed("card 99") == SPEED
    assert measured.speed("card 0") is None
    for tokens in range(100, 4000, 20):
        measured.remember_steps(CARD, "long", tokens, tokens, 1e-4)
    assert len(measured.steps(CARD, "long")) == 60


def test_what_is_remembered_is_seen_at_once_and_changes_the_stamp():
    stamps = set()
    for ratio in (1.0, 1.1, 1.2):
        remember(ratio, ratio, card=f"card {ratio}")
        assert measured.correction(f"card {ratio}", LIBS).bias == ratio
        stamps.add(measured.stamp())
    assert len(stamps) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"v": 99, "memory": {}}',
        '{"v": "1"}',
        "[" * 100_000,
        "\udcff",
        '{"v": 1, "memory": 3, "speed": [], "steps": {"a": 1}}',
    ],
)
def test_a_damaged_or_newer_file_counts_as_empty_and_can_be_written_again(text):
    path().parent.mkdir(parents=True)
    path().write_bytes(text.encode("utf-8", "surrogateescape"))
    assert measured.correction_now(CARD) is None
    assert measured.speed(CARD) is None
    assert measured.all_steps("a") == {}
    measured.remember_speed(CARD, LIBS, SPEED)
    assert measured.speed(CARD) == SPEED


def test_damaged_entries_are_left_out_and_whole_ones_kept():
    remember(1.1, 1.1)
    measured.remember_speed(CARD, LIBS, SPEED)
    measured.remember_steps(CARD, "key", 100, 1, 1e-4)
    book = json.loads(path().read_text())
    (runs,) = book["memory"].values()
    runs += [None, {}, {"predicted": {"train": 0}, "measured": {"train": 1}}, {"predicted": {"train": "x"}, "measured": {"train": 1}}]
    book["speed"]["b"] = {"pieces": [1, 2, 3]}
    book["speed"]["c"] = {"pieces": [1, 2, 3, 10**400]}
    book["steps"][CARD]["key"] += [[1, 2], [1, 1, -1], "x", [1, 1, True]]
    path().write_text(json.dumps(book))
    assert measured.correction(CARD, LIBS).runs == 2
    assert (measured.speed(CARD), measured.speed("b"), measured.speed("c")) == (SPEED, None, None)
    assert measured.steps(CARD, "key") == [StepTime(100, 1, 1e-4)]


def test_a_folder_that_cannot_be_written_loses_a_measurement_and_nothing_else(home):
    home.write_text("a file where the folder should be")
    remember(1.1, 1.1)
    measured.remember_speed(CARD, LIBS, SPEED)
    assert measured.speed(CARD) is None
    assert measured.stamp() == (0, 0)


def test_two_writers_lose_nothing_of_each_other():
    def write(name):
        for _ in range(10):
            remember(1.1, card=name)

    threads = [threading.Thread(target=write, args=(f"card {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [measured.correction(f"card {number}", LIBS).runs for number in range(4)] == [10] * 4


def test_the_versions_name_the_four_libraries_that_decide():
    assert [part.split()[0] for part in measured.versions().split(", ")] == ["torch", "transformers", "peft", "bitsandbytes"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(st.lists(st.floats(0.5, 2.0), min_size=2, max_size=20))
def test_no_run_is_further_from_the_corrected_prediction_than_the_error_says(ratios):
    path().unlink(missing_ok=True)
    remember(*ratios)
    found = measured.correction(CARD, LIBS)
    assert found.runs == len(ratios)
    assert 0.8 <= found.bias <= 1.25
    for ratio in ratios:
        assert abs(round(1000 * ratio) / 1000 / found.bias - 1) <= found.error + 1e-12
