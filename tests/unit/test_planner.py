from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tui.engine import budget, changes, forecast, machine, measured, models, onebyte, padding, planner, search, steptime
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.measured import Speed
from qlora_tui.engine.rules import problems
from qlora_tui.engine.sizes import checkpointed_layers
from qlora_tui.engine.spec import RunConfig, rows_per_step, values_of

GIB = 1 << 30
LLAMA = models.find("meta-llama/Llama-3.1-8B-Instruct")
QWEN_SMALL = models.find("Qwen/Qwen2.5-0.5B-Instruct")
DEMO = models.find("builtin:smollm2-135m")
H100 = machine.find_card("H100 80GB")
RTX_4090 = machine.find_card("RTX 4090")
RTX_3060 = machine.find_card("RTX 3060")
CPU = machine.Machine("cpu", "cpu", 16 * GIB, cores=2)

OPEN = RunConfig(packing="auto")
PLANNED = (
    "gradient_checkpointing",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "offload_checkpoints",
    "loss_chunk_size",
    "cuda_graphs",
    "packing",
)
FIXED = {
    "gradient_checkpointing": "9",
    "per_device_train_batch_size": 2,
    "loss_chunk_size": 77,
    "cuda_graphs": "off",
    "offload_checkpoints": "off",
    "packing": "off",
    "optim": "adamw_torch",
    "method": "qlora",
    "dtype": "float32",
}


def choose(run=OPEN, device=RTX_4090, model=LLAMA, **more):
    return planner.choose(model, run, device, **more)


def with_(run=OPEN, **changes):
    return dataclasses.replace(run, **changes)


def sized(gib, card=H100):
    return dataclasses.replace(card, total_bytes=int(gib * GIB))


def need(run, device, model=LLAMA, **more):
    found = budget.estimate(model, run, device, **more)
    return found.total_bytes + found.margin_bytes


def everything(run, device, model=LLAMA):
    """Every choice there is, tried one by one, of a run that leaves layers, rows and chunk open."""
    rows = rows_per_step(run)
    chunks = sorted({choose(run, device, model).run.loss_chunk_size, 523, 130})
    for size in [divisor for divisor in range(1, rows + 1) if rows % divisor == 0]:
        for layers in range(model.num_hidden_layers + 1):
            for chunk in chunks:
                yield with_(
                    run,
                    per_device_train_batch_size=size,
                    gradient_accumulation_steps=rows // size,
                    gradient_checkpointing=str(layers) if layers else "false",
                    loss_chunk_size=chunk,
                    optim="adamw_8bit",
                )


def test_nothing_is_left_open_and_the_run_is_valid():
    for device in (RTX_4090, RTX_3060, H100, CPU):
        plan = choose(with_(method="auto"), device)
        assert planner.settled(plan.run)
        assert not planner.settled(with_(plan.run, optim="auto"))
        assert {problem.where for problem in problems(plan.run)} == {"model_name_or_path", "data"}
        assert {name: values_of(plan.run)[name] for name in plan.choices} == dict(plan.choices)
        gradients = {"grad_matmul"} if plan.run.method == "lora-8bit" else set()
        assert set(plan.reasons) == set(plan.choices) == {*PLANNED, "method", "dtype", "optim", *gradients}
        assert all(plan.reasons.values())


def test_a_plan_keeps_all_that_is_not_its_to_choose():
    run = with_(lora_r=64, seed=7, learning_rate=1e-5, max_length=777, memory_limit_gib=20.0)
    before, after = values_of(run), values_of(choose(run).run)
    assert {name for name in before if before[name] != after[name]} <= {*PLANNED, "dtype", "optim"}


