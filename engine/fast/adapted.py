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

from qlora_tui.engine.fast import base
from qlora_tui.engine.fast.lora import ADAPTER, Start


@dataclass(frozen=True, slots=True)
class Linear:
    """One frozen product and what its adapter started from; A and B go beside it, since autograd has to see them."""

    layer: torch.nn.Module
    start: Start | None
    scaling: float


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


@dataclass(frozen=True, slots=True)
class Part:
    """What an adapter adds to a product, not multiplied yet: scaling * low B^T [N, O]."""

    low_NR: torch.Tensor
    b_OR: torch.Tensor
    scaling: float

    def outputs(self, some: slice) -> Part:
        """Return the same for some of the outputs."""
        return Part(self.low_NR, self.b_OR[some], self.scaling)


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
        self, slope_NR: torch.Tensor | None, grads_NO: Sequence[torch.Tensor], x_NI: torch.Tensor, low_NR: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return the gradients of A's and B's, laid out as they are."""
        if slope_NR is None or low_NR is None or self._whole is None:
            return None
        whole = torch.empty_like(self._whole)
        of_a, of_b = self._split(whole)
        torch.mm(slope_NR.t(), x_NI, out=of_a)
        for grad_NO, b_OR, part in zip(grads_NO, of_b, self.parts(low_NR), strict=True):
            if b_OR is not None and part is not None:
                b_OR.addmm_(grad_NO.t(), part.low_NR, beta=0, alpha=part.scaling)
        return whole

    def trained(self, whole: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Return gradients for A and B in turn, in their own type, without those of what an adapter started from."""
        found = list[torch.Tensor | None]()
        if whole is None or self._whole is None:
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
            down, up = [*down, a_RI.reshape(-1)], [*up, b_OR.reshape(-1)]
        # many tensors at once by torch's foreach took 16 us a call on an H100: a block of threads for each
        return torch.cat([*down, *up]).to(dtype)

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
    """Return each product plus `residual_NO`, and x A^T, which gradients read; without the adapters' parts unless `added`."""
    low_NR = adapters.low(x_NI)
    made = list[torch.Tensor]()
    for linear, part in zip(adapters.linears, adapters.parts(low_NR), strict=True):
        made.append(base.product(x_NI, linear.layer, residual_NO, out_NO))
        if part is not None and added:
            made[-1].addmm_(part.low_NR, part.b_OR.t(), alpha=part.scaling)
    return made, low_NR


def backward(
    grads_NO: Sequence[torch.Tensor], x_NI: torch.Tensor, adapters: Adapters, low_NR: torch.Tensor | None, *, wanted: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradient of the products' input, if `wanted`, and those of the adapters, laid out as they are."""
    slope_NR = adapters.slopes(grads_NO)
    found = adapters.gradients(slope_NR, grads_NO, x_NI, low_NR)
    if not wanted:
        return None, found
    grad_NI = base.input_gradient(grads_NO[0], adapters.linears[0].layer)
    for grad_NO, linear in zip(grads_NO[1:], adapters.linears[1:], strict=True):
        base.input_gradient(grad_NO, linear.layer, grad_NI)
    if slope_NR is not None:
        grad_NI.addmm_(slope_NR, adapters.stacked)
    return grad_NI, found
