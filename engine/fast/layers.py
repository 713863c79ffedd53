"""A decoder layer as four autograd operations, each of which keeps the least that its backward pass can live on.

transformers' layer is some thirty small operations that each keep what they read. Here a norm is part of the products that
read it, so its output is made twice and never kept; products that share an input share its low-rank part; the residual is
added by the product before it; and the inner product of the MLP is made again in the backward pass, in place of its gradient.

Of a layer that is computed again in its backward pass anyway, the MLP keeps only its input: its first two products are made
again where their gradients are, tile by tile, so a long row needs the memory of one tile, and the third is not made again.

Only what `FORMS` names goes this way, on a card that runs the kernels; PEFT keeps parameters, names, switches and saving.

Shapes: B rows, T tokens, N = B * T, H hidden size, I inputs, O outputs, R rank, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_tui.engine.fast import kernels
from qlora_tui.engine.fast.kernels import Activation
from qlora_tui.engine.fast.lora import ADAPTER, Start, full_weight, joined
from qlora_tui.engine.fast.recompute import Pass, current_pass

TILE = 4096
"""Tokens of a recomputed layer's MLP that are in flight at once."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a family's layer is put together."""

    offset: float = 0.0  # added to every norm's weight
    sandwich: bool = False  # a norm after attention and MLP too, before the residual
    head_norm: bool = False  # queries and keys are normed, head by head
    fused: bool = False  # query, key and value are one product, gate and up another
    some_unturned: bool = False  # some layers give queries and keys no place
    activation: Activation = "silu"


FORMS: Mapping[str, Form] = {
    "llama": Form(),
    "mistral": Form(),
    "qwen2": Form(),
    "qwen3": Form(head_norm=True),
    "smollm3": Form(some_unturned=True),
    "phi3": Form(fused=True),
    "gemma3_text": Form(offset=1.0, sandwich=True, head_norm=True, activation="gelu_tanh"),
}
"""By `model_type`; every other family goes the plain way, layer by layer as transformers has it."""

_ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class Norm:
    """A frozen norm over the last dimension."""

    weight_H: torch.Tensor
    epsilon: float
    offset: float

    def of(self, x_NH: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
        """Return the norm of each row, plus `beside`."""
        return kernels.rms_norm(x_NH, self.weight_H, self.epsilon, self.offset, beside)

    def back(self, grad_NH: torch.Tensor, x_NH: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
        """Return the gradient of its input, plus `beside`."""
        return kernels.rms_norm_backward(grad_NH, x_NH, self.weight_H, self.epsilon, self.offset, beside)


@dataclass(frozen=True, slots=True)
class Linear:
    """One frozen product and what its adapter started from; A and B go beside it, since autograd has to see them."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    start: Start | None
    scaling: float


Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of each place [T, D]."""

Adapter = tuple[torch.Tensor, torch.Tensor]
"""A and B in the type of computation, with what they started from beside them."""

Pairs = Sequence[torch.Tensor | None]
"""A [R, I] and B [O, R] of each product in turn; None twice for one without an adapter."""


def why_not(model: Any) -> str:
    """Return why the layers of `model`, with its adapter on, cannot go this way; an empty text if they can."""
    config = model.config.get_text_config()
    form = FORMS.get(config.model_type)
    if form is None:
        return f"models of type {config.model_type} have no fused layers here"
    if _ACTIVATIONS.get(_activation_of(config)) != form.activation:
        return f"its activation {_activation_of(config)} has no kernel here"
    if config._attn_implementation == "eager":
        return "attention that holds its scores goes layer by layer"
    if config.hidden_size > kernels.WIDEST_ROW:
        return f"a hidden size of {config.hidden_size} is too wide for the norm's kernel"
    for module in model.modules():
        if isinstance(module, LoraLayer) and (
            module.lora_magnitude_vector or not isinstance(module.lora_dropout[ADAPTER], torch.nn.Identity)
        ):
            return "DoRA and dropout of adapters go layer by layer"
    return ""


def _activation_of(config: Any) -> str:
    return str(config.hidden_activation if config.model_type.startswith("gemma") else config.hidden_act)


def fuse_layers(decoder: Any) -> None:
    """Give every layer of `decoder`, and its last norm, the fused forward; before layers are told to recompute."""
    form = FORMS[decoder.config.model_type]
    for layer in decoder.layers:
        layer.forward = FusedLayer(layer, form)  # on the instance: the class, and every other model, stays as it is
    decoder.norm.forward = _FusedNorm(decoder.norm, form)


class _FusedNorm:
    """The forward of the norm after the last layer."""

    def __init__(self, module: Any, form: Form) -> None:
        self.norm = _norm(module, form)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Normed.apply(x, None, self.norm)  # type: ignore[no-untyped-call]  # torch leaves it bare
        return out


class FusedLayer:
    """The forward of one decoder layer."""

    def __init__(self, layer: Any, form: Form) -> None:
        """Take the layer's modules as they are; they are looked at on every call, so switching an adapter off works as always."""
        self.layer, self.form = layer, form
        attention = layer.self_attn
        self.heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
        self.size = attention.head_dim
        self.before, self.after = _norm(layer.input_layernorm, form), _norm(layer.post_attention_layernorm, form)
        if form.sandwich:
            self.inner = _norm(layer.pre_feedforward_layernorm, form)
            self.outer = _norm(layer.post_feedforward_layernorm, form)
        self.head_norms = (_norm(attention.q_norm, form), _norm(attention.k_norm, form)) if form.head_norm else None

    def __call__(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output [B, T, H]; with a cache of earlier tokens, by the class's own forward."""
        if kwargs.get("cache") is not None:
            plain: torch.Tensor = type(self.layer).forward(self.layer, hidden_states, **kwargs)
            return plain
        output, sandwich = self.layer.self_attn.o_proj, self.form.sandwich
        mlp = self.layer.mlp
        ups = (mlp.gate_up_proj,) if self.form.fused else (mlp.gate_proj, mlp.up_proj)
        down = (mlp.down_proj,)
        if sandwich:
            hidden = _added(_product(self._attended(hidden_states, **kwargs), None, (output,)), hidden_states, self.after)
            return _added(_mlp(hidden, self.inner, ups, down, self.form.activation, residual=False), hidden, self.outer)
        hidden = _product(self._attended(hidden_states, **kwargs), hidden_states, (output,))
        return _mlp(hidden, self.after, ups, down, self.form.activation, residual=True)

    def _attended(
        self, hidden: torch.Tensor, *, position_embeddings: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        module, form = self.layer.self_attn, self.form
        linears = (module.qkv_proj,) if form.fused else (module.q_proj, module.k_proj, module.v_proj)
        angles = None if form.some_unturned and not module.use_rope else tuple(part.flatten(0, -2) for part in position_embeddings)
        queries, keys = self.heads
        turned: tuple[int, ...] = (queries + keys,) if form.fused else (queries, keys, 0)
        within = angles if self.head_norms is None else None
        parts = _projections(hidden, self.before, linears, within, turned, self.size)
        if form.fused:
            parts = parts[0].split([count * self.size for count in (queries, keys, keys)], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.size)) for part in parts)
        if self.head_norms is not None:
            query, key = (_heads(part, norm, angles) for part, norm in zip((query, key), self.head_norms, strict=True))
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
        dropout = module.attention_dropout if module.training else 0.0
        out, _ = attend(module, query, key, value, attention_mask, dropout=dropout, scaling=module.scaling)
        flat: torch.Tensor = out.flatten(2)
        return flat


