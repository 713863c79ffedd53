"""Sizes in bytes of the parts of a run, each from a formula over the model's shape and the run's settings.

Nothing here knows a device's memory; `budget` puts the parts together and holds them against one.
"""

from __future__ import annotations

from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.spec import RunConfig

LOGITS_PER_CHUNK = 1 << 26
"""Most logits that the loss holds at once; the same figure as in `fast.loss`, which needs torch. A test compares them."""

_MIN_8BIT = 4096  # bitsandbytes keeps smaller tensors' state in 32 bits


def adapter_params(model: ModelSpec, run: RunConfig) -> int:
    """Return the weights of the adapter: rank times the inputs and outputs of every adapted linear layer."""
    return model.num_hidden_layers * sum(run.lora_r * (part.inputs + part.outputs) for part in model.targeted(run.lora_target_modules))


def element_bytes(run: RunConfig, machine: Machine) -> int:
    """Return the bytes of one number in the type of computation: 2 for bfloat16, 4 for float32."""
    if run.dtype == "auto":
        return 2 if machine.kind == "cuda" and machine.bf16 else 4
    return 2 if run.dtype == "bfloat16" else 4


def weight_bytes(model: ModelSpec, run: RunConfig, machine: Machine) -> int:
    """Return the bytes of the frozen base as loaded for training.

    Source:
        QLoRA paper, section 3: half a byte a weight, one constant for 64 weights; double quantization stores
        that constant in one byte, with a 32-bit one for 256 of them.
    """
    width = element_bytes(run, machine)
    if run.method != "qlora":
        return model.params * width
    constants = 1 / 64 + 4 / (64 * 256) if run.bnb_4bit_use_double_quant else 4 / 64
    return int(model.linear_params * (0.5 + constants)) + (model.params - model.linear_params) * width


def layer_bytes_per_token(model: ModelSpec, run: RunConfig, width: int, length: int) -> int:
    """Return what one layer keeps of one token for its backward pass; a test counts the saved tensors.

    Norms keep their input in float32; a linear layer with an adapter keeps its input once; attention keeps
    queries, keys, values and its output; the gated MLP keeps four tensors of the inner width.
    """
    hidden, query, keys = model.hidden_size, model.query_size, model.key_value_size
    norms = 4 * (hidden + 1) * model.norms_per_layer
    if model.qk_norm:
        norms += 4 * (query + keys + model.num_attention_heads + model.num_key_value_heads)
    repeated = run.attn_implementation == "eager" or not model.plain_causal
    attention = width * (2 * query + 2 * (query if repeated else keys))
    if model.fused:  # the values are a view of one tensor that holds all three, and the output is copied once
        attention += width * (2 * query + keys)
    if run.attn_implementation == "eager":
        scores = (4 + width if width < 4 else width) + (0 if model.sdpa else width)  # the softmax, cast once; squashed scores
        attention += model.num_attention_heads * length * scores
    else:
        attention += model.num_attention_heads * 4
    inputs = width * 2 * hidden
    inner = width * 4 * model.intermediate_size
    low = width * run.lora_r * len(model.targeted(run.lora_target_modules))
    return norms + attention + inputs + inner + low


def choose_optimizer(run: RunConfig, machine: Machine) -> str:
    """Return the optimizer's name: paged 8-bit AdamW on CUDA, plain AdamW on a CPU, unless one was asked for."""
    return ("paged_adamw_8bit" if machine.kind == "cuda" else "adamw_torch") if run.optim == "auto" else run.optim


def optimizer_bytes(model: ModelSpec, run: RunConfig, name: str) -> int:
    """Return the optimizer's state: two numbers for each weight of the adapter, of 4 bytes or of one.

    The 8-bit kind keeps 32 bits in tensors below 4,096 weights, and two constants of 4 bytes for 256 weights.
    """
    if name == "adamw_torch":
        return adapter_params(model, run) * 8
    sizes = [run.lora_r * size for part in model.targeted(run.lora_target_modules) for size in (part.inputs, part.outputs)]
    return model.num_hidden_layers * sum(int(size * (2 + 8 / 256)) if size >= _MIN_8BIT else size * 8 for size in sizes)
