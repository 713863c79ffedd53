"""The size formulas against what PyTorch really keeps, on tiny models of every family."""

from __future__ import annotations

import pytest

from qlora_tui.engine import models, sizes
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


def adapted(kind, dtype, layers, attention="sdpa"):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_tui.engine.fast.lora import ADAPTER, fuse

    extra = {"sliding_window": None} if kind == "mistral" else {}
    config = AutoConfig.for_model(kind, num_hidden_layers=layers, **SHAPE, **extra)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
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


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("kind", [*models.FAMILIES, "llama eager"])
def test_a_layer_keeps_what_the_formula_says(kind, dtype, width):
    kind, _, attention = kind.partition(" ")
    attention = attention or ("eager" if models.FAMILIES[kind].soft_caps else "sdpa")
    two = kept_bytes(*adapted(kind, getattr(torch, dtype), 2, attention)[:2])
    model, decoder, spec = adapted(kind, getattr(torch, dtype), 3, attention)
    measured = (kept_bytes(model, decoder) - two) / (ROWS * LENGTH)
    run = RunConfig(lora_r=RANK, attn_implementation=attention)
    formula = sizes.layer_bytes_per_token(spec, run, width, LENGTH)
    exact = models.FAMILIES[kind].extra_norms == 0 and attention == "sdpa"
    assert measured * 0.97 <= formula <= measured * (1.02 if exact else 1.25)


def test_the_adapter_has_as_many_weights_as_peft_makes():
    model, _, spec = adapted("qwen3", torch.float32, 2)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sizes.adapter_params(spec, RunConfig(lora_r=RANK)) == trained


def test_constants_that_live_in_rooms_with_torch_are_the_same():
    from qlora_tui.engine.fast import loss

    assert sizes.LOGITS_PER_CHUNK == loss.LOGITS_PER_CHUNK


@pytest.mark.parametrize("double", [True, False])
def test_four_bit_weights_are_as_large_as_bitsandbytes_makes_them(double):
    import bitsandbytes.functional as bnb

    weight = torch.randn(512, 1024)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    constants = state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    per_weight = (packed.nbytes + constants) / weight.numel()
    spec = models.find("builtin:smollm2-135m")
    run = RunConfig(bnb_4bit_use_double_quant=double)
    cpu = Machine("cpu", "cpu", 1 << 34)
    linear = sizes.weight_bytes(spec, run, cpu) - (spec.params - spec.linear_params) * 4
    assert linear / spec.linear_params == pytest.approx(per_weight, rel=2e-3)


def test_the_eight_bit_optimizer_keeps_what_the_formula_says():
    import bitsandbytes

    parameters = [torch.nn.Parameter(torch.randn(16, 576)), torch.nn.Parameter(torch.randn(16, 100))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    optimizer.step()
    states = [optimizer.state[parameter] for parameter in parameters]
    kept = [sum(part.nbytes for name, part in state.items() if torch.is_tensor(part) and not name.startswith("qmap")) for state in states]
    assert kept[0] == pytest.approx(16 * 576 * (2 + 8 / 256), rel=0.01)
    assert kept[1] == 16 * 100 * 8