def _norm(module: Any, form: Form) -> Norm:
    epsilon = module.eps if form.offset else module.variance_epsilon  # Gemma's norms call it by another name
    return Norm(module.weight.detach(), epsilon, form.offset)


def _parts(modules: Sequence[Any]) -> tuple[tuple[Linear, ...], list[torch.Tensor | None]]:
    """Return the frozen side of each module, and the adapters that are on."""
    linears, pairs = list[Linear](), list[torch.Tensor | None]()
    for module in modules:
        adapted = isinstance(module, LoraLayer)
        base = module.get_base_layer() if adapted else module
        on = adapted and not module.disable_adapters
        linears.append(Linear(base.weight, base.bias, module.forward.start if on else None, module.scaling[ADAPTER] if on else 0.0))
        pairs += [module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight] if on else [None, None]
    return tuple(linears), pairs


def _projections(
    x: torch.Tensor, norm: Norm, modules: Sequence[Any], angles: Angles | None, turned: tuple[int, ...], size: int
) -> tuple[torch.Tensor, ...]:
    """Return the products of the norm of `x`, and of each the first `turned` heads turned by their place's angle."""
    linears, pairs = _parts(modules)
    outs: tuple[torch.Tensor, ...] = _Projections.apply(x, norm, linears, angles, turned, size, *pairs)  # type: ignore[no-untyped-call]
    return outs


