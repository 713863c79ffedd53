"""The autograd operations that a fused layer is made of, each with the backward pass written out.

Shapes: N tokens, H hidden size, I inputs, O outputs, R rank, A heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_tui.engine.fast import adapted, base, gate, kernels
from qlora_tui.engine.fast.adapted import Adapters, Linear, Scale
from qlora_tui.engine.fast.gate import Activation
from qlora_tui.engine.fast.lora import Part
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

    def rated(self, x_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norm of each row, and the rates of all [N] that it takes to do without it later."""
        rates_N = torch.empty(len(x_NH), dtype=torch.float32, device=x_NH.device)
        return kernels.rms_norm(x_NH, self.weight_H, self.epsilon, self.offset, rates_N=rates_N), rates_N

    def scale(self, rates_N: torch.Tensor) -> Scale:
        """Return what the norm multiplied its input by."""
        return rates_N, self.weight_H.float() + self.offset if self.offset else self.weight_H

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
    """Return the products of the norm of `x`, of each the first `turned` heads turned by their place's angle, and `x` itself.

    Whoever adds `x` to something later takes it from here: so its gradient comes back to this operation, which adds it on the way.
    """
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
        normed, rates = norm.rated(x_NH)
        outs, low = adapted.forward(normed, Adapters(linears, pairs, x.dtype))
        del normed
        if angles is not None:
            for out, heads in zip(outs, turned, strict=True):
                if heads:
                    kernels.turn_heads(_first(out, heads, size), *angles)
        ctx.save_for_backward(x, low, rates, *pairs)
        ctx.rest, ctx.leaves = (norm, linears, angles, turned, size), pairs
        return *(out.view(*x.shape[:-1], -1) for out in outs), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        norm, linears, angles, turned, size = ctx.rest
        x, low, rates, *pairs = ctx.saved_tensors
        *of_products, around = grads
        grads_NO = [_flat(grad).contiguous() for grad in of_products]
        if angles is not None:
            for grad, heads in zip(grads_NO, turned, strict=True):
                if heads:
                    kernels.turn_heads_back_(_first(grad, heads, size), *angles)
        x_NH, adapters = _flat(x), Adapters(linears, pairs, x.dtype)
        grad_NI, found = adapted.backward(grads_NO, x_NH, adapters, low, wanted=ctx.needs_input_grad[0], scale=norm.scale(rates))
        grad_x = None if grad_NI is None else norm.back(grad_NI, x_NH, _flat(around).contiguous()).view(x.shape)
        return grad_x, None, None, None, None, None, *adapters.trained(found, ctx.leaves)


def _first(x_NO: torch.Tensor, heads: int, size: int) -> torch.Tensor:
    part: torch.Tensor = x_NO[:, : heads * size].unflatten(1, (heads, size))
    return part


class _Product(torch.autograd.Function):
    """One product, added to a residual where there is one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, linears: tuple[Linear, ...], *pairs: Any) -> torch.Tensor:
        (out,), low = adapted.forward(_flat(x), Adapters(linears, pairs, x.dtype), None if residual is None else _flat(residual))
        ctx.save_for_backward(x, low, *pairs)
        ctx.linears, ctx.has_residual, ctx.leaves = linears, residual is not None, pairs
        product: torch.Tensor = out.view(*x.shape[:-1], -1)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, low, *pairs = ctx.saved_tensors
        adapters = Adapters(ctx.linears, pairs, x.dtype)
        grad_NI, found = adapted.backward([_flat(grads[0])], _flat(x), adapters, low, wanted=ctx.needs_input_grad[0])
        grad_x = None if grad_NI is None else grad_NI.view(x.shape)
        return grad_x, grads[0] if ctx.has_residual else None, None, *adapters.trained(found, ctx.leaves)


class _Mlp(torch.autograd.Function):
    """Norm, two products, their gate, a third product, and the residual; with `keep` the two products are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, norm: Norm, linears: tuple[Linear, ...], kind: Activation, residual: bool, keep: bool, *pairs: Any
    ) -> torch.Tensor:
        ctx.rest, ctx.leaves, kept = (norm, linears, kind, residual, keep), pairs, list[torch.Tensor | None]()
        x_NH, (ups, down) = _flat(x), _up_and_down(linears, pairs, x.dtype)
        out = torch.empty_like(x_NH)
        # where it is computed again, nobody reads the output: what the backward pass needs is made there
        for part in () if not keep and current_pass() == Pass.AGAIN else _tiles(len(x_NH), whole=keep):
            normed, rates = norm.rated(x_NH[part])
            made, low = adapted.forward(normed, ups, added=not _gate_adds(ups, down))
            kept = [*made, rates, low] if keep else []
            del normed, rates
            inner = gate.gated(*_halves(made), kind, _halves_of_parts(ups, down, low))
            made.clear()  # let go of as soon as they were read
            _, low = adapted.forward(inner, down, x_NH[part] if residual else None, out[part])
            kept += [low] if keep else []
            del low, inner
        ctx.save_for_backward(x, *pairs, *kept)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        norm, linears, kind, residual, keep = ctx.rest
        x, *rest = ctx.saved_tensors
        pairs, kept = rest[: 2 * len(linears)], rest[2 * len(linears) :]
        x_NH, grad_NH = _flat(x), _flat(grads[0]).contiguous()
        out, sums = torch.empty_like(x_NH), list[torch.Tensor | None]()
        ups, down = _up_and_down(linears, pairs, x.dtype)
        for part in _tiles(len(x_NH), whole=keep):
            made = (list(kept[:-3]), *kept[-3:]) if keep else None
            grad_x, found = _back_through(x_NH[part], grad_NH[part], norm, ups, down, kind, made)
            norm.back(grad_x, x_NH[part], grad_NH[part] if residual else None, out[part])
            sums = found if keep or len(x_NH) <= TILE else _summed(sums, found, (ups, down))
            del grad_x, found
        of_ups, of_down = ups.trained(sums[0], ctx.leaves[:-2]), down.trained(sums[1], ctx.leaves[-2:])
        return out.view(x.shape), None, None, None, None, None, *of_ups, *of_down


