"""Sizes in bytes of what a run holds from its first step to its last: base, adapter, gradients, optimizer.

Each comes from a formula over the model's shape and the run's settings, exact to the byte; tests hold them
against what the libraries make. What comes and goes within a step is in `activations`. Nothing here knows a
device's memory; `budget` puts the parts together and holds them against one.
"""

from __future__ import annotations

from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import Linear, ModelSpec
from qlora_tui.engine.spec import RunConfig, checkpointed_of, offloads

LOGITS_PER_CHUNK = 1 << 26
"""Most logits that the loss holds at once; the same figure as in `fast.loss`, which needs torch. A test compares them."""

EIGHT_BIT_PIECE = 1 << 24
"""Weights of an 8-bit base that are in 32 bits at once; the same figure as in `fast.eightbit`. A test compares them."""

BLOCK = 64
"""Weights that share one constant in a 4-bit base."""

_CONSTANTS = 256  # constants that share one of their own, where they are quantized too
_MIN_8BIT = 4096  # bitsandbytes keeps smaller tensors' state in 32 bits
_STATE_BLOCK = 256  # weights that share one constant in the 8-bit optimizer, for each of its two moments
_MIN_PAGED = 100_000  # bitsandbytes pages only tensors of so many weights and more


def checkpointed_layers(model: ModelSpec, run: RunConfig) -> int:
    """Return how many of the model's layers recompute their inside."""
    return checkpointed_of(run, model.num_hidden_layers)


def offloaded_layers(model: ModelSpec, run: RunConfig) -> int:
    """Return how many layers' inputs wait in RAM: those of all recomputed layers but the last, which is needed at once."""
    return max(0, checkpointed_layers(model, run) - 1) if offloads(run) else 0


def four_bit(model: ModelSpec, run: RunConfig) -> bool:
    """Say whether the base is held in 4 bits: asked for, still to be chosen, or how the checkpoint is stored anyway."""
    chosen = "lora" if run.method == "auto" and run.init_lora_weights == "pissa" else run.method  # the planner can choose nothing else
    return chosen not in ("lora", "lora-8bit") or bool(model.quantized)


def eight_bit(model: ModelSpec, run: RunConfig) -> bool:
    """Say whether the base is held at one byte a weight."""
    return run.method == "lora-8bit" and not model.quantized


def double_quantized(model: ModelSpec, run: RunConfig) -> bool:
    """Say whether the block constants of a 4-bit base are quantized too; a checkpoint already in 4 bits stays as it is."""
    return model.double_quant if model.quantized else run.bnb_4bit_use_double_quant


def compute_type(run: RunConfig, machine: Machine) -> str:
    """Return the type of computation: bfloat16 where the device has it, float16 on cards that multiply that fast, else float32."""
    if run.dtype != "auto":
        return run.dtype
    if machine.kind != "cuda":
        return "float32"
    return "bfloat16" if machine.bf16 else "float16" if machine.half else "float32"


def element_bytes(run: RunConfig, machine: Machine) -> int:
    """Return the bytes of one number in the type of computation."""
    return 4 if compute_type(run, machine) == "float32" else 2


def constant_bytes(model: ModelSpec, run: RunConfig) -> float:
    """Return the bytes of block constants for one 4-bit weight.

    Source:
        QLoRA paper, section 3: one 32-bit constant for 64 weights; double quantization stores that constant in
        one byte, with a 32-bit one for 256 of them (and one offset a tensor, which is not counted).
    """
    return 1 / BLOCK + 4 / (BLOCK * _CONSTANTS) if double_quantized(model, run) else 4 / BLOCK


def quantized_bytes(model: ModelSpec, run: RunConfig) -> int:
    """Return the bytes of the weights that are held in 4 or 8 bits, with their constants; 0 on a 16-bit base."""
    if eight_bit(model, run):  # and one scale an output
        return model.quantized_params + 4 * model.num_hidden_layers * sum(part.outputs for part in model.linears())
    if not four_bit(model, run):
        return 0
    tables = 64 + (1024 + 8 if double_quantized(model, run) else 0)  # of one module: its 16 values, and 256 for the constants
    return int(model.quantized_params * (0.5 + constant_bytes(model, run))) + tables * model.num_hidden_layers * len(model.linears())


def full_width_bytes(model: ModelSpec, run: RunConfig, machine: Machine) -> int:
    """Return the bytes of the weights in the type of computation: all of a 16-bit base, else embeddings, head, norms, biases."""
    narrow = model.quantized_params if four_bit(model, run) or eight_bit(model, run) else 0
    return (model.params - narrow) * element_bytes(run, machine)


def weight_bytes(model: ModelSpec, run: RunConfig, machine: Machine) -> int:
    """Return the bytes of the frozen base as loaded for training."""
    return quantized_bytes(model, run) + full_width_bytes(model, run, machine)


def adapter_tensors(model: ModelSpec, run: RunConfig) -> tuple[int, ...]:
    """Return the weights of each trained tensor of one layer: A and B of every adapted module, with DoRA its lengths too."""
    parts = model.targeted(run.lora_target_modules)
    sizes = [run.lora_r * width for part in parts for width in (part.inputs, part.outputs)]
    return tuple(sizes + ([part.outputs for part in parts] if run.use_dora else []))


