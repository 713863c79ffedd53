"""Where a base at one byte a weight is proposed: where it was measured to learn as well as one in 16 bits.

Whoever asks for `method=lora-8bit` gets it anywhere. To propose it, or to choose it for `method=auto`, takes more than an argument:
`python -m tests.bench.base_gate` trains on it beside 16 bits and NF4, and what passed there is named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.spec import RunConfig

Gradients = Literal["16 bits", "INT8", "FP8"]
"""What gradients are multiplied in on it; forward products are in 16 bits everywhere."""

GOOD_ENOUGH: frozenset[Gradients] = frozenset(("16 bits", "INT8", "FP8"))
"""What passed: no worse than 16 bits beyond the noise of three seeds after 200 steps, and better than NF4 (tests/bench/results)."""

_NAMES: Mapping[str, Gradients] = {"": "16 bits", "int8": "INT8", "fp8": "FP8"}
_NATS, _NF4_NATS = 0.00, 0.25
"""What an untouched model loses to 32 bits on real text (tests/bench/results, 2026-11-27)."""


def gradients_on(machine: Machine) -> Gradients:
    """Return what gradients are multiplied in; the same as `fast.eightbit.narrow_on`, which needs torch. A test compares them."""
    return _NAMES[machine.narrow]


def offered(model: ModelSpec, run: RunConfig, machine: Machine) -> bool:
    """Say whether an 8-bit base may be proposed: measured to be good enough, and possible for this model and this adapter's start."""
    possible = not model.quantized and not model.wrapper and run.init_lora_weights != "pissa"
    return possible and machine.kind == "cuda" and gradients_on(machine) in GOOD_ENOUGH


def quality() -> str:
    """Return what it costs, in a few words."""
    return f"{_NATS:.2f} nats from 16 bits where 4 bits are {_NF4_NATS} off, in a model of 135 M"
