"""The size formulas against what PyTorch and bitsandbytes really make, to the byte, on tiny models of every family."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from qlora_tui.engine import activations, models, sizes
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.spec import RunConfig

torch = pytest.importorskip("torch")

ROWS, LENGTH, RANK = 2, 64, 4
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def adapted(kind, dtype, layers, attention="sdpa", window=None, **lora):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_tui.engine.fast.lora import ADAPTER, fuse

    extra = {"sliding_window": window} if window or kind == "mistral" else {}
    config = AutoConfig.for_model(kind, num_hidden_layers=layers, **SHAPE, **extra)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    lora = LoraConfig(r=RANK, task_type="CAUSAL_LM", **{"target_modules": "all-linear", **lora})
    model = get_peft_model(base, lora, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fuse(model)
    return model.train(), base.get_decoder(), models.from_config(config.to_dict(), kind)


def kept_bytes(model, decoder):
    """Bytes of all storages that the forward pass keeps for the backward pass, parameters left out."""
    own = {part.untyped_storage().data_ptr() for part in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps its address from being used again
        return tensor

    ids = torch.randint(3, 128, (ROWS, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder(input_ids=ids, use_cache=False)
    return sum(size for size, _ in storages.values())


def layer_of(spec, run, width, length=LENGTH):
    return activations.stack(activations.Batch(spec, run, width, ROWS, length, cuda=False))


def kept_by_one_layer(kind, dtype, attention="sdpa", **changes):
    """What a layer adds: three layers less two, so that embeddings and the last norm cancel."""
    two = kept_bytes(*adapted(kind, dtype, 2, attention, **changes)[:2])
    model, decoder, spec = adapted(kind, dtype, 3, attention, **changes)
    return kept_bytes(model, decoder) - two, spec


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("kind", [*models.FAMILIES, "llama eager", "qwen3 eager", "phi3 eager", "gemma3_text eager"])
def test_a_layer_keeps_what_the_formula_says(kind, dtype, width):
    kind, _, attention = kind.partition(" ")
    attention = attention or ("eager" if models.FAMILIES[kind].soft_caps else "sdpa")
    measured, spec = kept_by_one_layer(kind, getattr(torch, dtype), attention)
    assert layer_of(spec, RunConfig(lora_r=RANK, attn_implementation=attention), width).plain.kept == measured


@pytest.mark.parametrize(
    ("lora", "run"),
    [
        ({"use_dora": True}, {"use_dora": True}),
        ({"lora_dropout": 0.5}, {"lora_dropout": 0.5}),
        *(
            ({"target_modules": list(names)}, {"lora_target_modules": names})
            for names in (("q_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
        ),
    ],
    ids=["dora", "dropout", "attention", "output", "up", "down"],
)
def test_a_layer_with_another_adapter_keeps_what_the_formula_says(lora, run):
    for attention in ("sdpa", "eager"):
        measured, spec = kept_by_one_layer("llama", torch.bfloat16, attention, **lora)
        assert layer_of(spec, RunConfig(lora_r=RANK, attn_implementation=attention, **run), 2).plain.kept == measured


@pytest.mark.parametrize("kind", ["mistral", "phi3", "qwen2"])
def test_a_layer_that_sees_a_window_keeps_its_mask(kind):
    window = {"window": 32} if kind != "qwen2" else {}
    measured, spec = kept_by_one_layer(kind, torch.bfloat16, **window)
    found = layer_of(spec, RunConfig(lora_r=RANK), 2)
    assert found.at(1).kept == measured
    assert (found.at(1).kept > found.plain.kept) == (kind != "qwen2")


def test_one_layer_in_six_of_gemma_3_sees_the_whole_row():
    spec = models.find("google/gemma-3-1b-it")
    found = layer_of(spec, RunConfig(), 2, length=spec.sliding_window)
    assert [found.at(index) is found.plain for index in range(6)] == [False] * 5 + [True]
    assert found.kept(0) + found.at(0).first == sum(found.at(index).kept for index in range(spec.num_hidden_layers))
    assert found.kept(7) == sum(found.at(index).kept for index in range(7, spec.num_hidden_layers))
    short = layer_of(spec, RunConfig(), 2, length=spec.sliding_window - 1)
    assert all(short.at(index) is short.plain for index in range(6))


@pytest.mark.parametrize("dora", [True, False])
def test_the_adapter_has_as_many_weights_as_peft_makes(dora):
    model, _, spec = adapted("qwen3", torch.float32, 2, use_dora=dora)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    run = RunConfig(lora_r=RANK, use_dora=dora)
    assert sizes.adapter_params(spec, run) == sum(trained)
    assert sorted(sizes.adapter_tensors(spec, run) * 2) == sorted(trained)


def test_constants_that_live_in_rooms_with_torch_are_the_same():
    from qlora_tui.engine.fast import loss

    assert sizes.LOGITS_PER_CHUNK == loss.LOGITS_PER_CHUNK


@pytest.mark.parametrize("double", [True, False])
def test_four_bit_weights_are_as_large_as_bitsandbytes_makes_them(double):
    import bitsandbytes.functional as bnb

    spec = models.find("builtin:smollm2-135m")
    total = 0
    for part in spec.linears():
        packed, state = bnb.quantize_4bit(torch.randn(part.outputs, part.inputs), quant_type="nf4", compress_statistics=double)
        inner = (state.state2.absmax, state.state2.code, state.offset) if double else ()
        total += sum(tensor.nbytes for tensor in (packed, state.absmax, state.code, *inner))
    run = RunConfig(bnb_4bit_use_double_quant=double)
    assert sizes.quantized_bytes(spec, run) == pytest.approx(total * spec.num_hidden_layers, rel=1e-4)


def test_a_base_is_its_narrow_weights_and_the_rest_in_full_width():
    spec, cpu = models.find("builtin:smollm2-135m"), Machine("cpu", "cpu", 1 << 34)
    narrow = sizes.weight_bytes(spec, RunConfig(), cpu)
    assert narrow - sizes.quantized_bytes(spec, RunConfig()) == (spec.params - spec.linear_params) * 4
    assert sizes.weight_bytes(spec, RunConfig(method="lora"), cpu) == spec.params * 4
    assert sizes.weight_bytes(spec, RunConfig(method="auto"), cpu) == narrow


def test_a_checkpoint_already_in_four_bits_stays_as_it_is_stored():
    spec = dataclasses.replace(models.find("builtin:smollm2-135m"), quantized="nf4", double_quant=False, kept_params=1000)
    single = sizes.quantized_bytes(spec, RunConfig(bnb_4bit_use_double_quant=False))
    assert sizes.quantized_bytes(spec, RunConfig(bnb_4bit_use_double_quant=True)) == single
    assert sizes.quantized_bytes(spec, RunConfig(method="lora")) == single
    whole = dataclasses.replace(spec, kept_params=0)
    card = Machine("card", "cuda", 1 << 34, bf16=True)
    assert sizes.full_width_bytes(spec, RunConfig(), card) - sizes.full_width_bytes(whole, RunConfig(), card) == 2000


def trained(spec, run):
    """Tensors of an adapter on `spec`, by names such as PEFT's: A and B of every module, then DoRA's lengths."""
    found, pairs = {}, len(spec.targeted(run.lora_target_modules))
    for layer in range(spec.num_hidden_layers):
        for place, size in enumerate(sizes.adapter_tensors(spec, run)):
            kind = "magnitude" if place >= 2 * pairs else "AB"[place % 2]
            found[f"{layer}.{place}.lora_{kind}.default.weight"] = torch.nn.Parameter(torch.randn(size))
    return found


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("ratio", [1.0, 4.0])
@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_adapter_gradients_and_optimizer_keep_what_the_formulas_say(name, ratio):
    from qlora_tui.engine.train.optim import build_optimizer, flatten

    spec = models.find("builtin:smollm2-135m")
    # tensors below 4,096 weights, above, and with a last block that is not full
    run = RunConfig(lora_r=7, use_dora=True, optim=name, loraplus_lr_ratio=ratio)
    flat = flatten(run, trained(spec, run), torch.device("cpu"))
    optimizer = build_optimizer(run, flat, torch.device("cpu"))
    flat.lend()
    optimizer.step()
    groups = tuple((group.parameter.numel(), group.kind.bits) for group in flat.groups)
    assert sorted(groups) == sorted(sizes.update_groups(spec, run, name))
    lengths = spec.num_hidden_layers * 4 * sum(part.outputs for part in spec.targeted(run.lora_target_modules))
    buffers = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for group in optimizer.param_groups for part in group["params"]
    }
    assert sum(buffers.values()) == 4 * sizes.flat_params(spec, run) == sizes.adapter_bytes(spec, run, 4) - lengths
    assert flat.groups[0].parameter.grad.untyped_storage().nbytes() == 4 * sizes.flat_params(spec, run)
    states = [part for state in optimizer.state.values() for part_name, part in state.items() if not part_name.startswith("qmap")]
    kept = sum(part.nbytes for part in states if torch.is_tensor(part) and part.dim())
    assert kept == sizes.optimizer_bytes(spec, run, name)


def test_the_plain_optimizer_copies_what_the_budget_says():
    from live_bytes import LiveBytes

    from qlora_tui.engine.moments import Moments
    from qlora_tui.engine.train.optim import build_optimizer, flatten

    spec = models.find("builtin:smollm2-135m")
    run = RunConfig(lora_r=4, use_dora=True, optim="adamw_torch", loraplus_lr_ratio=4.0)
    flat = flatten(run, trained(spec, run), torch.device("cpu"))
    optimizer = build_optimizer(run, flat, torch.device("cpu"))
    flat.lend()
    optimizer.step()
    held = [
        *(part for group in flat.groups for part in (group.parameter, group.parameter.grad)),
        *(part for state in optimizer.state.values() for part in state.values()),
    ]
    with LiveBytes(held) as live:
        optimizer.step()
    step = Moments(spec, run, Machine("cpu", "cpu", 1 << 34), None).at_step()
    (workspace,) = [item.bytes for item in step if item.name == "workspace"]
    assert live.peak - live.held == pytest.approx(workspace, rel=0.01)


def test_only_large_groups_of_a_paged_optimizer_can_move_to_ram():
    from bitsandbytes.optim.optimizer import Optimizer8bit

    assert "p.numel() < 1e5" in inspect.getsource(Optimizer8bit.get_state_buffer)  # there is no card here to ask
    spec, run = models.find("Qwen/Qwen2.5-0.5B-Instruct"), RunConfig(lora_r=32)
    assert sizes.movable_bytes(spec, run, "paged_adamw_8bit") == 2 * sizes.adapter_params(spec, run) > 0
    assert sizes.movable_bytes(spec, run, "adamw_8bit") == 0
    small = RunConfig(lora_r=1, lora_target_modules=("k_proj", "v_proj"))  # 24 layers of 2 x (1,024 + 256): in 32 bits, and too few
    assert sizes.movable_bytes(spec, small, "paged_adamw_8bit") == 0
    many = RunConfig(lora_r=3, lora_target_modules=("k_proj", "v_proj", "q_proj"))  # tensors too small for 8 bits, together large
    assert sizes.movable_bytes(spec, many, "paged_adamw_8bit") == 8 * sizes.flat_params(spec, many) > 0
