"""Frozen products with their adapters: what they make, and both gradients; everything that autograd is not needed for.

Products that share an input share their adapters' low-rank one.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from qlora_tui.engine.fast import base
from qlora_tui.engine.fast.lora import ADAPTER, Start, joined


@dataclass(frozen=True, slots=True)
class Linear:
    """One frozen product and what its adapter started from; A and B go beside it, since autograd has to see them."""

    layer: torch.nn.Module
    start: Start | None
    scaling: float


Adapter = tuple[torch.Tensor, torch.Tensor]
"""A and B in the type of computation, with what they started from beside them."""

Pairs = Sequence[torch.Tensor | None]
"""A [R, I] and B [O, R] of each product in turn; None twice for one without an adapter."""


def frozen_and_trained(modules: Sequence[Any]) -> tuple[tuple[Linear, ...], list[torch.Tensor | None]]:
    """Return the frozen side of each module, and the adapters that are on."""
    linears, pairs = list[Linear](), list[torch.Tensor | None]()
    for module in modules:
        has_adapter = isinstance(module, LoraLayer)
        on = has_adapter and not module.disable_adapters
        layer = module.get_base_layer() if has_adapter else module
        linears.append(Linear(layer, module.forward.start if on else None, module.scaling[ADAPTER] if on else 0.0))
        pairs += [module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight] if on else [None, None]
    return tuple(linears), pairs


def joined_pairs(linears: Sequence[Linear], pairs: Pairs, dtype: torch.dtype) -> list[Adapter | None]:
    """Return A and B of each product in `dtype`, with what they started from beside them."""
    found = list[Adapter | None]()
    for linear, a, b in zip(linears, pairs[::2], pairs[1::2], strict=True):
        found.append(None if a is None or b is None else joined(a, b, linear.start, dtype))
    return found


def _low(x_NI: torch.Tensor, adapters: Sequence[Adapter | None]) -> list[torch.Tensor | None]:
    """Return x A^T of each adapter: one product, since all read the same x."""
    stacked = [adapter[0] for adapter in adapters if adapter is not None]
    if not stacked:
        return [None] * len(adapters)
    low_NR = x_NI @ torch.cat(stacked).t()
    parts = iter(low_NR.split([len(a) for a in stacked], dim=1))
    return [None if adapter is None else next(parts) for adapter in adapters]


def forward(
    x_NI: torch.Tensor,
    linears: Sequence[Linear],
    adapters: Sequence[Adapter | None],
    residual_NO: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Return each product with its adapter's part, plus `residual_NO`, and what the adapters' gradients read."""
    lows = _low(x_NI, adapters)
    each = zip(linears, adapters, lows, strict=True)
    return [product(x_NI, linear, adapter, low, residual_NO) for linear, adapter, low in each], lows


def product(
    x_NI: torch.Tensor,
    linear: Linear,
    adapter: Adapter | None,
    low_NR: torch.Tensor | None,
    residual_NO: torch.Tensor | None,
    out_NO: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return one product with its adapter's part."""
    out = base.product(x_NI, linear.layer, residual_NO, out_NO)
    if adapter is not None and low_NR is not None:
        out.addmm_(low_NR, adapter[1].t(), alpha=linear.scaling)
    return out


def backward(
    grads_NO: Sequence[torch.Tensor],
    x_NI: torch.Tensor,
    linears: Sequence[Linear],
    adapters: Sequence[Adapter | None],
    lows: Sequence[torch.Tensor | None],
    *,
    wanted: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Return the gradient of the products' input, if `wanted`, and those of A and B of each, as `joined_pairs` has them."""
    slopes, grads = list[torch.Tensor](), list[torch.Tensor | None]()
    for grad_NO, linear, adapter, low in zip(grads_NO, linears, adapters, lows, strict=True):
        if adapter is None or low is None:
            grads += [None, None]
            continue
        slopes.append((grad_NO @ adapter[1]).mul_(linear.scaling))
        grads += [slopes[-1], (grad_NO.t() @ low).mul_(linear.scaling)]
    slope_NR = torch.cat(slopes, dim=1) if slopes else None
    if slope_NR is not None:
        parts = iter((slope_NR.t() @ x_NI).split([slope.shape[1] for slope in slopes]))
        grads[::2] = [None if grad is None else next(parts) for grad in grads[::2]]
    if not wanted:
        return None, grads
    grad_NI = base.input_gradient(grads_NO[0], linears[0].layer)
    for grad_NO, linear in zip(grads_NO[1:], linears[1:], strict=True):
        base.input_gradient(grad_NO, linear.layer, grad_NI)
    if slope_NR is not None:
        grad_NI.addmm_(slope_NR, torch.cat([adapter[0] for adapter in adapters if adapter is not None]))
    return grad_NI, grads


def of_trained(grads: Sequence[torch.Tensor | None], pairs: Pairs) -> list[torch.Tensor | None]:
    """Return the gradients in the adapters' own type, without those of what an adapter started from."""
    found = list[torch.Tensor | None]()
    for index, (grad, trained) in enumerate(zip(grads, pairs, strict=True)):
        if grad is not None and trained is not None:
            grad = (grad[:, : trained.shape[1]] if index % 2 else grad[: len(trained)]).to(trained.dtype)
        found.append(grad)
    return found
