from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine import budget, machine, models, onebyte
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.fixes import MOST, fixes, tips
from qlora_tui.engine.measured import Correction
from qlora_tui.engine.spec import RunConfig, rows_per_step
from qlora_tui.engine.units import gib

GIB = 1 << 30
LLAMA = models.find("meta-llama/Llama-3.1-8B-Instruct")
QWEN = models.find("Qwen/Qwen2.5-14B-Instruct")
DEMO = models.find("builtin:smollm2-135m")
CARD, H100 = machine.find_card("RTX 4090"), machine.find_card("H100")
CPU = machine.Machine("cpu", "cpu", 16 * GIB, 2 * GIB, cores=4)
USUAL = RunConfig(per_device_train_batch_size=2, gradient_accumulation_steps=8, gradient_checkpointing="true")
FAT = dataclasses.replace(USUAL, gradient_checkpointing="false", max_length=3072)
SHORT_ROWS = (300,) * 90 + (1200,) * 7 + (2000,) * 3


def applied(run, fix):
    return dataclasses.replace(run, **{name: value for name, value in fix.values.items() if name != "model_name_or_path"})


def model_of(fix, model):
    return models.find(str(fix.values.get("model_name_or_path", model.name)))


def of(found, *names):
    return next((fix for fix in found if set(fix.values) == set(names)), None)


def below(total):
    """A card like a 4090 that is just too small for `total` bytes."""
    return dataclasses.replace(CARD, total_bytes=total - 1)


@pytest.mark.parametrize("lengths", [(), SHORT_ROWS], ids=["", "with lengths"])
@pytest.mark.parametrize(
    "run", [USUAL, FAT, dataclasses.replace(FAT, method="lora", optim="adamw_torch", use_dora=True), RunConfig(method="auto")]
)
def test_every_fix_does_what_it_says(run, lengths):
    now = budget.estimate(LLAMA, run, CARD)
    found = fixes(LLAMA, run, CARD, lengths=lengths)
    assert 0 < len(found) <= MOST
    for fix in found:
        after = budget.estimate(model_of(fix, LLAMA), applied(run, fix), CARD)
        assert now.total_bytes - after.total_bytes == fix.saves_bytes > 0
        assert after.fits == fix.enough
        assert fix.quality in fix.text


def test_what_is_enough_comes_first_then_the_least_harm_then_the_least_time():
    found = fixes(LLAMA, FAT, CARD)
    assert [fix.enough for fix in found] == sorted((fix.enough for fix in found), reverse=True)
    enough = [fix for fix in found if fix.enough]
    assert [bool(fix.quality) for fix in enough] == sorted(bool(fix.quality) for fix in enough)
    harmless = [fix.time_factor for fix in enough if not fix.quality]
    assert harmless == sorted(harmless)
    assert len(harmless) >= 2


def test_the_first_fix_makes_it_run_with_the_margin():
    for card in (CARD, machine.find_card("RTX 3060")):
        first = fixes(LLAMA, FAT, card)[0]
        after = budget.estimate(LLAMA, applied(FAT, first), card)
        assert first.enough
        assert after.fits


def test_no_more_layers_are_recomputed_than_is_enough():
    fix = of(fixes(LLAMA, FAT, CARD), "gradient_checkpointing")
    number = int(fix.values["gradient_checkpointing"])
    assert 0 < number < LLAMA.num_hidden_layers
    fewer = budget.estimate(LLAMA, dataclasses.replace(FAT, gradient_checkpointing=str(number - 1)), CARD)
    assert not fewer.fits or fewer.tight
    assert f"{number} of 32 layers" in fix.text
    all_of_them = of(fixes(LLAMA, dataclasses.replace(FAT, max_length=24_576), CARD), "gradient_checkpointing")
    assert all_of_them is None or all_of_them.values["gradient_checkpointing"] == "true"


