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

Kind = Literal["fp8", "int8"]

GOOD_ENOUGH: frozenset[Kind] = frozenset()
"""What passed: no worse than 16 bits beyond the noise of three seeds after 200 steps, and better than NF4. None has been run yet."""

NATS: Mapping[Kind, float] = {"fp8": 0.03, "int8": 0.00}
"""What an untouched model loses to 32 bits on real text, FP8 with its inputs quantized too (tests/bench/results, 2026-11-27)."""

_NF4_NATS = 0.25  # of the same model on the same text


def kind_on(machine: Machine) -> Kind:
    """Return what an 8-bit base is held in; the same as `fast.eightbit.kind_for`, which needs torch. A test compares them."""
    capability = machine.compute_capability
    return "fp8" if machine.kind == "cuda" and capability is not None and capability >= (8, 9) else "int8"


def offered(model: ModelSpec, run: RunConfig, machine: Machine) -> bool:
    """Say whether an 8-bit base may be proposed: measured to be good enough, and possible for this model and this adapter's start."""
    possible = not model.quantized and not model.wrapper and run.init_lora_weights != "pissa"
    return possible and machine.kind == "cuda" and kind_on(machine) in GOOD_ENOUGH


def quality(machine: Machine) -> str:
    """Return what it costs, in a few words."""
    return f"{NATS[kind_on(machine)]:.2f} nats from 16 bits where 4 bits are {_NF4_NATS} off, in a model of 135 M"
