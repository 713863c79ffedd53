"""Frozen products with their adapters: what they make, and both gradients; everything that autograd is not needed for.

Products that share an input share their adapters' low-rank one, and everything small about them is done once for all: tensors
of rank 16 take a card less time than starting a kernel for each.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from qlora_tui.engine.fast import base, parts
from qlora_tui.engine.fast.lora import ADAPTER, Part, Start


@dataclass(frozen=True, slots=True)
class Linear:
    """One frozen product and what its adapter started from; A and B go beside it, since autograd has to see them."""

    layer: torch.nn.Module
    start: Start | None
    scaling: float


Scale = tuple[torch.Tensor, torch.Tensor]
"""What a norm multiplied its input by: rates of its rows [N] in float32, and weights of its columns [I]."""

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


class Adapters:
    """The adapters of products that share an input, in the type of computation: A's one below the other, then B's, in one piece.

    So one cast serves them all, one product reads the input for all, and one casts their gradients, which lie alike. What
    an adapter started from is beside it, with B's sign turned: B A - B0 A0 in one product, so that equal parts cancel exactly.
    """

    def __init__(self, linears: Sequence[Linear], pairs: Pairs, dtype: torch.dtype) -> None:
        """Cast A and B of each of `linears` to `dtype`."""
        self.linears = linears
        self.pairs = [None if a is None or b is None else (a, b) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
        starts = (2 if linear.start is not None else 1 for linear in linears)
        self.ranks = [0 if pair is None else len(pair[0]) * start for pair, start in zip(self.pairs, starts, strict=True)]
        self._whole = self._cast(dtype) if any(self.ranks) else None

    def low(self, x_NI: torch.Tensor) -> torch.Tensor | None:
        """Return x A^T of all of them [N, R]."""
        return None if self._whole is None else x_NI @ self.stacked.t()

    @property
    def stacked(self) -> torch.Tensor:
        """Return all A's [R, I], where there is one."""
        assert self._whole is not None
        return self._split(self._whole)[0]

    def parts(self, low_NR: torch.Tensor | None) -> list[Part | None]:
        """Return what is added to each product, if anything."""
        if low_NR is None or self._whole is None:
            return [None] * len(self.linears)
        each = zip(low_NR.split(self.ranks, dim=1), self._split(self._whole)[1], self.linears, strict=True)
        return [Part(low, b, linear.scaling) if b is not None else None for low, b, linear in each]

    def slopes(self, grads_NO: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Return the gradient of x A^T of all of them [N, R]."""
        if self._whole is None:
            return None
        slope_NR = torch.empty(len(grads_NO[0]), sum(self.ranks), dtype=self._whole.dtype, device=self._whole.device)
        for grad_NO, part in zip(grads_NO, self.parts(slope_NR), strict=True):
            if part is not None:
                part.low_NR.addmm_(grad_NO, part.b_OR, beta=0, alpha=part.scaling)
        return slope_NR

    def gradients(
        self,
        slope_NR: torch.Tensor | None,
        grads_NO: Sequence[torch.Tensor],
        x_NI: torch.Tensor,
        low_NR: torch.Tensor | None,
        *,
        scale: Scale | None = None,
        of_a: torch.Tensor | None = None,
        of_b: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Return the gradients of A's and B's, laid out as they are; those of all A's or all B's may be known already.

        With a `scale` the products read what a norm made of `x_NI`, which is not made again: A's gradient is small, and so is the slope.
        """
        if slope_NR is None or low_NR is None or self._whole is None:
            return None
        whole = torch.empty_like(self._whole)
        all_a, each_b = self._split(whole)
        if of_a is not None:
            all_a.copy_(of_a.view_as(all_a))
        elif scale is None:
            torch.mm(slope_NR.t(), x_NI, out=all_a)
        else:
            rates_N, weights_I = scale
            scaled_NR = torch.mul(slope_NR, rates_N[:, None], out=torch.empty_like(slope_NR))
            torch.mm(scaled_NR.t(), x_NI, out=all_a).mul_(weights_I)
        if of_b is not None:
            whole[all_a.numel() :].copy_(of_b)
            return whole
        for grad_NO, b_OR, part in zip(grads_NO, each_b, self.parts(low_NR), strict=True):
            if b_OR is not None and part is not None:
                b_OR.addmm_(grad_NO.t(), part.low_NR, beta=0, alpha=part.scaling)
        return whole

    def trained(self, whole: torch.Tensor | None, leaves: Pairs) -> list[torch.Tensor | None]:
        """Return gradients for A and B in turn, in their own type, without those of what an adapter started from.

        `leaves` are the parameters themselves. Where all of them have gradients already, these are added to at once, in one kernel, and
        autograd is given nothing to add: so whoever asks autograd for gradients apart must have none in place.
        """
        found = list[torch.Tensor | None]()
        if whole is None or self._whole is None:
            return [None] * (2 * len(self.linears))
        lent = [None if leaf is None else leaf.grad for leaf in (*leaves[::2], *leaves[1::2])]
        places = [grad for grad in lent if grad is not None]
        if len(places) == 2 * sum(pair is not None for pair in self.pairs) and all(linear.start is None for linear in self.linears):
            parts.add_each(whole, places)
            return [None] * (2 * len(self.linears))
        of_a, of_b = self._split(self.in_own_type(whole))
        for pair, a_RI, b_OR in zip(self.pairs, of_a.split(self.ranks), of_b, strict=True):
            found += [None, None] if pair is None or b_OR is None else [a_RI[: len(pair[0])], b_OR[:, : pair[1].shape[1]]]
        return found

    def in_own_type(self, whole: torch.Tensor) -> torch.Tensor:
        """Return gradients in the type that A and B are trained in."""
        return whole.to(next(pair[0].dtype for pair in self.pairs if pair is not None))

    def _cast(self, dtype: torch.dtype) -> torch.Tensor:
        down, up = list[torch.Tensor](), list[torch.Tensor]()
        for pair, linear in zip(self.pairs, self.linears, strict=True):
            if pair is None:
                continue
            a_RI, b_OR = pair
            if linear.start is not None:
                a_RI = torch.cat([part.to(dtype) for part in (a_RI, linear.start[0])])
                b_OR = torch.cat([part.to(dtype) for part in (b_OR, -linear.start[1])], dim=1)
            down, up = [*down, a_RI], [*up, b_OR]
        return parts.joined([*down, *up], dtype)

    def _split(self, whole: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Return the A's [R, I] and each B [O, R] of a piece of memory that is laid out like this one."""
        inputs = next(pair[0].shape[1] for pair in self.pairs if pair is not None)
        outputs = [0 if pair is None else len(pair[1]) for pair in self.pairs]
        first, *rest = whole.split([sum(self.ranks) * inputs, *(size * rank for size, rank in zip(outputs, self.ranks, strict=True))])
        bs = [part.view(size, -1) if size else None for part, size in zip(rest, outputs, strict=True)]
        return first.view(-1, inputs), bs


def forward(
    x_NI: torch.Tensor,
    adapters: Adapters,
    residual_NO: torch.Tensor | None = None,
    out_NO: torch.Tensor | None = None,
    *,
    added: bool = True,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return each product plus `residual_NO`, and x A^T, which gradients read; without the adapters' parts unless `added`.

    What an adapter adds is written first, and the product added to it: a product reads what it adds to while it multiplies, which
    takes no time of its own.
    """
    low_NR = adapters.low(x_NI)
    made = list[torch.Tensor]()
    for linear, part in zip(adapters.linears, adapters.parts(low_NR), strict=True):
        if part is None or not added:
            made.append(base.product(x_NI, linear.layer, residual_NO, out_NO))
            continue
        begun_NO = parts.begun(part, residual_NO, base.bias_of(linear.layer), out_NO)
        made.append(begun_NO.addmm_(x_NI, base.full_weight(linear.layer, x_NI.dtype).t()))
    return made, low_NR


def backward(
    grads_NO: Sequence[torch.Tensor],
    x_NI: torch.Tensor,
    adapters: Adapters,
    low_NR: torch.Tensor | None,
    *,
    wanted: bool,
    scale: Scale | None = None,
    of_b: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradient of the products' input, if `wanted`, and those of the adapters, laid out as they are; `of_b` if known.

    With a `scale` that input is what a norm made of `x_NI`.
    """
    slope_NR = adapters.slopes(grads_NO)
    found = adapters.gradients(slope_NR, grads_NO, x_NI, low_NR, scale=scale, of_b=of_b)
    if not wanted:
        return None, found
    late = slope_NR is not None and base.adds_apart(grads_NO[0], adapters.linears[0].layer)
    grad_NI = None if slope_NR is None or late else slope_NR @ adapters.stacked
    for grad_NO, linear in zip(grads_NO, adapters.linears, strict=True):
        grad_NI = base.input_gradient(grad_NO, linear.layer, grad_NI)
    if late:
        assert grad_NI is not None
        assert slope_NR is not None
        grad_NI.addmm_(slope_NR, adapters.stacked)
    return grad_NI, found