def test_fewer_rows_at_once_see_as_many_rows_a_step():
    run = dataclasses.replace(FAT, per_device_train_batch_size=6, gradient_accumulation_steps=2)
    fix = of(fixes(LLAMA, run, CARD), "per_device_train_batch_size", "gradient_accumulation_steps")
    assert rows_per_step(applied(run, fix)) == 12
    assert fix.values["per_device_train_batch_size"] < 6
    assert fix.set.startswith("per_device_train_batch_size=")
    assert fix.options.count("--set ") == 2


def test_a_shorter_length_says_what_it_drops():
    run = dataclasses.replace(USUAL, per_device_train_batch_size=8, max_length=2048)
    small = below(budget.estimate(LLAMA, run, CARD).total_bytes)
    known = of(fixes(LLAMA, run, small, lengths=SHORT_ROWS), "max_length")
    assert known.values["max_length"] == 1792
    assert known.quality == "drops 3.0 % of your rows"
    unknown = of(fixes(LLAMA, run, small), "max_length")
    assert unknown.quality == "longer rows are dropped"
    free = of(fixes(LLAMA, run, small, lengths=(300,) * 50), "max_length")
    assert free.quality == ""
    assert fixes(LLAMA, run, small, lengths=(300,) * 50)[0].quality == ""


def test_lengths_may_come_in_any_order():
    run = dataclasses.replace(USUAL, per_device_train_batch_size=8)
    small = below(budget.estimate(LLAMA, run, CARD).total_bytes)
    assert fixes(LLAMA, run, small, lengths=SHORT_ROWS[::-1]) == fixes(LLAMA, run, small, lengths=SHORT_ROWS)


def test_every_kind_of_fix_is_found_where_it_helps():
    run = RunConfig(
        method="lora",
        optim="adamw_torch",
        attn_implementation="eager",
        lora_r=64,
        use_dora=True,
        per_device_train_batch_size=2,
        gradient_checkpointing="false",
        dtype="float32",
    )
    from qlora_tui.engine.changes import Asked, smaller

    asked = Asked(LLAMA, run, CARD, None, (), None)
    keys = {name for change in smaller(asked) for name in change.values}
    assert keys == {
        "optim",
        "attn_implementation",
        "gradient_checkpointing",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "loss_chunk_size",
        "max_length",
        "lora_r",
        "use_dora",
        "lora_target_modules",
        "method",
        "bnb_4bit_quant_type",
        "dtype",
    }
    assert "bnb_4bit_use_double_quant" in {
        name
        for change in smaller(Asked(LLAMA, dataclasses.replace(USUAL, bnb_4bit_use_double_quant=False), CARD, None, (), None))
        for name in change.values
    }
    pissa = Asked(LLAMA, dataclasses.replace(run, init_lora_weights="pissa"), CARD, None, (), None)
    assert "method" not in {name for change in smaller(pissa) for name in change.values}


def test_when_no_single_change_is_enough_the_smallest_bundle_and_a_smaller_model_come_first():
    small = machine.find_card("RTX 3060")
    found = fixes(QWEN, FAT, small)
    assert not any(fix.enough for fix in found if len(fix.values) == 1)
    assert found[0].enough
    named = [fix for fix in found if "model_name_or_path" in fix.values]
    assert named[0].values["model_name_or_path"] == "Qwen/Qwen2.5-7B-Instruct"
    assert "model_name_or_path=Qwen/Qwen2.5-7B-Instruct" in named[0].set
    bundles = [fix for fix in found if len(fix.values) > 2 and "model_name_or_path" not in fix.values]
    for bundle in bundles:
        last = next(reversed(bundle.values))
        without = {name: value for name, value in bundle.values.items() if name != last}
        assert not budget.estimate(QWEN, dataclasses.replace(FAT, **without), small).fits


def test_a_sister_is_of_the_same_generation():
    run = dataclasses.replace(USUAL, memory_limit_gib=6.0)
    named = [fix.values["model_name_or_path"] for fix in fixes(LLAMA, run, CARD) if "model_name_or_path" in fix.values]
    assert named == ["meta-llama/Llama-3.2-3B-Instruct"]


