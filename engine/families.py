"""What kinds of model can be trained here, and why another cannot: the facts that a `config.json` takes for granted.

Three questions are answered from the config alone: which family its text model is of, whether that model lies
inside a model that also sees or hears, and whether its weights are already quantized. `models` makes a shape of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.text import one_line

QkNorm = Literal["", "head", "full"]


@dataclass(frozen=True, slots=True)
class Family:
    """What a model type does that its config does not say, and what its config leaves out when it is usual."""

    qkv_bias: bool = False  # always a bias on query, key and value, none on the output
    fused: bool = False  # query, key and value are one linear module, gate and up another
    extra_norms: int = 0  # norms a layer beyond the usual two
    qk_norm: QkNorm = ""
    whole_every: int = 0  # one in so many layers sees the whole row, the others a window; 0: all are alike
    soft_caps: bool = False  # attention scores are squashed, which SDPA does not: only fused layers do without holding them
    default_window: int | None = None
    default_tied: bool = False
    default_head_dim: int | None = None
    biased: bool = True  # reads attention_bias and mlp_bias
    defaults: Mapping[str, int] = field(default_factory=dict)  # sizes that published configs leave out
    kernels: bool = False  # its layers have a fused form in `fast.layers`


_GEMMA3 = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131_072}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(kernels=True),
    "mistral": Family(default_window=4096, biased=False, kernels=True),
    "ministral3": Family(biased=False),
    "qwen2": Family(qkv_bias=True, biased=False, kernels=True),
    "qwen3": Family(qk_norm="head", default_head_dim=128, kernels=True),
    "smollm3": Family(default_tied=True, kernels=True),
    "phi3": Family(fused=True, biased=False, kernels=True),
    "gemma2": Family(
        extra_norms=2, whole_every=2, soft_caps=True, default_window=4096, default_tied=True, default_head_dim=256, kernels=True
    ),
    "gemma3_text": Family(
        extra_norms=2,
        qk_norm="head",
        whole_every=6,
        default_window=4096,
        default_tied=True,
        default_head_dim=256,
        defaults=_GEMMA3,
        kernels=True,
    ),
    "olmo2": Family(qk_norm="full"),
    "granite": Family(),
}
"""Every supported `model_type`. Adding one is a row here, a built model in the test, and nothing else."""

WRAPPERS: Mapping[str, Mapping[str, str]] = {
    "gemma3": {"gemma3_text": "gemma3_text"},
    "mistral3": {"mistral": "mistral", "ministral3": "ministral3"},
    "qwen2_vl": {"qwen2_vl_text": "qwen2"},
    "qwen2_5_vl": {"qwen2_5_vl_text": "qwen2"},
    "qwen3_vl": {"qwen3_vl_text": "qwen3"},
}
"""Models that also see, whose text part is trained alone: by type, the family of each text type that lies inside.

The parts that see are left out while loading; a test builds one of each, and the adapter's names fit the whole model.
"""

_TURNED_OTHERWISE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # places in them have three parts, for which no kernel is written
_TIED_WRAPPERS = ("gemma3", "mistral3")  # what transformers takes for granted where config.json is silent
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SIGHT = ("vision", "visual", "audio", "projector", "merger", "projection", "embed_tokens", "lm_head")  # names of parts outside the layers


@dataclass(frozen=True, slots=True)
class Quantization:
    """How bitsandbytes quantized a checkpoint; `kept` are the names of modules that were left in 16 bits."""

    kind: str
    double: bool
    kept: tuple[str, ...] = ()


def text_part(config: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], str, str]:
    """Return the config of the text model, its family, and the type of the model around it or an empty text.

    Raises:
        ModelError: the architecture has no formula here; it is named, with what may be used instead.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ModelError("config.json names no model_type", hint=_supported(), where=name)
    if kind in FAMILIES:
        return config, kind, ""
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config  # older configs of the Qwen models keep both parts in one table
    if kind in WRAPPERS:
        known = WRAPPERS[kind]
        said = str(text.get("model_type") or "") if text is not config else ""
        family = known.get(said or next(iter(known)))
        if family is not None:
            tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", kind in _TIED_WRAPPERS))
            return {**text, "tie_word_embeddings": tied}, family, kind
    raise ModelError(_refusal(config, kind, text), hint=_supported(), where=name)


def has_kernels(family: str, wrapper: str) -> bool:
    """Say whether layers of `family`, inside a model of type `wrapper` or none, have a fused form."""
    return FAMILIES[family].kernels and wrapper not in _TURNED_OTHERWISE


def read_quantization(config: Mapping[str, Any], name: str) -> Quantization | None:
    """Return how the checkpoint is quantized, or None where its weights are plain numbers.

    Raises:
        ModelError: by another method than bitsandbytes in 4 bits; the method is named.
    """
    said = config.get("quantization_config") or config.get("compression_config")
    if not said:
        return None
    table = said if isinstance(said, Mapping) else {}
    method = one_line(table.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in table else "a method it does not name"), limit=40)
    if method == "bitsandbytes" and table.get("load_in_4bit"):
        kind = table.get("bnb_4bit_quant_type", "fp4")
        if kind in ("nf4", "fp4"):
            kept = table.get("llm_int8_skip_modules") or ()
            return Quantization(str(kind), bool(table.get("bnb_4bit_use_double_quant")), tuple(str(part) for part in kept))
        method = f"bitsandbytes as {one_line(kind, limit=20)}"
    elif method == "bitsandbytes":
        method = "bitsandbytes in 8 bits"
    raise ModelError(
        f"its weights are already quantized by {method}, and only bitsandbytes in 4 bits can be trained on",
        hint="name the 16-bit original; it is quantized while loading",
        where=name,
    )


def keeps(pattern: str, module: str) -> bool:
    """Say whether a name in a checkpoint's list of modules left in 16 bits means `module`, by the loader's rules.

    A name means the module it starts, up to a dot, or the one it ends.
    """
    whole = module == pattern or module.startswith(pattern if pattern.endswith(".") else f"{pattern}.")
    return whole or module.endswith(pattern)


def outside_layers(pattern: str) -> bool:
    """Say whether a name in that list can only mean something that is no layer of the text model."""
    return any(part in pattern for part in _SIGHT)


def _refusal(config: Mapping[str, Any], kind: str, text: Mapping[str, Any]) -> str:
    """Return why an architecture cannot be trained here; the type and the class are named, nothing is guessed."""
    classes = config.get("architectures")
    shown = f"{one_line(kind, limit=40)!r}"
    if isinstance(classes, (list, tuple)) and classes:
        shown += f" ({one_line(classes[0], limit=60)})"
    if any(isinstance(number := part.get(key), int) and number > 1 for part in (config, text) for key in _EXPERTS):
        return f"models of type {shown} are not supported: they are mixtures of experts"
    if text is not config:
        inner = one_line(text.get("model_type") or "no name", limit=40)
        return f"models of type {shown} are not supported: their text part, of type {inner!r}, has no formula here"
    return f"models of type {shown} are not supported"


def _supported() -> str:
    return f"supported: {', '.join(FAMILIES)}, and the text part of {', '.join(WRAPPERS)}"