def _product(x: torch.Tensor, residual: torch.Tensor | None, modules: Sequence[Any]) -> torch.Tensor:
    linears, pairs = _parts(modules)
    out: torch.Tensor = _Product.apply(x, residual, linears, *pairs)  # type: ignore[no-untyped-call]
    return out


def _mlp(x: torch.Tensor, norm: Norm, ups: Sequence[Any], down: Sequence[Any], kind: Activation, *, residual: bool) -> torch.Tensor:
    """Return down(activation(gate) * up) of the norm of `x`, plus `x` itself with `residual`."""
    linears, pairs = _parts((*ups, *down))
    # a norm after it reads its output, so there it is made and kept like everything else of a layer
    keep = torch.is_grad_enabled() and (not residual or current_pass() == Pass.KEEP)
    out: torch.Tensor = _Mlp.apply(x, norm, linears, kind, residual, keep, *pairs)  # type: ignore[no-untyped-call]
    return out


def _added(x: torch.Tensor, residual: torch.Tensor, norm: Norm) -> torch.Tensor:
    out: torch.Tensor = _Normed.apply(x, residual, norm)  # type: ignore[no-untyped-call]
    return out


def _heads(x: torch.Tensor, norm: Norm, angles: Angles | None) -> torch.Tensor:
    out: torch.Tensor = _Heads.apply(x, norm, angles)  # type: ignore[no-untyped-call]
    return out


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _joined(linears: Sequence[Linear], pairs: Pairs, dtype: torch.dtype) -> list[Adapter | None]:
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