@settings(deadline=None, max_examples=60)
@given(
    kept=st.sets(st.sampled_from(sorted(FIXED))),
    device=st.sampled_from([RTX_4090, RTX_3060, H100, CPU]),
    length=st.sampled_from([128, 2048, 8192]),
)
def test_what_was_fixed_by_hand_is_never_changed(kept, device, length):
    fixed = {name: FIXED[name] for name in kept}
    run = with_(method="auto" if "method" not in kept else "qlora", max_length=length, **{k: v for k, v in fixed.items() if k != "method"})
    plan = choose(run, device, QWEN_SMALL)
    for one in (plan.run, *plan.fallbacks):
        assert {name: values_of(one)[name] for name in kept} == fixed
        assert rows_per_step(one) == rows_per_step(run)
    assert not kept & set(plan.choices)
    if "per_device_train_batch_size" in kept:
        assert plan.run.gradient_accumulation_steps == run.gradient_accumulation_steps


def test_a_settled_run_comes_back_as_it_was():
    run = with_(method="qlora", **{name: value for name, value in FIXED.items() if name != "method"})
    plan = choose(run, RTX_3060)
    assert plan.run == run
    assert plan.choices == {}
    assert plan.fallbacks == ()
    assert not plan.budget.fits


@pytest.mark.parametrize("limit", [10, 12, 16, 24, 48, 80])
def test_no_other_choice_that_fits_is_faster_by_more_than_a_percent_or_two(limit):
    device, asked = sized(limit), with_(max_length=1024, gradient_accumulation_steps=8)
    plan = choose(asked, device)
    fitting = [run for run in everything(asked, device) if need(run, device) <= device.free_bytes]
    best = min(forecast.seconds_per_token(LLAMA, run, device) for run in fitting)
    assert need(plan.run, device) <= device.free_bytes
    assert plan.seconds_per_token <= best * 1.02


