from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine import lengthy, machine, models
from qlora_tui.engine.forecast import Before, Work, before_work
from qlora_tui.engine.spec import RunConfig

LLAMA = models.find("meta-llama/Llama-3.1-8B-Instruct")
QWEN_14B = models.find("Qwen/Qwen2.5-14B-Instruct")
H100 = machine.find_card("H100 80GB")
RTX_3060 = machine.find_card("RTX 3060")
TWO_ROWS = RunConfig(per_device_train_batch_size=2, gradient_accumulation_steps=8, gradient_checkpointing="true", dtype="bfloat16")


def with_(run=TWO_ROWS, **changes):
    return dataclasses.replace(run, **changes)


def told(run=TWO_ROWS, model=LLAMA, device=H100, hours=1.0, epoch_hours=0.5, **more):
    low, mid, high = (share * hours * 3600 for share in (0.9, 1.0, 1.1))
    found = Before((1.0, 1.0, 1.0), (low, mid, high), "a test", (0.0, epoch_hours * 3600, 1e9))
    return lengthy.remarks(model, run, device, found, **more)


def test_an_ordinary_run_gets_no_remark():
    assert told(longest_chat=4096) == []
    assert lengthy.remarks(LLAMA, TWO_ROWS, H100, None) == []


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
        (lambda: told(with_(max_length=8000), longest_chat=5000), "each is a row"),
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


WORK = Work(16 * 1000 * 1500, 1500, 1500, 10**5, (1000,) * 40, 24_000, 100)


@pytest.mark.parametrize(
    "crossed",
    [
        lambda **more: told(epoch_hours=6.1, **more),
        lambda **more: told(with_(max_length=9000), **more),
        lambda **more: told(model=QWEN_14B, device=machine.find_card("RTX 4090"), **more),
    ],
)
def test_three_of_them_say_what_renting_costs_instead(crossed):
    assert len(crossed()) == 1
    _, rent = crossed(asked=RunConfig(), work=WORK)
    assert rent.startswith("Rented: $")
    assert "A100 80GB" in rent
    assert "$3 - 5 an hour" in rent


def test_a_long_run_alone_says_nothing_of_renting():
    assert not any("Rented" in line for line in told(hours=12.1, asked=RunConfig(), work=WORK))


def proposals(run=None, work=WORK, device=RTX_3060):
    run = run or with_(num_train_epochs=3.0)
    work = work._replace(steps=run.max_steps or round(work.steps_per_epoch * run.num_train_epochs))
    return lengthy.shorter(LLAMA, run, device, before_work(LLAMA, run, device, work), work), work


def test_a_run_over_12_hours_is_offered_fewer_rows_fewer_epochs_and_a_lower_rank():
    found, _ = proposals()
    assert {one.set[0].split("=")[0] for one in found} == {"num_train_epochs", "max_samples", "lora_r"}
    assert found == sorted(found, key=lambda one: -one.saves_seconds)
    assert all("less" in one.text and "in all" in one.text for one in found)


def test_the_hours_saved_are_those_of_the_changed_run():
    run = with_(num_train_epochs=3.0)
    found, work = proposals(run)
    time = before_work(LLAMA, run, RTX_3060, work).total_seconds[1]
    for one in found:
        values = dict(part.split("=") for part in one.set)
        changed = dataclasses.replace(run, **{name: type(getattr(run, name))(float(text)) for name, text in values.items()})
        share = (changed.max_samples - work.held) / work.rows if changed.max_samples else 1.0
        steps = round(work.steps_per_epoch * share * changed.num_train_epochs)
        less = work._replace(tokens_per_epoch=round(work.tokens_per_epoch * share), steps=steps, steps_per_epoch=round(1500 * share))
        then = before_work(LLAMA, changed, RTX_3060, less).total_seconds[1]
        assert one.saves_seconds == pytest.approx(time - then, rel=0.02), one.set


@given(epochs=st.floats(0.5, 20), rows=st.integers(2_000, 10**6), share=st.booleans())
def test_fewer_rows_and_epochs_bring_a_run_under_12_hours_where_that_is_possible(epochs, rows, share):
    an_epoch = -(-rows // 16)
    work = Work(rows * 1000, max(1, round(an_epoch * epochs)), an_epoch, 10**5, (1000,) * 40, rows, 100)
    run = with_(num_train_epochs=epochs, val_set_size=0.01 if share else 100.0)
    time = before_work(LLAMA, run, RTX_3060, work)
    found = lengthy.shorter(LLAMA, run, RTX_3060, time, work)
    if time.total_seconds[1] <= lengthy.LONG_RUN:
        assert found == []
        return
    samples = next(one for one in found if "max_samples" in one.set[0])
    left = time.total_seconds[1] - samples.saves_seconds
    assert left <= lengthy.LONG_RUN * 1.02 or left < 0.06 * time.total_seconds[1]


def test_where_steps_are_set_they_are_what_is_shortened():
    found, _ = proposals(with_(max_steps=5000))
    assert {one.set[0].split("=")[0] for one in found} == {"max_steps", "lora_r"}


def test_a_run_under_12_hours_is_left_alone():
    assert proposals(device=H100)[0] == []
    assert lengthy.shorter(LLAMA, TWO_ROWS, RTX_3060, None, WORK) == []
