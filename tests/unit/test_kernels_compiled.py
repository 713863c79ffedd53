"""Every kernel compiled for a card, on any machine: the interpreter takes Python that the compiler refuses."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BF16, F16, F32, FP8, BYTES, INT = "*bf16", "*fp16", "*fp32", "*fp8e4nv", "*i8", "i32"
NORM = {"x": BF16, "weight": BF16, "beside": BF16, "out": BF16, "grad": BF16, "width": INT, "epsilon": "fp32"}
GATE = dict.fromkeys(("grad", "gate", "up", "out", "low_gate", "b_gate", "low_up", "b_up", "slope", "a"), BF16)
GATE |= dict.fromkeys(("rank", "rank_gate", "rank_up", "number", "width", "gate_stride", "up_stride", "low_stride"), INT)
GATE |= {"scaling_gate": "fp32", "scaling_up": "fp32", "sums": F32}
PARTS, PLAIN = {"GATE": True, "UP": True}, {"GATE": False, "UP": False, "RANK": 16}
HEADS = {**NORM, "cos": BF16, "sin": BF16, "heads": INT, "size": INT, "stride": INT, "half": INT, "rows": INT}
ROWS = {"held": FP8, "scales": F32}
WIDEN = {"packed": "*u8", "scale_codes": F32, "scales2": F32, "offset": F32, "codes": F32, "out": BF16, "size": INT}
LOSS = {"logits": BF16, "labels": "*i64", "losses": F32, "size": INT, "cap": "fp32"}
BEGUN = {"low": BF16, "b": BF16, "beside": BF16, "bias": BF16, "out": BF16, "scaling": "fp32"}
BEGUN |= dict.fromkeys(("rank", "number", "width", "low_stride"), INT)
TENSORS = ("first", "second", "third", "fourth", "fifth", "sixth")
PIECES = {f"end{number}": INT for number in range(1, 7)}
Case = tuple[str, dict[str, str], dict[str, Any]]
BEFORE_AMPERE = ("_widen", "_cross_entropy", "_quantize", "_turn", "_summed", "_scaled")
"""What runs outside fused layers, in float16 on Turing."""

CASES: list[Case] = [
    ("_widen", {**WIDEN, "scales": "*u8"}, {"HALF": 32, "GROUP": 256, "BLOCKS": 64}),
    ("_widen", {**WIDEN, "scales": F32}, {"HALF": 32, "GROUP": 0, "BLOCKS": 64}),
    ("_norm", {**NORM, "rates": F32}, {"OFFSET": 1.0, "BESIDE": True, "RATED": True, "BLOCK": 4096}),
    ("_norm_backward", NORM, {"OFFSET": 1.0, "BESIDE": True, "BLOCK": 4096}),
    ("_gated", GATE, {"GELU": True, **PLAIN}),
    ("_gated", GATE, {"GELU": False, "RANK": 64, **PARTS}),
    ("_gated_backward", GATE, {"GELU": True, "DOWN": False, "SUMS": False, "PRODUCT": True, **PLAIN}),
    ("_gated_backward", GATE, {"GELU": True, "DOWN": True, "SUMS": True, "PRODUCT": False, "RANK": 16, **PARTS}),
    ("_gated_backward", GATE, {"GELU": True, "DOWN": True, "SUMS": True, "PRODUCT": True, "RANK": 32, **PARTS}),
    ("_gated_backward", GATE, {"GELU": False, "DOWN": True, "SUMS": False, "PRODUCT": True, "RANK": 64, **PARTS}),
    ("_begun", BEGUN, {"BESIDE": True, "BIAS": True, "RANK": 32, "ROWS": 32, "BLOCK": 128}),
    ("_join", {**PIECES, **dict.fromkeys(TENSORS, F32), "out": BF16}, {"BLOCK": 1024}),
    ("_add", {**PIECES, **dict.fromkeys(TENSORS, F32), "whole": BF16}, {"BLOCK": 1024}),
    ("_heads", HEADS, {"OFFSET": 1.0, "NORM": True, "HEADS": 32, "HALF": 64}),
    ("_heads_backward", HEADS, {"OFFSET": 1.0, "NORM": True, "HEADS": 32, "HALF": 64}),
    ("_cross_entropy", LOSS, {"CAPPED": True, "GRADIENT": True, "BLOCK": 4096}),
    ("_quantize", {"x": BF16, "times": F32, "width": INT, **ROWS}, {"SHARE": 1 / 448, "WHOLE": True, "BLOCK": 16384}),
    ("_quantize", {"x": BF16, "times": F32, "width": INT, **ROWS, "held": BYTES}, {"SHARE": 1 / 127, "WHOLE": False, "BLOCK": 8192}),
    ("_turn", {"weight": BYTES, "out": FP8, "rows": INT, "columns": INT}, {"SIDE": 128}),
    ("_turn", {"weight": BYTES, "out": BYTES, "rows": INT, "columns": INT}, {"SIDE": 128}),
    ("_summed", {"sums": "*i32", "scales": F32, "out": BF16, "width": INT}, {"ADDED": True, "BLOCK": 2048}),
    ("_summed", {"sums": "*i32", "scales": F32, "out": BF16, "width": INT}, {"ADDED": False, "BLOCK": 2048}),
    ("_scaled", {"held": BYTES, "scales": F32, "out": BF16, "width": INT}, {"BLOCK": 2048}),
]


def compile_all() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qlora_tui.engine.fast import gate, kernels, parts, widths

    found = {
        name: part for room in (kernels, gate, parts, widths) for name, part in vars(room).items() if isinstance(part, triton.JITFunction)
    }
    written = "".join(inspect.getsource(room) for room in (kernels, gate, parts, widths))
    assert {name for name in found if f"{name}[" in written} == {name for name, _, _ in CASES}  # all that are launched
    for name, types, others in CASES:
        constants = others | {"_gated": gate._FORWARD, "_gated_backward": gate._BACKWARD}.get(name, {})
        arguments = found[name].arg_names
        signature = {argument: "constexpr" if argument in constants else types[argument] for argument in arguments}
        source = ASTSource(found[name], signature, {(arguments.index(key),): value for key, value in constants.items()})
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert made.asm["ptx"], name
        if name not in BEFORE_AMPERE or FP8 in signature.values():
            continue
        older = {argument: F16 if kind == BF16 else kind for argument, kind in signature.items()}
        source = ASTSource(found[name], older, {(arguments.index(key),): value for key, value in constants.items()})
        made = triton.compile(source, target=GPUTarget("cuda", 75, 32), options={"num_warps": 8})
        assert "sm_75" in made.asm["ptx"], name
        assert made.asm["cubin"], name  # the assembler took it


def test_every_kernel_compiles_for_a_card(tmp_path: Path) -> None:
    """In a process of its own: this one interprets kernels."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    places = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    ended = subprocess.run([sys.executable, __file__], env={**os.environ, **places}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".pkg"))
    compile_all()