def test_a_larger_card_gets_a_faster_plan():
    rates = [choose(device=sized(gib)).seconds_per_token for gib in (9, 12, 16, 24, 48, 80)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.75 * rates[0]


@settings(deadline=None, max_examples=40)
@given(
    gib=st.floats(4, 80),
    more=st.floats(0, 20),
    length=st.sampled_from([256, 1000, 4096]),
    rows=st.sampled_from([1, 6, 16]),
    model=st.sampled_from([LLAMA, QWEN_SMALL]),
)
def test_more_free_memory_never_gives_a_slower_plan(gib, more, length, rows, model):
    run = with_(max_length=length, gradient_accumulation_steps=rows)
    small, large = (choose(run, sized(size), model) for size in (gib, gib + more))
    if small.budget.fits and not small.budget.tight:
        assert large.seconds_per_token <= small.seconds_per_token * 1.0101  # speeds in the same percent count as equal


@settings(deadline=None, max_examples=40)
@given(
    gib=st.floats(1, 80),
    others=st.floats(0, 8),
    length=st.sampled_from([256, 2048, 6000]),
    rows=st.sampled_from([1, 4, 12, 100]),
    model=st.sampled_from([LLAMA, QWEN_SMALL]),
    method=st.sampled_from(["qlora", "lora", "auto"]),
    card=st.sampled_from([H100, RTX_4090, machine.find_card("T4"), machine.Machine("unknown", "cuda", 1, bf16=True)]),
)
def test_the_plan_fits_whenever_the_leanest_does_and_fallbacks_only_get_leaner(gib, others, length, rows, model, method, card):
    device = dataclasses.replace(sized(gib, card), others_bytes=int(others * GIB))
    run = with_(max_length=length, gradient_accumulation_steps=rows, method=method)
    plan = choose(run, device, model)
    leanest = plan.fallbacks[-1] if plan.fallbacks else plan.run
    assert leanest.per_device_train_batch_size == 1
    assert leanest.gradient_checkpointing == "true"
    if need(leanest, device, model) <= device.free_bytes:
        assert plan.budget.fits
        assert not plan.budget.tight
    runs = (plan.run, *plan.fallbacks)
    assert all(planner.settled(one) and rows_per_step(one) == rows for one in runs)
    layers = [checkpointed_layers(model, one) for one in runs]
    assert layers == sorted(layers)
    sizes = [one.per_device_train_batch_size for one in runs]
    assert sizes == sorted(sizes, reverse=True)
    needs = [need(one, device, model) for one in runs]
    assert all(after <= 1.05 * before for before, after in pairwise(needs))  # an estimate's slack is not as even as its rows
    assert len(set(runs)) == len(runs)


def test_what_cannot_fit_gets_the_leanest_plan_and_says_so():
    plan = choose(with_(max_length=8192), sized(5))
    assert not plan.budget.fits
    assert plan.run.per_device_train_batch_size == 1
    assert plan.run.gradient_checkpointing == "true"
    assert plan.run.optim == "paged_adamw_8bit"
    assert plan.fallbacks == ()
    assert plan.why.startswith("needs ")
    assert plan.why.endswith("of 5.0 GiB, even with recomputing all layers at 1 row")


def test_within_the_margin_only_the_leanest_is_taken():
    lean = choose(device=sized(5)).run
    total = budget.estimate(LLAMA, lean, H100).total_bytes
    plan = choose(device=dataclasses.replace(H100, total_bytes=total + (1 << 20)))
    assert plan.run == lean
    assert plan.budget.tight
    assert "margin" in plan.why


def test_the_sentence_is_arithmetic_on_the_plan():
    plan = choose(with_(max_length=1024))
    leanest = with_(plan.run, gradient_checkpointing="true", per_device_train_batch_size=1, gradient_accumulation_steps=16)
    factor = forecast.seconds_per_token(LLAMA, leanest, RTX_4090) / plan.seconds_per_token
    used = f"{plan.budget.total_bytes / GIB:.1f} of 24.0 GiB"
    assert plan.why == f"uses {used}, {factor:.1f}x faster than the leanest choice"
    assert choose(plan.run).why == f"uses {used}"


def test_with_only_one_thing_open_the_sentence_compares_that():
    rows_fixed = choose(with_(per_device_train_batch_size=1), H100)
    layers_fixed = choose(with_(gradient_checkpointing="true"), H100)
    assert rows_fixed.why.endswith("faster than recomputing all layers")
    assert layers_fixed.why.endswith("faster than 1 row at once")


def test_memory_that_others_hold_is_not_promised():
    busy = dataclasses.replace(RTX_4090, others_bytes=10 * GIB)
    plan = choose(device=busy)
    assert plan.budget.total_bytes + plan.budget.margin_bytes <= busy.free_bytes
    assert "of 14.0 GiB free" in plan.why


def test_a_limit_counts_as_a_smaller_card_and_changes_no_speed():
    limited = choose(with_(memory_limit_gib=24.0), H100)
    smaller = choose(device=sized(24))
    assert {name: limited.choices[name] for name in PLANNED} == {name: smaller.choices[name] for name in PLANNED}
    assert limited.seconds_per_token == smaller.seconds_per_token


def test_known_rows_leave_more_room_and_a_short_mean_takes_more_rows_at_once():
    run = with_(max_length=4096)
    blind, known = choose(run), choose(run, longest=700, mean=300)
    assert known.run.per_device_train_batch_size > blind.run.per_device_train_batch_size
    assert need(known.run, RTX_4090, longest=700) <= RTX_4090.free_bytes
    assert choose(run, longest=9999) == blind


def test_what_was_measured_is_an_8_bit_base_with_gradients_in_16_bits_and_in_fp8():
    assert choose(with_(method="auto"), RTX_3060).run.method == "lora-8bit"  # before Ada
    assert choose(with_(method="auto"), sized(16)).run.method == "lora-8bit"
    assert choose(with_(method="auto"), sized(10)).run.method == "qlora"


def test_the_16_bit_base_is_taken_where_it_fits_and_only_there(monkeypatch):
    monkeypatch.setattr(onebyte, "GOOD_ENOUGH", frozenset())
    planner._choose.cache_clear()
    auto = with_(method="auto")
    assert choose(auto, H100).run.method == "lora"
    assert choose(auto, RTX_3060).run.method == "qlora"
    assert choose(auto, H100, dataclasses.replace(LLAMA, quantized="nf4")).run.method == "qlora"
    assert choose(with_(method="auto", init_lora_weights="pissa"), RTX_3060).run.method == "lora"
    assert choose(auto, CPU).run.method == "qlora"


def test_the_8_bit_base_is_chosen_where_it_was_measured_to_be_good_enough(monkeypatch):
    auto, limited = with_(method="auto"), sized(16)
    monkeypatch.setattr(onebyte, "GOOD_ENOUGH", frozenset())
    planner._choose.cache_clear()
    assert choose(auto, limited).run.method == "qlora"
    monkeypatch.setattr(onebyte, "GOOD_ENOUGH", frozenset({"fp8"}))
    planner._choose.cache_clear()
    plan = choose(auto, limited)
    assert plan.run.method == "lora-8bit"
    assert plan.budget.fits
    assert "nats from 16 bits" in plan.reasons["method"]
    fast, slow = choose(auto, H100), choose(with_(method="lora"), H100)  # both fit: the faster is taken, if by more than a percent
    assert fast.run.method == "lora-8bit"
    assert fast.seconds_per_token < slow.seconds_per_token
    assert "the fastest base that fits" in fast.reasons["method"]
    monkeypatch.setattr(steptime, "_NARROW_SHARE", 1.5)
    steptime.micro_batch.cache_clear()
    planner._choose.cache_clear()
    assert choose(auto, H100).run.method == "lora"
    monkeypatch.undo()
    monkeypatch.setattr(onebyte, "GOOD_ENOUGH", frozenset({"fp8"}))
    steptime.micro_batch.cache_clear()
    planner._choose.cache_clear()
    assert choose(auto, sized(10)).run.method == "qlora"
    assert choose(auto, dataclasses.replace(limited, compute_capability=(8, 0))).run.method == "qlora"  # measured for FP8 alone here
    planner._choose.cache_clear()


def gradients(machine, **shares):
    pieces = dataclasses.replace(steptime.table_speed(machine) or steptime.table_speed(H100), **shares)
    measured.remember_speed(machine.name, "libs", pieces)
    return choose(with_(method="lora-8bit"), machine).run.grad_matmul


def test_gradients_on_an_8_bit_base_take_the_fastest_product_that_was_measured():
    ampere, turing = machine.find_card("RTX 3090"), machine.find_card("T4")
    assert [choose(with_(method="lora-8bit"), card).run.grad_matmul for card in (H100, ampere, turing)] == ["fp8", "16bit", "16bit"]
    assert gradients(H100, fp8_share=0.6, int8_share=0.3) == "int8"
    assert gradients(H100, fp8_share=0.6, int8_share=0.9) == "fp8"
    assert gradients(ampere, int8_share=0.4) == "int8"
    assert gradients(ampere, int8_share=1.3) == "16bit"
    assert gradients(turing, int8_share=0.5) == "int8"
    assert gradients(turing, int8_share=1.0) == "16bit"
    assert choose(with_(method="lora-8bit", grad_matmul="16bit"), H100).run.grad_matmul == "16bit"
    assert choose(with_(method="qlora"), H100).run.grad_matmul == "auto"  # nothing to choose there
    assert "the fastest of what was timed" in choose(with_(method="lora-8bit"), H100).reasons["grad_matmul"]
    assert "the next one takes the fastest" in choose(with_(method="lora-8bit"), RTX_4090).reasons["grad_matmul"]


def test_the_optimizer_is_paged_only_where_the_plain_one_does_not_fit():
    assert choose(device=H100).run.optim == "adamw_8bit"
    assert choose(device=sized(5)).run.optim == "paged_adamw_8bit"


def test_a_card_nobody_knows_is_planned_for_but_promised_no_speed():
    stranger = machine.Machine("NVIDIA GB999", "cuda", 24 * GIB, bf16=True)
    plan = choose(device=stranger)
    assert plan.seconds_per_token is None
    assert "faster" not in plan.why
    assert plan.budget.fits
    assert checkpointed_layers(LLAMA, plan.run) < LLAMA.num_hidden_layers


@settings(deadline=None, max_examples=30)
@given(
    gib=st.floats(1, 64),
    others=st.floats(0, 8),
    length=st.sampled_from([100, 256, 512, 2048, 9000]),
    rows=st.sampled_from([1, 6, 8, 16, 30]),
)
def test_on_a_processor_nothing_but_checkpointing_depends_on_free_memory(gib, others, length, rows):
    run = with_(max_length=length, gradient_accumulation_steps=rows, method="auto")
    device = dataclasses.replace(CPU, total_bytes=int(gib * GIB), others_bytes=int(others * GIB))
    plan, roomy = (choose(run, one, DEMO) for one in (device, dataclasses.replace(CPU, total_bytes=4096 * GIB)))
    for one in (plan.run, *plan.fallbacks):
        assert with_(one, gradient_checkpointing="auto") == with_(roomy.run, gradient_checkpointing="auto")
    size = plan.run.per_device_train_batch_size
    divisors = [size for size in range(1, rows + 1) if rows % size == 0 and size <= 8 and (size == 1 or size * length <= 2048)]
    assert size == max(divisors)
    assert (plan.run.method, plan.run.optim, plan.run.dtype) == ("qlora", "adamw_torch", "float32")
    assert roomy.run.gradient_checkpointing == "false"


def test_measured_speed_and_a_measured_bias_both_reach_the_plan():
    plain = choose(device=sized(14))
    measured.remember_memory(H100.name, measured.versions(), {"train": 100}, {"train": 120})
    measured.remember_memory(H100.name, measured.versions(), {"train": 100}, {"train": 120})
    careful = choose(device=sized(14))
    assert careful.seconds_per_token > plain.seconds_per_token
    assert careful.budget.fits
    measured.remember_speed(H100.name, "libs", Speed(1e14, 2.9e12, 7e11, 3e-3))
    assert choose(device=sized(14)).seconds_per_token > 2 * plain.seconds_per_token


def test_the_same_question_is_answered_once_until_something_is_measured():
    assert choose() is choose()
    first = choose()
    measured.remember_speed("another card", "libs", Speed(1e14, 1e12, 1e11, 1e-3))
    assert choose() is not first
    assert choose() == first


def test_few_estimates_are_made_since_the_wizard_asks_at_every_key(monkeypatch):
    asked = []

    def counted(*args, **more):
        asked.append(args)
        return budget.estimate(*args, **more)

    monkeypatch.setattr(search, "estimate", counted)
    for number, device in enumerate((RTX_3060, RTX_4090, sized(12), sized(24), H100)):
        asked.clear()
        choose(with_(seed=number, method="auto"), device)
        assert len(asked) <= 45
    asked.clear()
    choose(with_(gradient_accumulation_steps=65_520), H100)
    assert len(asked) <= 60


def test_a_layer_that_does_not_exist_is_refused_as_by_the_budget():
    with pytest.raises(ConfigError, match="q_prj"):
        choose(with_(lora_target_modules=("q_prj",)))


def test_the_step_key_tells_kinds_apart_but_not_what_hardly_matters():
    run = choose().run
    key = planner.step_key(LLAMA, run)
    for same in ({"optim": "adamw_torch"}, {"lora_r": 64}, {"per_device_train_batch_size": 3}, {"seed": 1}, {"max_length": 99}):
        assert planner.step_key(LLAMA, with_(run, **same)) == key
    for other in (
        {"method": "lora"},
        {"dtype": "float32"},
        {"gradient_checkpointing": "3"},
        {"use_dora": True},
        {"attn_implementation": "eager"},
        {"packing": "on"},
    ):
        assert planner.step_key(LLAMA, with_(run, **other)) != key
    assert planner.step_key(QWEN_SMALL, run) != key


# Inputs of layers in RAM

LONG = with_(max_length=30_000, gradient_accumulation_steps=1)


def test_inputs_wait_in_ram_only_where_nothing_fits_without():
    tight, roomy = choose(LONG, sized(12)), choose(LONG, sized(24))
    assert (tight.run.offload_checkpoints, roomy.run.offload_checkpoints) == ("on", "off")
    assert not choose(with_(LONG, offload_checkpoints="off"), sized(12)).budget.fits
    assert tight.budget.fits
    assert not tight.budget.tight
    assert (tight.run.gradient_checkpointing, tight.run.cuda_graphs) == ("true", "off")
    assert tight.budget.host_bytes == 31 * 30_000 * 4096 * 2
    assert "7.1 GiB of pinned RAM" in tight.reasons["offload_checkpoints"]
    assert roomy.budget.host_bytes == 0
    assert roomy.fallbacks[-1].offload_checkpoints == "on"  # where the estimate was too low


@pytest.mark.parametrize(("free", "chosen"), [(None, "on"), (10 * GIB, "on"), (9 * GIB, "off"), (GIB, "off")])
def test_inputs_wait_in_ram_only_where_ram_has_room(free, chosen):
    plan = choose(LONG, dataclasses.replace(sized(12), host_free_bytes=free))
    assert plan.run.offload_checkpoints == chosen
    assert plan.budget.fits == (chosen == "on")


def test_recorded_batches_copy_too_and_a_processor_never_does():
    assert choose(with_(LONG, cuda_graphs="on"), sized(12)).run.offload_checkpoints == "on"
    short = with_(offload_checkpoints="on", gradient_checkpointing="true", per_device_train_batch_size=1, max_length=512)
    assert choose(short, H100).run.cuda_graphs == "on"
    assert choose(LONG, CPU).run.offload_checkpoints == "off"
    both, none = (
        problems(with_(offload_checkpoints="on", **more)) for more in ({"cuda_graphs": "on"}, {"gradient_checkpointing": "false"})
    )
    assert ["offload_checkpoints" in {problem.where for problem in found} for found in (both, none)] == [False, True]


# Rows end to end

RAGGED = [50 + 37 * at % 1950 for at in range(400)]
FOUR_ROWS = with_(per_device_train_batch_size=4, gradient_accumulation_steps=1)


@pytest.mark.parametrize(
    ("run", "device", "model", "lengths", "chosen", "why"),
    [
        (FOUR_ROWS, H100, LLAMA, RAGGED, "on", "padding would be"),
        (FOUR_ROWS, H100, LLAMA, [700] * 400, "off", "padding is 0 %"),
        (FOUR_ROWS, H100, LLAMA, (), "off", "lengths of the rows are not known"),
        (with_(FOUR_ROWS, per_device_train_batch_size=1), H100, LLAMA, RAGGED, "off", "one at a time"),
        (FOUR_ROWS, CPU, LLAMA, RAGGED, "off", "on a CUDA card"),
        (with_(FOUR_ROWS, dtype="float32"), H100, LLAMA, RAGGED, "off", "in bfloat16"),
        (with_(FOUR_ROWS, fused_layers="off"), H100, LLAMA, RAGGED, "off", "fused_layers is off"),
        (with_(FOUR_ROWS, use_dora=True), H100, LLAMA, RAGGED, "off", "not fused"),
        (FOUR_ROWS, H100, dataclasses.replace(LLAMA, family="olmo2"), RAGGED, "off", "layers of olmo2"),
        (FOUR_ROWS, H100, dataclasses.replace(LLAMA, head_dim=260), RAGGED, "off", "260 wide"),
    ],
)
def test_rows_lie_end_to_end_where_that_pays_and_can_be(run, device, model, lengths, chosen, why):
    plan = choose(run, device, model, longest=2048, lengths=lengths)
    assert plan.choices["packing"] == plan.run.packing == chosen
    assert why in plan.reasons["packing"]
    for way in ("on", "off"):  # a value fixed by hand is not weighed
        assert choose(with_(run, packing=way), device, model, longest=2048, lengths=lengths).run.packing == way


def tokens_of(needed):
    (data,) = [item for item in needed.items if item.name == "data"]
    return int(data.how.split()[0].replace(",", ""))


def test_rows_end_to_end_need_the_memory_of_the_longest_that_can_meet():
    """All rows count, dropped ones do not, and those that are cut count as long as they are then."""
    run = with_(FOUR_ROWS, packing="on", gradient_checkpointing="false")
    rows = [2048, 700, 600, 500, *[100] * 60]
    found = choose(run, H100, LLAMA, longest=2048, lengths=rows)
    assert tokens_of(found.budget) == 2048 + 700 + 600 + 500
    assert found.budget.phases == budget.estimate(LLAMA, found.run, H100, longest=962).phases  # as much as four rows of 962
    assert tokens_of(choose(run, H100, LLAMA, longest=2048).budget) == 4 * 2048  # nothing is known but the longest
    assert tokens_of(choose(with_(run, too_long="drop"), H100, LLAMA, longest=2048, lengths=[9000, *rows]).budget) == 3848
    assert tokens_of(choose(with_(run, too_long="cut"), H100, LLAMA, longest=2048, lengths=[9000, *rows]).budget) == 2 * 2048 + 700 + 600


def test_advice_counts_rows_end_to_end_as_the_planner_does():
    run = with_(FOUR_ROWS, packing="on", gradient_checkpointing="false")
    rows = [2048, 700, 600, 500, *[100] * 60]
    planned = choose(run, H100, LLAMA, longest=2048, lengths=rows)
    asked = changes.Asked(LLAMA, planned.run, H100, 2048, tuple(sorted(rows)), None)
    assert asked.now.phases == planned.budget.phases
    assert asked.after({"packing": "off"}).total_bytes > 1.5 * asked.now.total_bytes
    longer = changes.Asked(LLAMA, with_(planned.run, max_length=512, too_long="cut"), H100, 512, tuple(sorted(rows)), None)
    assert tokens_of(longer.now) == 3 * 512 + 500
    assert longer.after({"max_length": 2048}).phases == planned.budget.phases


@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=40), rows=st.integers(1, 8))
def test_the_row_of_a_batch_is_never_longer_than_the_longest_and_holds_all_its_tokens(lengths, rows):
    row, most = padding.row_of_largest(lengths, rows), sorted(lengths)[-rows:]
    assert row <= max(lengths)
    assert sum(most) <= row * len(most) < sum(most) + len(most)


@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=200),
    rows=st.integers(1, 16),
    steps=st.sampled_from([1, 4, 16]),
)
def test_padding_is_what_batches_of_such_rows_have(lengths, rows, steps):
    some = padding.bucket(lengths, rows * steps)
    assert list(some) == sorted(some)
    assert set(some) <= set(lengths)
    share = padding.padded_share(some, rows)
    assert 0 <= share < 1
    assert padding.padded_share(some, 1) == 0
    assert padding.padded_share([lengths[0]] * 30, rows) == pytest.approx(0)
    padded = sum(max(part) * len(part) for part in (some[at : at + rows] for at in range(0, len(some), rows)))
    assert sum(some) == pytest.approx((1 - share) * padded)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"fused_layers": "off"}, "fused_layers is off"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"attn_implementation": "eager"}, "eager"),
    ],
)
def test_packing_without_fused_layers_is_refused_in_a_sentence(other, why):
    (found,) = [problem for problem in problems(with_(packing="on", **other)) if problem.where == "packing"]
    assert why in found.message
    assert "packing=auto" in found.hint
    assert not [problem for problem in problems(with_(packing="auto", **other)) if problem.where == "packing"]