def _up_and_down(linears: Sequence[Linear], pairs: Sequence[Any], dtype: torch.dtype) -> tuple[Adapters, Adapters]:
    """Return the adapters of an MLP's first products, which share their input, and of its last."""
    return Adapters(linears[:-1], pairs[:-2], dtype), Adapters(linears[-1:], pairs[-2:], dtype)


def _gate_adds(ups: Adapters, down: Adapters) -> bool:
    """Say whether the gate's kernels add the adapters' parts as they read the products, which saves writing and reading those again."""
    return max(*ups.ranks, *down.ranks) <= gate.WIDEST_RANK


def _halves_of_parts(ups: Adapters, down: Adapters, low_NR: torch.Tensor | None) -> tuple[Part | None, Part | None]:
    """Return what the gate's kernels add to gate and to up."""
    parts = ups.parts(low_NR) if _gate_adds(ups, down) else [None] * len(ups.linears)
    if len(parts) == 2:
        return parts[0], parts[1]
    (part,) = parts
    if part is None:
        return None, None
    half = len(part.b_OR) // 2
    return part.outputs(slice(half)), part.outputs(slice(half, None))


def _summed(
    sums: list[torch.Tensor | None], found: Sequence[torch.Tensor | None], adapters: Sequence[Adapters]
) -> list[torch.Tensor | None]:
    """Return the gradients of one more tile added to those before, in the adapters' own type."""
    if not sums:
        return [None if grad is None else one.in_own_type(grad) for grad, one in zip(found, adapters, strict=True)]
    return [None if total is None or grad is None else total.add_(grad) for total, grad in zip(sums, found, strict=True)]


def _back_through(
    x_NH: torch.Tensor, grad_NH: torch.Tensor, norm: Norm, ups: Adapters, down: Adapters, kind: Activation, made: Any
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return the gradient of an MLP's normed input, and those of its adapters.

    `made` are the two wide products, the norm's rates, and what adapters made of its input and of the gated product, where they were
    kept. Where they were not, the norm is made for the products, and read again.
    """
    adds = _gate_adds(ups, down)
    if made:
        wide, rates, low, low_down = made
        source, scale = x_NH, norm.scale(rates)
    else:
        source, scale = norm.of(x_NH), None
        (wide, low), low_down = adapted.forward(source, ups, added=not adds), None
    inner = base.input_gradient(grad_NH, down.linears[0].layer)
    slope = down.slopes([grad_NH])
    if slope is not None and not adds:
        inner.addmm_(slope, down.stacked)
    beside = (slope, down.stacked) if slope is not None and adds else None
    halves = _halves_of_parts(ups, down, low)
    # the wide ones are their own gradients then, and inner is the product that was, where it is read: its low-rank one was not kept
    of_b, of_a = gate.gated_backward_(inner, *_halves(wide), kind, halves, beside, product=not made)
    of_down = down.gradients(slope, [grad_NH], inner, low_down if made else down.low(inner), of_a=of_a)
    del inner, of_a
    grad_x, found = adapted.backward(wide, source, ups, low, wanted=True, scale=scale, of_b=of_b)
    assert grad_x is not None
    return grad_x, [found, of_down]


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