def adapter_params(model: ModelSpec, run: RunConfig) -> int:
    """Return the weights of the adapter: rank times the inputs and outputs of every adapted linear layer.

    DoRA adds one for each output. rsLoRA, LoRA+ and PiSSA add none: they change the start or the step.
    """
    return model.num_hidden_layers * sum(adapter_tensors(model, run))


def flat_params(model: ModelSpec, run: RunConfig) -> int:
    """Return the numbers in the buffer that the adapter lies in, and in that of its gradients: each tensor begins a block."""
    return model.num_hidden_layers * sum(map(_padded, adapter_tensors(model, run)))


def adapter_bytes(model: ModelSpec, run: RunConfig, width: int) -> int:
    """Return what the adapter takes: 4 bytes a weight, and what its kind remembers of the start.

    DoRA keeps the length of each output's base weights; PiSSA the matrices it started from, in the base's type.
    """
    size = 4 * flat_params(model, run)
    if run.use_dora:
        size += model.num_hidden_layers * 4 * sum(part.outputs for part in model.targeted(run.lora_target_modules))
    return size + (adapter_params(model, run) * width if run.init_lora_weights == "pissa" else 0)


def choose_optimizer(run: RunConfig, machine: Machine) -> str:
    """Return the optimizer's name: paged 8-bit AdamW on CUDA, plain AdamW on a CPU, unless one was asked for."""
    return ("paged_adamw_8bit" if machine.kind == "cuda" else "adamw_torch") if run.optim == "auto" else run.optim


def update_groups(model: ModelSpec, run: RunConfig, name: str) -> tuple[tuple[int, int], ...]:
    """Return what the optimizer `name` updates at once: of each group the numbers in its buffer, and the bits of their state.

    The 8-bit kinds keep 32 bits in tensors below 4,096 weights, and with LoRA+ B goes apart from the rest.
    """
    pairs = len(model.targeted(run.lora_target_modules))
    found: dict[tuple[int, bool], int] = {}
    for place, size in enumerate(adapter_tensors(model, run)):
        faster = run.loraplus_lr_ratio != 1 and place < 2 * pairs and place % 2 == 1  # A and B in turn, then DoRA's lengths
        kind = 32 if name == "adamw_torch" else _bits(size), faster
        found[kind] = found.get(kind, 0) + model.num_hidden_layers * _padded(size)
    return tuple((numbers, bits) for (bits, _), numbers in found.items())


def optimizer_bytes(model: ModelSpec, run: RunConfig, name: str) -> int:
    """Return the optimizer's state: two numbers for each one in the adapter's buffer, of 4 bytes or of one.

    The 8-bit kind has two constants of 4 bytes for 256 weights beside them.
    """
    return sum(_state_bytes(numbers, bits) for numbers, bits in update_groups(model, run, name))


def optimizer_room(model: ModelSpec, run: RunConfig, name: str) -> int:
    """Return the room to leave for the optimizer's state: never less than a lower rank needs.

    A tensor just too small for 8 bits takes four times as much as one just large enough; counted exactly, a higher
    rank would seem to save memory. The difference is at most 24 KiB a tensor, and none from 16,000 weights on.
    """
    if name == "adamw_torch":
        return optimizer_bytes(model, run, name)
    sizes, small = adapter_tensors(model, run), _MIN_8BIT - 1
    return model.num_hidden_layers * sum(
        max(_state_bytes(_padded(size), _bits(size)), _state_bytes(_padded(min(size, small)), _bits(small))) for size in sizes
    )


def movable_bytes(model: ModelSpec, run: RunConfig, name: str) -> int:
    """Return the part of the optimizer's state that the driver may move to RAM when the card is full: large groups, if paged."""
    if name != "paged_adamw_8bit":
        return 0
    return sum(numbers * bits // 4 for numbers, bits in update_groups(model, run, name) if numbers >= _MIN_PAGED)


def largest_linear(model: ModelSpec) -> Linear:
    """Return the linear module with the most weights: what is widened at once while a 4-bit base computes."""
    return max(model.linears(), key=lambda part: part.weights)


def widened_bytes(model: ModelSpec, run: RunConfig, part: Linear, width: int, *, at_once: bool = False) -> int:
    """Return what one 4-bit or 8-bit weight takes while it is widened to the type of computation; 0 on a 16-bit base.

    Unless a kernel does both `at_once`, doubly quantized constants are widened to 32 bits first, and 8-bit weights too, a piece at a time.
    """
    if eight_bit(model, run):
        return part.weights * width + (0 if at_once else 8 * min(part.weights, EIGHT_BIT_PIECE))
    if not four_bit(model, run):
        return 0
    return part.weights * width + (part.weights // BLOCK * 4 if double_quantized(model, run) and not at_once else 0)


def _padded(size: int) -> int:
    return -(-size // _STATE_BLOCK) * _STATE_BLOCK


def _bits(size: int) -> int:
    return 8 if size >= _MIN_8BIT else 32


def _state_bytes(numbers: int, bits: int) -> int:
    return numbers * 8 if bits == 32 else numbers * 2 + 2 * 4 * numbers // _STATE_BLOCK
