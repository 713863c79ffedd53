"""A frozen product, whatever its weight is held in: 16 or 32 bits as they are, 4 and 8 bits widened.

Gradients of an 8-bit base's inputs are multiplied in 8 bits where the card is faster at that.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch

from qlora_tui.engine.fast import compiled, eightbit
from qlora_tui.engine.fast.eightbit import EightBit, Kind, Rows


def full_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight of a frozen linear layer as numbers [O, I]; `dtype` is that of the numbers where they have to be made."""
    if isinstance(layer, EightBit):
        return layer.full(dtype)
    weight: torch.Tensor = layer.weight
    state = weight.quant_state if hasattr(weight, "quant_state") else None  # only bitsandbytes' parameters carry one
    return weight.detach() if state is None else widened(weight.data, state)


def widened(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return a weight that bitsandbytes packed in 4 bits as numbers, by our kernel where it runs: the same bits in less time."""
    if not compiled.why_not(packed.device):
        from qlora_tui.engine.fast import widths  # imports Triton

        return widths.dequantize(packed, state)
    full: torch.Tensor = bnb.dequantize_4bit(packed, state)
    return full


def product(x_NI: torch.Tensor, layer: Any, added_NO: torch.Tensor | None = None, out_NO: torch.Tensor | None = None) -> torch.Tensor:
    """Return x W^T + bias + `added_NO`, in `out_NO` if there is one; a weight in full width is gone when this returns."""
    weight_IO = full_weight(layer, x_NI.dtype).t()
    first = layer.bias if added_NO is None else added_NO
    out = torch.mm(x_NI, weight_IO, out=out_NO) if first is None else torch.addmm(first, x_NI, weight_IO, out=out_NO)
    return out if added_NO is None or layer.bias is None else out.add_(layer.bias)


def input_gradient(grad_NO: torch.Tensor, layer: Any, into_NI: torch.Tensor | None = None) -> torch.Tensor:
    """Return g W, the gradient of a product's input, added to `into_NI` if there is one."""
    if (kind := eightbit.narrow_gradient(layer, grad_NO)) is not None:
        rows, turned_IO = _narrowed(grad_NO, layer.scales, kind), _turned(layer.weight, kind)
        made = eightbit.narrow_product(rows, turned_IO, grad_NO.dtype)
        if kind == "int8":
            return _summed(made, rows.scales, grad_NO.dtype, into_NI)
        return made if into_NI is None else into_NI.add_(made)
    weight_OI = full_weight(layer, grad_NO.dtype)
    return grad_NO @ weight_OI if into_NI is None else into_NI.addmm_(grad_NO, weight_OI)


def bias_of(layer: Any) -> torch.Tensor | None:
    """Return what a product adds to each output, if anything."""
    bias: torch.Tensor | None = layer.bias
    return bias


def adds_apart(grad_NO: torch.Tensor, layer: Any) -> bool:
    """Say whether `input_gradient` adds to what is there in a pass of its own: a product in FP8 can only be written."""
    return eightbit.narrow_gradient(layer, grad_NO) == "fp8"


def _narrowed(x_NI: torch.Tensor, times_I: torch.Tensor, kind: Kind) -> Rows:
    """Return rows times `times_I` in 8 bits, by our kernel where it runs: the same bits in one pass."""
    if not compiled.why_not(x_NI.device):
        from qlora_tui.engine.fast import widths  # imports Triton

        return widths.quantize(x_NI, times_I, kind)
    return eightbit.quantize(x_NI.float() * times_I, kind)


def _turned(weight_OI: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Return the bytes of a weight the other way round, in the type of `kind`, as numbers without their scales."""
    if not compiled.why_not(weight_OI.device):
        from qlora_tui.engine.fast import widths  # imports Triton

        return widths.turned(weight_OI, kind)
    return weight_OI.t().float().to(eightbit.TYPES[kind]).contiguous()


def _summed(sums_NI: torch.Tensor, scales_N: torch.Tensor, dtype: torch.dtype, into_NI: torch.Tensor | None) -> torch.Tensor:
    """Return whole sums times the scale of their row, in `dtype`, or added to `into_NI`."""
    if not compiled.why_not(sums_NI.device):
        from qlora_tui.engine.fast import widths  # imports Triton

        return widths.summed(sums_NI, scales_N, dtype, into_NI)
    return eightbit.summed(
        sums_NI, scales_N, torch.zeros(sums_NI.shape, dtype=dtype, device=sums_NI.device) if into_NI is None else into_NI
    )
