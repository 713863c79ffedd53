"""What the Triton kernels compute, in plain torch: fused layers run on a processor with these, and the kernels are compared with them.

Each makes the tensors that its kernel makes and no others that a trace sees; numbers are computed in float32 and rounded once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from qlora_tui.engine import fast
from qlora_tui.engine.fast import compiled, eightbit
from qlora_tui.engine.fast.eightbit import Kind, Rows
from qlora_tui.engine.fast.lora import Part
from qlora_tui.engine.machine import Machine

Activation = str
Parts = tuple[Part | None, Part | None]
WIDEST_ROW, WIDEST_RANK, WIDEST_SUM, ROWS_OF_A_SUM = 1 << 14, 64, 32, 512


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Put these functions where the kernels are, and say that kernels run here."""
    here = sys.modules[__name__]
    for room in ("kernels", "gate", "parts", "widths"):
        patch.setitem(sys.modules, f"qlora_tui.engine.fast.{room}", here)
        patch.setattr(fast, room, here, raising=False)
    patch.setattr(compiled, "why_not", lambda device: "")
    patch.setattr(Machine, "kernels", True)
    patch.setattr(Machine, "fuses", True)
    from qlora_tui.engine.fast import adapted, operations

    patch.setattr(adapted, "parts", here)
    for room in ("kernels", "gate"):
        patch.setattr(operations, room, here)


def dequantize(packed: torch.Tensor, state: Any, out: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device) if out is None else out
    with _disable_current_modes():
        out.copy_(bnb.dequantize_4bit(packed, state).view(out.shape))
    return out


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * (weight.float() + offset)


def quantize(x_NI: torch.Tensor, times_I: torch.Tensor, kind: Kind) -> Rows:
    rows = Rows.empty(x_NI, kind)
    with _disable_current_modes(), torch.no_grad():
        for room, made in zip(rows, eightbit.quantize(x_NI.float() * times_I, kind), strict=True):
            room.copy_(made)
    return rows


def turned(weight_OI: torch.Tensor, kind: Kind) -> torch.Tensor:
    out = torch.empty(weight_OI.shape[::-1], dtype=eightbit.TYPES[kind], device=weight_OI.device)
    with _disable_current_modes():
        out.copy_(weight_OI.t().float())
    return out


