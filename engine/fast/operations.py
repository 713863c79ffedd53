"""The autograd operations that a fused layer is made of, each with the backward pass written out.

Shapes: N tokens, H hidden size, I inputs, O outputs, R rank, A heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_tui.engine.fast import adapted, base, kernels
from qlora_tui.engine.fast.adapted import Adapter, Linear
from qlora_tui.engine.fast.kernels import Activation
from qlora_tui.engine.fast.recompute import Pass, current_pass

TILE = 4096
"""Tokens of a recomputed layer's MLP that are in flight at once."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A frozen norm over the last dimension."""

    weight_H: torch.Tensor
    epsilon: float
    offset: float

    def of(self, x_NH: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
        """Return the norm of each row, plus `beside`."""
        return kernels.rms_norm(x_NH, self.weight_H, self.epsilon, self.offset, beside)

    def back(
        self, grad_NH: torch.Tensor, x_NH: torch.Tensor, beside: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the gradient of its input, plus `beside`; in `out`, if there is one."""
        return kernels.rms_norm_backward(grad_NH, x_NH, self.weight_H, self.epsilon, self.offset, beside, out)


Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of each place [T, D]."""


def projections(
    x: torch.Tensor, norm: Norm, modules: Sequence[Any], angles: Angles | None, turned: tuple[int, ...], size: int
) -> tuple[torch.Tensor, ...]:
    """Return the products of the norm of `x`, and of each the first `turned` heads turned by their place's angle."""
    linears, pairs = adapted.frozen_and_trained(modules)
    outs: tuple[torch.Tensor, ...] = _Projections.apply(x, norm, linears, angles, turned, size, *pairs)  # type: ignore[no-untyped-call]
    return outs


def product(x: torch.Tensor, residual: torch.Tensor | None, modules: Sequence[Any]) -> torch.Tensor:
    """Return the product of the one module, plus `residual`."""
    linears, pairs = adapted.frozen_and_trained(modules)
    out: torch.Tensor = _Product.apply(x, residual, linears, *pairs)  # type: ignore[no-untyped-call]
    return out


def gated_mlp(x: torch.Tensor, norm: Norm, ups: Sequence[Any], down: Sequence[Any], kind: Activation, *, residual: bool) -> torch.Tensor:
    """Return down(activation(gate) * up) of the norm of `x`, plus `x` itself with `residual`."""
    linears, pairs = adapted.frozen_and_trained((*ups, *down))
    # a norm after it reads its output, so there it is made and kept like everything else of a layer
    keep = torch.is_grad_enabled() and (not residual or current_pass() == Pass.KEEP)
    out: torch.Tensor = _Mlp.apply(x, norm, linears, kind, residual, keep, *pairs)  # type: ignore[no-untyped-call]
    return out


def added_norm(x: torch.Tensor, residual: torch.Tensor | None, norm: Norm) -> torch.Tensor:
    """Return the norm of `x`, plus `residual`."""
    out: torch.Tensor = _Normed.apply(x, residual, norm)  # type: ignore[no-untyped-call]
    return out


def normed_heads(x: torch.Tensor, norm: Norm, angles: Angles | None) -> torch.Tensor:
    """Return the norm over each head of `x` [..., A, D], turned by its place's angle where there is one."""
    out: torch.Tensor = _Heads.apply(x, norm, angles)  # type: ignore[no-untyped-call]
    return out


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


class _Projections(torch.autograd.Function):
    """Several products of one normed input, with the heads of some turned by their place's angle."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: Norm,
        linears: tuple[Linear, ...],
        angles: Angles | None,
        turned: tuple[int, ...],
        size: int,
        *pairs: Any,
    ) -> Any:
        x_NH = _flat(x)
        normed = norm.of(x_NH)
        outs, lows = adapted.forward(normed, linears, adapted.joined_pairs(linears, pairs, x.dtype))
        del normed
        if angles is not None:
            for out, heads in zip(outs, turned, strict=True):
                if heads:
                    kernels.turn_heads(_first(out, heads, size), *angles)
        ctx.save_for_backward(x, *lows, *pairs)
        ctx.rest = norm, linears, angles, turned, size
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        norm, linears, angles, turned, size = ctx.rest
        x, *rest = ctx.saved_tensors
        lows, pairs = rest[: len(linears)], rest[len(linears) :]
        grads_NO = [_flat(grad).contiguous() for grad in grads]
        if angles is not None:
            for grad, heads in zip(grads_NO, turned, strict=True):
                if heads:
                    kernels.turn_heads_back_(_first(grad, heads, size), *angles)
        x_NH = _flat(x)
        grad_NI, found = adapted.backward(
            grads_NO, norm.of(x_NH), linears, adapted.joined_pairs(linears, pairs, x.dtype), lows, wanted=ctx.needs_input_grad[0]
        )
        grad_x = None if grad_NI is None else norm.back(grad_NI, x_NH).view(x.shape)
        return grad_x, None, None, None, None, None, *adapted.of_trained(found, pairs)


def _first(x_NO: torch.Tensor, heads: int, size: int) -> torch.Tensor:
    part: torch.Tensor = x_NO[:, : heads * size].unflatten(1, (heads, size))
    return part


class _Product(torch.autograd.Function):
    """One product, added to a residual where there is one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, linears: tuple[Linear, ...], *pairs: Any) -> torch.Tensor:
        (out,), lows = adapted.forward(
            _flat(x), linears, adapted.joined_pairs(linears, pairs, x.dtype), None if residual is None else _flat(residual)
        )
        ctx.save_for_backward(x, *lows, *pairs)
        ctx.linears, ctx.has_residual = linears, residual is not None
        product: torch.Tensor = out.view(*x.shape[:-1], -1)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, low, *pairs = ctx.saved_tensors
        adapters = adapted.joined_pairs(ctx.linears, pairs, x.dtype)
        grad_NI, found = adapted.backward([_flat(grads[0])], _flat(x), ctx.linears, adapters, [low], wanted=ctx.needs_input_grad[0])
        grad_x = None if grad_NI is None else grad_NI.view(x.shape)
        return grad_x, grads[0] if ctx.has_residual else None, None, *adapted.of_trained(found, pairs)


class _Mlp(torch.autograd.Function):
    """Norm, two products, their gate, a third product, and the residual; with `keep` the two products are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, norm: Norm, linears: tuple[Linear, ...], kind: Activation, residual: bool, keep: bool, *pairs: Any
    ) -> torch.Tensor:
        ctx.rest, kept = (norm, linears, kind, residual, keep), list[torch.Tensor | None]()
        x_NH, adapters = _flat(x), adapted.joined_pairs(linears, pairs, x.dtype)
        out = torch.empty_like(x_NH)
        # where it is computed again, nobody reads the output: what the backward pass needs is made there
        for part in () if not keep and current_pass() == Pass.AGAIN else _tiles(len(x_NH), whole=keep):
            normed = norm.of(x_NH[part])
            made, lows = adapted.forward(normed, linears[:-1], adapters[:-1])
            kept = [*made, *lows] if keep else []
            del lows, normed
            _gated_down(made, linears[-1], adapters[-1], kind, x_NH[part] if residual else None, out[part])
        ctx.save_for_backward(x, *pairs, *kept)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        norm, linears, kind, residual, keep = ctx.rest
        x, *rest = ctx.saved_tensors
        pairs, kept = rest[: 2 * len(linears)], rest[2 * len(linears) :]
        number = len(linears) - 1
        x_NH, grad_NH = _flat(x), _flat(grads[0]).contiguous()
        out, sums = torch.empty_like(x_NH), list[torch.Tensor | None]()
        for part in _tiles(len(x_NH), whole=keep):
            made = (kept[:number], kept[number:]) if keep else None
            grad_x, found = _back_through(
                x_NH[part], grad_NH[part], norm, linears, adapted.joined_pairs(linears, pairs, x.dtype), kind, made
            )
            norm.back(grad_x, x_NH[part], grad_NH[part] if residual else None, out[part])
            trained = adapted.of_trained(found, pairs)
            sums = trained if not sums else [None if a is None or b is None else a.add_(b) for a, b in zip(sums, trained, strict=True)]
            del grad_x, found, trained
        return out.view(x.shape), None, None, None, None, None, *sums


def _gated_down(
    made: list[torch.Tensor],
    down: Linear,
    adapter: Adapter | None,
    kind: Activation,
    residual_NH: torch.Tensor | None,
    out_NH: torch.Tensor,
) -> None:
    """Write the third product, of the gated two, which are let go of as soon as they were read."""
    gate, up = _halves(made)
    inner = kernels.gated(gate, up, kind)
    del gate, up
    made.clear()
    low = None if adapter is None else inner @ adapter[0].t()
    adapted.product(inner, down, adapter, low, residual_NH, out_NH)


def _back_through(
    x_NH: torch.Tensor,
    grad_NH: torch.Tensor,
    norm: Norm,
    linears: Sequence[Linear],
    adapters: Sequence[Adapter | None],
    kind: Activation,
    made: Any,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return the gradient of an MLP's normed input, and those of its adapters; `made` are the two wide products, where they were kept."""
    *ups, down = linears
    *adapters, last = adapters
    normed = norm.of(x_NH)
    if made:
        wide, lows = made
    else:
        wide, lows = adapted.forward(normed, ups, adapters)
    inner = base.input_gradient(grad_NH, down.layer)
    slope = None if last is None else (grad_NH @ last[1]).mul_(down.scaling)
    if slope is not None and last is not None:
        inner.addmm_(slope, last[0])
    gate, up = _halves(wide)
    kernels.gated_backward_(inner, gate, up, kind)  # the wide ones are their own gradients now, and inner is the product that was
    of_down: list[torch.Tensor | None] = [None, None]
    if slope is not None and last is not None:
        of_down = [slope.t() @ inner, (grad_NH.t() @ (inner @ last[0].t())).mul_(down.scaling)]
    del inner
    grad_x, found = adapted.backward(wide, normed, ups, adapters, lows, wanted=True)
    assert grad_x is not None
    return grad_x, [*found, *of_down]


def _halves(ups: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = ups if len(ups) == 2 else ups[0].chunk(2, dim=1)
    return gate, up


def _tiles(tokens: int, *, whole: bool) -> Iterator[slice]:
    size = tokens if whole else TILE
    for start in range(0, tokens, size):
        yield slice(start, start + size)


class _Heads(torch.autograd.Function):
    """A norm over each head, then its place's angle."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm, angles: Angles | None) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.norm, ctx.angles = norm, angles
        if angles is None:
            return norm.of(_flat(x)).view(x.shape)
        return kernels.turn_heads(x.flatten(0, -3), *angles, norm.weight_H, norm.epsilon, norm.offset).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        norm, grad = ctx.norm, grads[0].contiguous()
        if ctx.angles is None:
            return norm.back(_flat(grad), _flat(x)).view(x.shape), None, None
        cos, sin = ctx.angles
        kernels.turn_heads_back_(grad.flatten(0, -3), cos, sin, x.flatten(0, -3), norm.weight_H, norm.epsilon, norm.offset)
        return grad, None, None


class _Normed(torch.autograd.Function):
    """A norm, added to a residual where there is one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.norm, ctx.has_residual = norm, residual is not None
        return norm.of(_flat(x), None if residual is None else _flat(residual)).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        grad_x = ctx.norm.back(_flat(grads[0]).contiguous(), _flat(x)).view(x.shape)
        return grad_x, grads[0] if ctx.has_residual else None, None