def test_a_correction_moves_what_is_enough():
    now = budget.estimate(LLAMA, FAT, CARD)
    exact = of(fixes(LLAMA, FAT, CARD, correction=Correction(1.0, 0.01, 9)), "gradient_checkpointing")
    larger = of(fixes(LLAMA, FAT, CARD, correction=Correction(1.1, 0.01, 9)), "gradient_checkpointing")
    assert not now.fits
    assert int(larger.values["gradient_checkpointing"]) > int(exact.values["gradient_checkpointing"])


def test_a_target_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="q_prj"):
        fixes(LLAMA, dataclasses.replace(USUAL, lora_target_modules=("q_prj",)), CARD)


def test_a_fix_is_json_with_the_promised_keys():
    for fix in fixes(LLAMA, FAT, CARD, lengths=SHORT_ROWS):
        assert {"set", "saves_bytes", "time_factor", "text", "quality", "enough"} == set(fix.to_json())
        json.dumps(fix.to_json())


def test_tips_fit_with_the_margin_and_are_faster_or_better():
    lengths = (300,) * 80 + (3000,) * 20
    for run, card in ((USUAL, H100), (USUAL, CARD), (dataclasses.replace(USUAL, per_device_train_batch_size=1), H100)):
        found = tips(LLAMA, run, card, lengths=lengths)
        assert 0 < len(found) <= MOST
        for tip in found:
            after = budget.estimate(LLAMA, applied(run, tip), card)
            assert after.fits
            assert not after.tight
            assert tip.time_factor < 1 or tip.quality
            assert tip.saves_bytes == budget.estimate(LLAMA, run, card).total_bytes - after.total_bytes
            assert rows_per_step(applied(run, tip)) == rows_per_step(run)
        speeds = [tip.time_factor for tip in found if tip.time_factor < 0.97]
        assert speeds == sorted(speeds)
    assert of(tips(LLAMA, USUAL, H100), "gradient_checkpointing").set == "gradient_checkpointing=false"


def test_tips_keep_as_many_activations_as_fit():
    run = dataclasses.replace(USUAL, max_length=3072)
    tip = of(tips(LLAMA, run, CARD), "gradient_checkpointing")
    number = int(tip.values["gradient_checkpointing"])
    fewer = budget.estimate(LLAMA, dataclasses.replace(run, gradient_checkpointing=str(number - 1)), CARD)
    assert fewer.tight or not fewer.fits
    assert "faster" in tip.text


def test_tips_offer_a_base_in_16_bits_and_longer_rows_where_they_fit():
    lengths = (300,) * 80 + (3000,) * 20
    found = tips(LLAMA, USUAL, H100, lengths=lengths)
    assert of(found, "method").quality == "no loss from 4 bits"
    longer = of(found, "max_length")
    assert longer.values["max_length"] == 3072
    assert longer.quality == "keeps 20 % more of your rows"
    assert of(tips(LLAMA, USUAL, H100), "max_length") is None
    assert the(tips(QWEN, USUAL, CARD), {"method": "lora"}) is None


