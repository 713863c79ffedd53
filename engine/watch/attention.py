"""Attention that fell back to a slow kernel: judged by the operators that really ran and by memory, never by a flag.

A fused kernel (flash, memory-efficient, cuDNN) never writes the T x T matrix of scores; the plain one does, at two to nine times
the cost, and says nothing. The causes are a mask, a head dimension, a type or a card that the fused kernels do not take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_tui.engine.events import Finding, Severity
from qlora_tui.engine.units import gib

NAME = "attention"
RULE = "a fused attention operator ran in every layer that attends, and memory at twice the length is under three times as much"
QUADRATIC = 3.0
"""Memory that grows in proportion doubles with the length; scores of T x T grow fourfold."""
ENOUGH_BYTES = 64 << 20
"""Below this, what a length costs drowns in what the allocator rounds up."""
FUSED: Mapping[str, str] = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "memory-efficient",
    "_scaled_dot_product_cudnn_attention": "cuDNN",
    "_scaled_dot_product_fused_attention_overrideable": "fused",
    "_varlen_attn": "flash without a mask",
}
SOFTMAX = "_softmax"
NOT_ON_A_CPU = "attention kernels are not judged on a CPU: the fused ones that a length could fall back from are CUDA's"


@dataclass(frozen=True, slots=True)
class Seen:
    """What ran in one forward pass over `length` tokens: calls by operator, and bytes used at half and at full length (0: not measured)."""

    calls: Mapping[str, int]
    length: int
    half_bytes: int
    full_bytes: int
    head_dim: int = 0
    dtype: str = ""
    asked: str = "sdpa"
    capability: tuple[int, int] | None = None


def judge(seen: Seen) -> Finding:
    """Say which attention kernel ran and why, as a note, or as a warning where it is a slow one."""
    fused = {words: seen.calls[name] for name, words in FUSED.items() if seen.calls.get(name)}
    plain = seen.calls.get(SOFTMAX, 0)
    growth = seen.full_bytes / seen.half_bytes if seen.half_bytes > 0 else None
    quadratic = growth is not None and growth > QUADRATIC and seen.full_bytes > ENOUGH_BYTES
    names = ", ".join(f"{words} in {number} calls" for words, number in fused.items()) or "none of the fused kernels"
    memory = (
        f"; memory {gib(seen.half_bytes)} at {seen.length // 2} tokens, {gib(seen.full_bytes)} at {seen.length}"
        if growth is not None
        else ""
    )
    numbers = {
        "rule": RULE,
        "calls": dict(seen.calls),
        "length": seen.length,
        "half_bytes": seen.half_bytes,
        "full_bytes": seen.full_bytes,
        "growth": growth,
        "head_dim": seen.head_dim,
        "dtype": seen.dtype,
    }
    if not fused and not plain and not quadratic:
        message = f"no attention operator that is known here was called{memory}: this family attends in a way of its own"
        return Finding(NAME, "info", 0, message, (), numbers)
    if not plain and not quadratic:
        return Finding(NAME, "info", 0, f"attention ran fused: {names}{memory}", (), numbers)
    severity: Severity = "warn"
    slow = f"the slow way ({names}, {plain} plain softmax calls){memory}"
    how = slow if plain else f"fused ({names}){memory}, and yet memory grows with the square of the length"
    message = f"attention ran {how}: {_why(seen)}"
    return Finding(NAME, severity, 0, message, _advice(seen), numbers)


def _why(seen: Seen) -> str:
    """Return the likeliest cause; what fused kernels take is from torch's own checks (aten/native/transformers/cuda/sdp_utils)."""
    if seen.asked == "eager":
        return "attn_implementation=eager asks for it"
    if seen.head_dim > 256:
        return f"its heads are {seen.head_dim} wide and the flash kernel ends at 256"
    if seen.head_dim % 8:
        return f"its heads are {seen.head_dim} wide, no multiple of 8"
    if seen.dtype == "float32":
        return "float32: the flash kernel takes 16-bit types only"
    if seen.capability is not None and seen.capability < (8, 0):
        return f"the flash kernel needs compute capability 8.0, this card has {seen.capability[0]}.{seen.capability[1]}"
    return "this family passes a mask, caps its scores or computes attention itself"


def _advice(seen: Seen) -> tuple[str, ...]:
    if seen.asked == "eager":
        return ("attn_implementation=sdpa",)
    shorter = f"a shorter max_length: cost grows with its square, now {seen.length}"
    return (
        (shorter, "dtype=bfloat16", "update torch and transformers")
        if seen.dtype == "float32"
        else (shorter, "update torch and transformers")
    )
