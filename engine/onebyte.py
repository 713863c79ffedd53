"""A base at one byte a weight, without torch: where it is proposed, and what gradients are multiplied in on it.

Whoever asks for `method=lora-8bit` gets it anywhere. To propose it, or to choose it for `method=auto`, takes more than an argument:
`python -m tests.bench.base_gate` trains on it beside 16 bits and NF4, and what passed there is named here.
"""

from __future__ import annotations

from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import Linear, ModelSpec
from qlora_tui.engine.sizes import eight_bit, element_bytes
from qlora_tui.engine.spec import RunConfig

GOOD_ENOUGH = frozenset(("16bit", "int8", "fp8"))
"""What gradients on it were multiplied in, as `grad_matmul` says it, and passed: no worse than 16 bits beyond the noise of three seeds
after 200 steps, and better than NF4 (tests/bench/results)."""

_NATS, _NF4_NATS = 0.00, 0.25
"""What an untouched model loses to 32 bits on real text (tests/bench/results, 2026-11-27)."""


def usual(machine: Machine) -> str:
    """Return what gradients are multiplied in where nothing was measured: in FP8 on cards that can.

    Turing and Ampere can in INT8. Its sums are twice as wide and have to be scaled, and on an H100 a step took as long as in 16 bits
    (2026-11-28): only a card's own timing can say that it pays there.
    """
    return "fp8" if "fp8" in machine.narrow and machine.fuses else "16bit"


def asked_gradients(run: RunConfig, machine: Machine) -> str:
    """Return what `run` multiplies gradients in on an 8-bit base; layers of uneven sizes stay in 16 bits whatever this says."""
    if element_bytes(run, machine) != 2 or not machine.kernels:
        return "16bit"
    return usual(machine) if run.grad_matmul == "auto" else run.grad_matmul


def narrow_gradients(model: ModelSpec, run: RunConfig, machine: Machine) -> str:
    """Return what gradients are multiplied in if not in 16 bits, "fp8" or "int8": with an 8-bit base, of even sizes."""
    even = all(part.inputs % 16 == 0 and part.outputs % 16 == 0 for part in model.linears())
    kind = asked_gradients(run, machine)
    return kind if eight_bit(model, run) and even and kind != "16bit" else ""


def turned_bytes(part: Linear, tokens: int, kind: str) -> int:
    """Return what the gradient of an input takes beside it: the weight turned, what came in 8 bits, and INT8's whole sums."""
    return part.weights + tokens * (part.outputs + 4) + 4 * part.inputs * (tokens if kind == "int8" else 1)


def offered(model: ModelSpec, run: RunConfig, machine: Machine) -> bool:
    """Say whether an 8-bit base may be proposed: measured to be good enough, and possible for this model and this adapter's start."""
    possible = not model.quantized and not model.wrapper and run.init_lora_weights != "pissa"
    return possible and machine.kind == "cuda" and asked_gradients(run, machine) in GOOD_ENOUGH


def quality() -> str:
    """Return what it costs, in a few words."""
    return f"{_NATS:.2f} nats from 16 bits where 4 bits are {_NF4_NATS} off, in a model of 135 M"