def _forward(
    x_NI: torch.Tensor,
    linears: Sequence[Linear],
    adapters: Sequence[Adapter | None],
    residual_NO: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Return each product with its adapter's part, plus `residual_NO`, and what the adapters' gradients read."""
    lows = _low(x_NI, adapters)
    each = zip(linears, adapters, lows, strict=True)
    return [_widened_product(x_NI, linear, adapter, low, residual_NO) for linear, adapter, low in each], lows


def _widened_product(
    x_NI: torch.Tensor, linear: Linear, adapter: Adapter | None, low_NR: torch.Tensor | None, residual_NO: torch.Tensor | None
) -> torch.Tensor:
    """Return one product; its weight in full width is gone before the next one's is made."""
    weight_OI = full_weight(linear.weight)
    if residual_NO is None:
        out = F.linear(x_NI, weight_OI, linear.bias)
    else:
        out = torch.addmm(residual_NO, x_NI, weight_OI.t())
        out = out if linear.bias is None else out.add_(linear.bias)
    if adapter is not None and low_NR is not None:
        out.addmm_(low_NR, adapter[1].t(), alpha=linear.scaling)
    return out


def _backward(
    grads_NO: Sequence[torch.Tensor],
    x_NI: torch.Tensor,
    linears: Sequence[Linear],
    adapters: Sequence[Adapter | None],
    lows: Sequence[torch.Tensor | None],
    *,
    wanted: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Return the gradient of the products' input, if `wanted`, and those of A and B of each, as `_joined` has them."""
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
    grad_NI = grads_NO[0] @ full_weight(linears[0].weight)
    for grad_NO, linear in zip(grads_NO[1:], linears[1:], strict=True):
        grad_NI.addmm_(grad_NO, full_weight(linear.weight))
    if slope_NR is not None:
        grad_NI.addmm_(slope_NR, torch.cat([adapter[0] for adapter in adapters if adapter is not None]))
    return grad_NI, grads


def _of_trained(grads: Sequence[torch.Tensor | None], pairs: Pairs) -> list[torch.Tensor | None]:
    """Return the gradients in the adapters' own type, without those of what an adapter started from."""
    found = list[torch.Tensor | None]()
    for index, (grad, trained) in enumerate(zip(grads, pairs, strict=True)):
        if grad is None or trained is None:
            found.append(None)
        elif index % 2:
            found.append(grad[:, : trained.shape[1]].to(trained.dtype))
        else:
            found.append(grad[: len(trained)].to(trained.dtype))
    return found


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
        outs, lows = _forward(norm.of(x_NH), linears, _joined(linears, pairs, x.dtype))
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
        grad_NI, found = _backward(grads_NO, norm.of(x_NH), linears, _joined(linears, pairs, x.dtype), lows, wanted=ctx.needs_input_grad[0])
        grad_x = None if grad_NI is None else norm.back(grad_NI, x_NH).view(x.shape)
        return grad_x, None, None, None, None, None, *_of_trained(found, pairs)


def _first(x_NO: torch.Tensor, heads: int, size: int) -> torch.Tensor:
    part: torch.Tensor = x_NO[:, : heads * size].unflatten(1, (heads, size))
    return part


class _Product(torch.autograd.Function):
    """One product, added to a residual where there is one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, linears: tuple[Linear, ...], *pairs: Any) -> torch.Tensor:
        (out,), lows = _forward(_flat(x), linears, _joined(linears, pairs, x.dtype), None if residual is None else _flat(residual))
        ctx.save_for_backward(x, *lows, *pairs)
        ctx.linears, ctx.has_residual = linears, residual is not None
        product: torch.Tensor = out.view(*x.shape[:-1], -1)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, low, *pairs = ctx.saved_tensors
        adapters = _joined(ctx.linears, pairs, x.dtype)
        grad_NI, found = _backward([_flat(grads[0])], _flat(x), ctx.linears, adapters, [low], wanted=ctx.needs_input_grad[0])
        grad_x = None if grad_NI is None else grad_NI.view(x.shape)
        return grad_x, grads[0] if ctx.has_residual else None, None, *_of_trained(found, pairs)


class _Mlp(torch.autograd.Function):
    """Norm, two products, their gate, a third product, and the residual; with `keep` the two products are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, norm: Norm, linears: tuple[Linear, ...], kind: Activation, residual: bool, keep: bool, *pairs: Any
    ) -> torch.Tensor:
        ctx.rest, kept = (norm, linears, kind, residual, keep), list[torch.Tensor | None]()
        x_NH, adapters = _flat(x), _joined(linears, pairs, x.dtype)
        out = torch.empty_like(x_NH)
        # where it is computed again, nobody reads the output: what the backward pass needs is made there
        for part in () if not keep and current_pass() == Pass.AGAIN else _tiles(len(x_NH), whole=keep):
            made, lows = _forward(norm.of(x_NH[part]), linears[:-1], adapters[:-1])
            kept = [*made, *lows] if keep else []
            del lows
            out[part] = _gated_down(made, linears[-1], adapters[-1], kind, x_NH[part] if residual else None)
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
            grad_x, found = _back_through(x_NH[part], grad_NH[part], norm, linears, _joined(linears, pairs, x.dtype), kind, made)
            out[part] = norm.back(grad_x, x_NH[part], grad_NH[part] if residual else None)
            trained = _of_trained(found, pairs)
            sums = trained if not sums else [None if a is None or b is None else a.add_(b) for a, b in zip(sums, trained, strict=True)]
            del grad_x, found, trained
        return out.view(x.shape), None, None, None, None, None, *sums


def _gated_down(
    made: list[torch.Tensor], down: Linear, adapter: Adapter | None, kind: Activation, residual_NH: torch.Tensor | None
) -> torch.Tensor:
    """Return the third product of the gated two, which are let go of as soon as they were read."""
    inner = kernels.gated(*_halves(made), kind)
    made.clear()
    low = None if adapter is None else inner @ adapter[0].t()
    return _widened_product(inner, down, adapter, low, residual_NH)


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
    wide, lows = made or _forward(normed, ups, adapters)
    inner = grad_NH @ full_weight(down.weight)
    slope = None if last is None else (grad_NH @ last[1]).mul_(down.scaling)
    if slope is not None and last is not None:
        inner.addmm_(slope, last[0])
    gate, up = _halves(wide)
    kernels.gated_backward_(inner, gate, up, kind)  # the wide ones are their own gradients now, and inner is the product that was
    of_down: list[torch.Tensor | None] = [None, None]
    if slope is not None and last is not None:
        of_down = [slope.t() @ inner, (grad_NH.t() @ (inner @ last[0].t())).mul_(down.scaling)]
    del inner
    grad_x, found = _backward(wide, normed, ups, adapters, lows, wanted=True)
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