def scaled(held_OI: torch.Tensor, scales_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(held_OI.shape, dtype=dtype, device=held_OI.device)
    with _disable_current_modes():
        out.copy_(held_OI.float() * scales_O[:, None])
    return out


def summed(sums_NI: torch.Tensor, scales_N: torch.Tensor, dtype: torch.dtype, into_NI: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.empty(sums_NI.shape, dtype=dtype, device=sums_NI.device) if into_NI is None else into_NI
    with _disable_current_modes(), torch.no_grad():
        out.copy_(sums_NI.float() * scales_N[:, None] + (0.0 if into_NI is None else into_NI.float()))
    return out


def rms_norm(
    x_NH: torch.Tensor,
    weight_H: torch.Tensor,
    epsilon: float,
    offset: float = 0.0,
    beside: torch.Tensor | None = None,
    rates_N: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty_like(x_NH)
    with _disable_current_modes(), torch.no_grad():
        if rates_N is not None:
            rates_N.copy_(torch.rsqrt(x_NH.float().square().mean(-1) + epsilon))
        result = _norm(x_NH.float(), weight_H, epsilon, offset)
        out.copy_(result if beside is None else result + beside.float())
    return out


def rms_norm_backward(
    grad_NH: torch.Tensor,
    x_NH: torch.Tensor,
    weight_H: torch.Tensor,
    epsilon: float,
    offset: float = 0.0,
    beside: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty_like(grad_NH) if out is None else out
    with _disable_current_modes(), torch.enable_grad():
        x = x_NH.detach().float().requires_grad_()
        (result,) = torch.autograd.grad(_norm(x, weight_H, epsilon, offset), x, grad_NH.float())
        out.copy_(result if beside is None else result + beside.float())
    return out


def _gated(gate: torch.Tensor, up: torch.Tensor, kind: Activation) -> torch.Tensor:
    return (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up


def _completed(value: torch.Tensor, part: Part | None) -> torch.Tensor:
    return value.float() if part is None else value.float() + part.scaling * (part.low_NR.float() @ part.b_OR.float().t())


def gated(gate_NI: torch.Tensor, up_NI: torch.Tensor, kind: Activation, parts: Parts = (None, None)) -> torch.Tensor:
    out = torch.empty(gate_NI.shape, dtype=gate_NI.dtype, device=gate_NI.device)
    with _disable_current_modes(), torch.no_grad():
        out.copy_(_gated(_completed(gate_NI, parts[0]), _completed(up_NI, parts[1]), kind))
    return out


def gated_backward_(
    grad_NI: torch.Tensor,
    gate_NI: torch.Tensor,
    up_NI: torch.Tensor,
    kind: Activation,
    parts: Parts = (None, None),
    beside: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    product: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    with _disable_current_modes(), torch.enable_grad():
        grad = grad_NI.float() if beside is None else grad_NI.float() + beside[0].float() @ beside[1].float()
        whole = (_completed(part.detach(), added) for part, added in zip((gate_NI, up_NI), parts, strict=True))
        gate, up = (part.detach().requires_grad_() for part in whole)
        made = _gated(gate, up, kind)
        of_gate, of_up = torch.autograd.grad(made, (gate, up), grad)
    ranks = [0 if part is None else part.b_OR.shape[1] for part in parts] + [0 if beside is None else len(beside[1])]
    summed = 0 < max(ranks) <= WIDEST_SUM
    results = [(gate_NI, of_gate), (up_NI, of_up), *([(grad_NI, made)] if product or not summed or beside is None else [])]
    with _disable_current_modes(), torch.no_grad():
        for kept, result in results:
            kept.detach().copy_(result.detach())
    if not summed:
        return None, None
    number, width = gate_NI.shape
    sums = torch.empty(-(-number // ROWS_OF_A_SUM), width * sum(ranks), device=grad_NI.device)
    with _disable_current_modes(), torch.no_grad():
        found = [
            part.scaling * (of_part.to(grad_NI.dtype).float().t() @ part.low_NR.float())
            for part, of_part in zip(parts, (of_gate, of_up), strict=True)
            if part is not None
        ]
        found += [] if beside is None else [beside[0].float().t() @ made.to(grad_NI.dtype).float()]
        sums.zero_()
        sums[0] = torch.cat([part.reshape(-1) for part in found])  # as if the first program had summed all
    of_b, of_a = sums.sum(0).split([width * sum(ranks[:2]), width * ranks[2]])
    return of_b, of_a


def begun(
    part: Part, beside_NO: torch.Tensor | None = None, bias_O: torch.Tensor | None = None, out_NO: torch.Tensor | None = None
) -> torch.Tensor:
    shape = len(part.low_NR), len(part.b_OR)
    out = torch.empty(shape, dtype=part.b_OR.dtype, device=part.b_OR.device) if out_NO is None else out_NO
    with _disable_current_modes(), torch.no_grad():
        beside = [0.0 if other is None else other.float() for other in (beside_NO, bias_O)]
        out.copy_(part.scaling * (part.low_NR.float() @ part.b_OR.float().t()) + beside[0] + beside[1])
    return out


def joined(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=dtype, device=tensors[0].device)
    with _disable_current_modes(), torch.no_grad():
        out.copy_(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]))
    return out


def add_each(whole: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    with _disable_current_modes(), torch.no_grad():
        for tensor, numbers in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor += numbers.view(tensor.shape)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    size = cos.shape[1]
    cos, sin = (part.float().repeat(len(x) // len(part), 1)[:, None] for part in (cos, sin))
    left, right = x[..., :size].chunk(2, -1)
    return torch.cat((x[..., :size] * cos + torch.cat((-right, left), -1) * sin, x[..., size:]), -1)


def turn_heads(
    x_NAD: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    weight_D: torch.Tensor | None = None,
    epsilon: float = 0.0,
    offset: float = 0.0,
) -> torch.Tensor:
    out = x_NAD if weight_D is None else torch.empty_like(x_NAD)
    with _disable_current_modes(), torch.no_grad():
        x = x_NAD.float() if weight_D is None else _norm(x_NAD.float(), weight_D, epsilon, offset)
        out.copy_(_turned(x, cos_TR, sin_TR))
    return out


def turn_heads_back_(
    grad_NAD: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    x_NAD: torch.Tensor | None = None,
    weight_D: torch.Tensor | None = None,
    epsilon: float = 0.0,
    offset: float = 0.0,
) -> None:
    with _disable_current_modes(), torch.enable_grad():
        x = (grad_NAD if x_NAD is None else x_NAD).detach().float().requires_grad_()
        before = x if weight_D is None else _norm(x, weight_D, epsilon, offset)
        (result,) = torch.autograd.grad(_turned(before, cos_TR, sin_TR), x, grad_NAD.float())
        grad_NAD.detach().copy_(result)


def cross_entropy_(logits_NV: torch.Tensor, labels_N: torch.Tensor, softcap: float | None, *, gradient: bool) -> torch.Tensor:
    losses = torch.empty(len(labels_N), dtype=torch.float32, device=logits_NV.device)
    with _disable_current_modes(), torch.enable_grad():
        logits = logits_NV.detach().float().requires_grad_()
        capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        result = F.cross_entropy(capped, labels_N, reduction="none")
        losses.copy_(result.detach())
        if gradient:
            logits_NV.copy_(torch.autograd.grad(result.sum(), logits)[0])
    return losses