def test_a_run_that_is_short_of_memory_gets_no_tips():
    assert tips(LLAMA, FAT, CARD) == []
    need = budget.estimate(LLAMA, USUAL, CARD)
    tight = dataclasses.replace(CARD, total_bytes=need.total_bytes + need.margin_bytes // 2)
    assert tips(LLAMA, USUAL, tight) == []


def test_a_processor_gets_no_advice_of_a_card():
    for fix in (*fixes(DEMO, FAT, dataclasses.replace(CPU, total_bytes=3 * GIB)), *tips(DEMO, USUAL, CPU)):
        assert not {"optim", "method"} & set(fix.values)


def test_a_huge_step_is_no_burden():
    run = dataclasses.replace(FAT, per_device_train_batch_size=4096, gradient_accumulation_steps=65_536)
    fix = of(fixes(DEMO, run, CARD), "per_device_train_batch_size", "gradient_accumulation_steps")
    assert rows_per_step(applied(run, fix)) == rows_per_step(run)


RUNS = st.builds(
    RunConfig,
    lora_r=st.sampled_from([1, 8, 64, 256]),
    max_length=st.sampled_from([16, 300, 2048, 32_768]),
    per_device_train_batch_size=st.integers(0, 12),
    gradient_accumulation_steps=st.sampled_from([1, 2, 7, 16]),
    gradient_checkpointing=st.sampled_from(["auto", "true", "false", "5"]),
    method=st.sampled_from(["qlora", "lora", "auto"]),
    optim=st.sampled_from(["auto", "adamw_8bit", "adamw_torch"]),
    attn_implementation=st.sampled_from(["sdpa", "eager"]),
    use_dora=st.booleans(),
)


@given(
    model=st.sampled_from([LLAMA, QWEN, DEMO, models.find("google/gemma-2-2b-it"), models.find("microsoft/Phi-3.5-mini-instruct")]),
    run=RUNS,
    card=st.sampled_from([CARD, H100, CPU, machine.find_card("T4")]),
    lengths=st.sampled_from([(), SHORT_ROWS]),
)
def test_no_advice_lowers_accumulation_alone_or_changes_the_rows_of_a_step(model, run, card, lengths):
    for fix in (*fixes(model, run, card, lengths=lengths), *tips(model, run, card, lengths=lengths)):
        after = applied(run, fix)
        assert rows_per_step(after) == rows_per_step(run)
        if after.gradient_accumulation_steps < run.gradient_accumulation_steps:
            assert after.per_device_train_batch_size > run.per_device_train_batch_size
        assert fix.time_factor > 0


def test_a_tip_of_longer_rows_counts_the_rows_that_it_lets_in():
    lengths = (300,) * 80 + (3000,) * 20
    longer = of(tips(LLAMA, USUAL, H100, longest=300, lengths=lengths), "max_length")
    now, then = (
        budget.estimate(LLAMA, dataclasses.replace(USUAL, max_length=limit), H100, longest=longest)
        for limit, longest in ((USUAL.max_length, 300), (longer.values["max_length"], 3000))
    )
    assert -longer.saves_bytes == then.total_bytes - now.total_bytes > 0
    assert longer.text.startswith(f"max length 3,072: +{gib(-longer.saves_bytes)}, {gib(then.total_bytes)} in all")


def test_where_long_rows_are_cut_a_longer_limit_keeps_more_of_them_whole():
    cut = dataclasses.replace(USUAL, too_long="cut")
    longer = of(tips(LLAMA, cut, H100, longest=2048, lengths=(300,) * 80 + (3000,) * 20), "max_length")
    assert longer.quality == "keeps 20 % more of your rows whole"


def test_where_every_row_is_too_long_a_longer_limit_is_compared_by_the_token():
    longer = of(tips(LLAMA, dataclasses.replace(USUAL, max_length=256), H100, lengths=(300,) * 100), "max_length")
    assert longer.time_factor < 2


@pytest.fixture
def measured_fp8(monkeypatch):
    monkeypatch.setattr(onebyte, "GOOD_ENOUGH", frozenset({"fp8"}))


EIGHT = {"method": "lora-8bit"}


def the(found, values):
    return next((one for one in found if dict(one.values) == values), None)


def test_nothing_proposes_an_8_bit_base_that_was_not_measured(monkeypatch):
    monkeypatch.setattr(onebyte, "GOOD_ENOUGH", frozenset())
    for card in (H100, CARD):
        assert the(tips(LLAMA, USUAL, card), EIGHT) is None
        assert the(fixes(LLAMA, dataclasses.replace(USUAL, method="lora"), card), EIGHT) is None


def test_an_8_bit_base_is_a_tip_where_16_bits_do_not_fit_or_it_is_faster(measured_fp8):
    run = dataclasses.replace(USUAL, gradient_checkpointing="false")
    tight = dataclasses.replace(CARD, total_bytes=budget.estimate(LLAMA, dataclasses.replace(run, **EIGHT), CARD).total_bytes + 2 * GIB)
    found = tips(LLAMA, run, tight)
    assert the(found, {"method": "lora"}) is None
    tip = the(found, EIGHT)
    assert tip.time_factor < 1
    assert "GiB in all" in tip.text
    assert "faster" in tip.text
    assert "nats from 16 bits" in tip.text
    roomy = tips(LLAMA, run, H100)
    assert the(roomy, {"method": "lora"}).quality == "no loss from 4 bits"
    assert the(roomy, EIGHT).time_factor < 1


def test_where_16_bits_fit_an_8_bit_base_that_is_slower_is_no_tip(monkeypatch):
    monkeypatch.setattr(onebyte, "GOOD_ENOUGH", frozenset({"16bit"}))
    ampere = dataclasses.replace(H100, compute_capability=(8, 0))  # which multiplies no FP8
    assert the(tips(LLAMA, USUAL, ampere), {"method": "lora"})
    assert the(tips(LLAMA, USUAL, ampere), EIGHT) is None


def test_an_8_bit_base_is_the_milder_fix_for_a_16_bit_one(measured_fp8):
    run = dataclasses.replace(USUAL, method="lora")
    found = fixes(LLAMA, run, dataclasses.replace(CARD, total_bytes=16 * GIB))
    eight, four = the(found, EIGHT), of(found, "method", "bnb_4bit_quant_type")
    assert 0 < eight.saves_bytes < four.saves_bytes
    assert found.index(eight) < found.index(four)
    assert "nats from 16 bits" in eight.text
    assert eight.enough


@pytest.mark.parametrize(
    ("model", "run", "card"),
    [
        (dataclasses.replace(LLAMA, quantized="nf4"), USUAL, CARD),
        (dataclasses.replace(LLAMA, wrapper="mistral3"), USUAL, CARD),
        (LLAMA, dataclasses.replace(USUAL, method="lora", init_lora_weights="pissa"), CARD),
        (LLAMA, USUAL, machine.find_card("RTX 3090")),  # gradients in 16 bits there, which this fixture has not measured
        (DEMO, USUAL, CPU),
    ],
    ids=["stored in 4 bits", "sees too", "pissa", "before Ada", "processor"],
)
def test_an_8_bit_base_is_proposed_only_where_it_is_possible(measured_fp8, model, run, card):
    assert the([*tips(model, run, card), *fixes(model, run, card)], EIGHT) is None


@pytest.mark.parametrize(
    ("capability", "able", "usual"),
    [
        ((7, 0), (), "16bit"),
        ((7, 5), ("int8",), "16bit"),
        ((8, 0), ("int8",), "16bit"),
        ((8, 6), ("int8",), "16bit"),
        ((8, 9), ("fp8", "int8"), "fp8"),
        ((9, 0), ("fp8", "int8"), "fp8"),
        ((12, 0), ("fp8", "int8"), "fp8"),
    ],
)
def test_gradients_are_multiplied_in_what_is_usual_for_a_card_or_asked_for(capability, able, usual):
    here = dataclasses.replace(CARD, compute_capability=capability, bf16=capability >= (8, 0))
    run = dataclasses.replace(USUAL, method="lora-8bit", dtype="auto")
    assert here.narrow == able
    assert onebyte.usual(here) == usual
    assert onebyte.narrow_gradients(LLAMA, run, here) == ("" if usual == "16bit" else usual)
    assert onebyte.narrow_gradients(LLAMA, dataclasses.replace(run, grad_matmul="16bit"), here) == ""
    for kind in able:
        assert onebyte.narrow_gradients(LLAMA, dataclasses.replace(run, grad_matmul=kind), here) == kind
    assert onebyte.narrow_gradients(LLAMA, dataclasses.replace(run, dtype="float32"), here) == ""
    assert onebyte.narrow_gradients(LLAMA, USUAL, here) == ""
    assert onebyte.narrow_gradients(LLAMA, run, CPU) == ""
