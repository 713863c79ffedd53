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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_tui.engine.batches import Blocks
from qlora_tui.engine.compat import CACHES
from qlora_tui.engine.families import FAMILIES, Family
from qlora_tui.engine.fast import softcap
from qlora_tui.engine.fast.blocks import attend, window_of
from qlora_tui.engine.fast.gate import Activation
from qlora_tui.engine.fast.kernels import WIDEST_ROW
from qlora_tui.engine.fast.lora import ADAPTER
from qlora_tui.engine.fast.operations import Norm, added_norm, gated_mlp, normed_heads, product, projections


@dataclass(frozen=True, slots=True)
class Form:
    """What a family's layer does beyond what `families.FAMILIES` says of it."""

    offset: float = 0.0  # added to every norm's weight
    some_unturned: bool = False  # some layers give queries and keys no place
    activation: Activation = "silu"


FORMS: Mapping[str, Form] = {
    "llama": Form(),
    "mistral": Form(),
    "qwen2": Form(),
    "qwen3": Form(),
    "smollm3": Form(some_unturned=True),
    "phi3": Form(),
    "gemma2": Form(offset=1.0, activation="gelu_tanh"),
    "gemma3_text": Form(offset=1.0, activation="gelu_tanh"),
}
"""By `model_type`; every other family goes the plain way, layer by layer as transformers has it."""

_ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def why_not(model: Any) -> str:
    """Return why the layers of `model`, with its adapter on, cannot go this way; an empty text if they can."""
    config = model.config.get_text_config()
    form = FORMS.get(config.model_type)
    if form is None:
        return f"models of type {config.model_type} have no fused layers here"
    if _ACTIVATIONS.get(_activation_of(config)) != form.activation:
        return f"its activation {_activation_of(config)} has no kernel here"
    if config.attention_dropout:
        return "dropout of attention goes layer by layer"
    if config.hidden_size > WIDEST_ROW:
        return f"a hidden size of {config.hidden_size} is too wide for the norm's kernel"
    for module in model.modules():
        if isinstance(module, LoraLayer) and (
            module.lora_magnitude_vector or not isinstance(module.lora_dropout[ADAPTER], torch.nn.Identity)
        ):
            return "DoRA and dropout of adapters go layer by layer"
    return _why_not_capped(model, config) if FAMILIES[config.model_type].soft_caps else ""


def _why_not_capped(model: Any, config: Any) -> str:
    """Return why attention with capped scores cannot run for `config`; asked last, since it compiles."""
    cap = config.attn_logit_softcapping
    if not cap:
        return "capped attention without its cap has no kernel here"
    heads = config.num_attention_heads, config.num_key_value_heads
    return softcap.why_not(model.device, heads, config.head_dim, config.query_pre_attn_scalar**-0.5, cap)


def _activation_of(config: Any) -> str:
    return str(config.hidden_activation if config.model_type.startswith("gemma") else config.hidden_act)


def fuse_layers(decoder: Any) -> None:
    """Give every layer of `decoder`, and its last norm, the fused forward; before layers are told to recompute."""
    family, form = FAMILIES[decoder.config.model_type], FORMS[decoder.config.model_type]
    for layer in decoder.layers:
        layer.forward = FusedLayer(layer, family, form)  # on the instance: the class, and every other model, stays as it is
    decoder.norm.forward = _FusedNorm(decoder.norm, form)


class _FusedNorm:
    """The forward of the norm after the last layer."""

    def __init__(self, module: Any, form: Form) -> None:
        self.norm = _norm(module, form)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return added_norm(x, None, self.norm)


class FusedLayer:
    """The forward of one decoder layer."""

    def __init__(self, layer: Any, family: Family, form: Form) -> None:
        """Take the layer's modules as they are; they are looked at on every call, so switching an adapter off works as always."""
        self.layer, self.family, self.form = layer, family, form
        attention = layer.self_attn
        self.heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
        self.size = attention.head_dim
        self.cap = attention.attn_logit_softcapping if family.soft_caps else None
        self.window = window_of(attention.config, attention.layer_idx)
        self.before, self.after = _norm(layer.input_layernorm, form), _norm(layer.post_attention_layernorm, form)
        self.sandwich = family.extra_norms > 0
        if self.sandwich:
            self.inner = _norm(layer.pre_feedforward_layernorm, form)
            self.outer = _norm(layer.post_feedforward_layernorm, form)
        self.head_norms = (_norm(attention.q_norm, form), _norm(attention.k_norm, form)) if family.qk_norm == "head" else None

    def __call__(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output [B, T, H]; with a cache of earlier tokens, by the class's own forward."""
        if any(kwargs.get(name) is not None for name in CACHES):
            plain: torch.Tensor = type(self.layer).forward(self.layer, hidden_states, **kwargs)
            return plain
        mlp, kind, output = self.layer.mlp, self.form.activation, (self.layer.self_attn.o_proj,)
        ups = (mlp.gate_up_proj,) if self.family.fused else (mlp.gate_proj, mlp.up_proj)
        down = (mlp.down_proj,)
        attended, around = self._attended(hidden_states, **kwargs)
        hidden = product(attended, None if self.sandwich else around, output)
        del attended  # not held while the MLP works
        if not self.sandwich:
            return gated_mlp(hidden, self.after, ups, down, kind, residual=True)
        hidden = added_norm(hidden, around, self.after)
        return added_norm(gated_mlp(hidden, self.inner, ups, down, kind, residual=False), hidden, self.outer)

    def _attended(
        self,
        hidden: torch.Tensor,
        *,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        blocks: Blocks | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return attention's output [B, T, A * D], and what goes around it.

        Without a mask, or with one of no numbers, the layer knows what a token sees.
        """
        module, form, fused = self.layer.self_attn, self.form, self.family.fused
        linears = (module.qkv_proj,) if fused else (module.q_proj, module.k_proj, module.v_proj)
        angles = None if form.some_unturned and not module.use_rope else tuple(part.flatten(0, -2) for part in position_embeddings)
        queries, keys = self.heads
        turned: tuple[int, ...] = (queries + keys,) if fused else (queries, keys, 0)
        within = angles if self.head_norms is None else None
        *parts, around = projections(hidden, self.before, linears, within, turned, self.size)
        if fused:
            parts = parts[0].split([count * self.size for count in (queries, keys, keys)], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.size)) for part in parts)
        if self.head_norms is not None:
            query, key = (normed_heads(part, norm, angles) for part, norm in zip((query, key), self.head_norms, strict=True))
        if attention_mask is not None and not attention_mask.numel():
            attention_mask = None
        if self.cap is not None:
            return softcap.attend(query, key, value, blocks, self.window, module.scaling, self.cap, attention_mask).flatten(2), around
        if attention_mask is None and (blocks is not None or (self.window is not None and self.window < hidden.shape[1])):
            return attend(query, key, value, blocks, self.window, module.scaling).flatten(2), around
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        scores_of = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
        out, _ = scores_of(module, query, key, value, attention_mask, dropout=0.0, scaling=module.scaling)
        return out.flatten(2), around


def _norm(module: Any, form: Form) -> Norm:
    epsilon = module.eps if form.offset else module.variance_epsilon  # Gemma's norms call it by another name
    return Norm(module.weight.detach(), epsilon, form.offset)
