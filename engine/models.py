"""Shapes of models, read from `config.json` alone: no weights, no torch.

A family is supported when its parameter count follows from its config by formula, and a test builds it on
torch's meta device to prove the formula. Everything that the budget and the forecast know of a model is here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.engine.errors import ConfigError, ModelError
from qlora_tui.engine.families import FAMILIES, WRAPPERS, Family, Quantization, keeps, outside_layers, read_quantization, text_part
from qlora_tui.engine.spec import DEMO_MODEL, nearest

_DEMO_ORIGINAL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_IN_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear module of a layer: its last name, and how wide its input and output are."""

    name: str
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """Weights without the bias."""
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape of a dense decoder. `linear_params` are the weights of the layers' linear modules: quantized and adapted.

    `wrapper` is the type of the model that it is the text part of. `quantized` is how the checkpoint itself is
    stored: `nf4`, `fp4`, or an empty text for plain numbers; `kept_params` of its linear weights stayed in 16 bits.
    """

    name: str
    family: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    wrapper: str = ""
    quantized: str = ""
    double_quant: bool = False
    kept_params: int = 0

    @property
    def query_size(self) -> int:
        """Width of all query heads together; not always the hidden size."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together; the values are as wide."""
        return self.num_key_value_heads * self.head_dim

    def linears(self) -> tuple[Linear, ...]:
        """Return the linear modules of one layer, in the order in which they run."""
        hidden, inner, query, keys = self.hidden_size, self.intermediate_size, self.query_size, self.key_value_size
        if self.fused:
            return (
                Linear("qkv_proj", hidden, query + 2 * keys),
                Linear("o_proj", query, hidden),
                Linear("gate_up_proj", hidden, 2 * inner),
                Linear("down_proj", inner, hidden),
            )
        return (
            Linear("q_proj", hidden, query),
            Linear("k_proj", hidden, keys),
            Linear("v_proj", hidden, keys),
            Linear("o_proj", query, hidden),
            Linear("gate_proj", hidden, inner),
            Linear("up_proj", hidden, inner),
            Linear("down_proj", inner, hidden),
        )

    def targeted(self, names: tuple[str, ...]) -> tuple[Linear, ...]:
        """Return the linear modules of one layer that `lora_target_modules` names.

        Raises:
            ConfigError: a name that this model has no linear layer for.
        """
        every = self.linears()
        if names == ("all-linear",):
            return every
        known = [linear.name for linear in every]
        for name in names:
            if name.rsplit(".", 1)[-1] not in known:
                hint = nearest(name, known) or f"it has {', '.join(known)}; all-linear takes them all"
                raise ConfigError(f"{self.name} has no linear layer {name!r}", hint=hint, where="lora_target_modules")
        wanted = {name.rsplit(".", 1)[-1] for name in names}
        return tuple(linear for linear in every if linear.name in wanted)

    @property
    def linear_params(self) -> int:
        """Weights of the linear modules of all layers; biases, norms, embeddings and head are not among them."""
        return self.num_hidden_layers * sum(linear.weights for linear in self.linears())

    @property
    def quantized_params(self) -> int:
        """Weights that are 4 bits wide on a 4-bit base: the linear modules, less those that the checkpoint keeps in 16 bits."""
        return self.linear_params - self.kept_params

    @property
    def embedding_params(self) -> int:
        """Weights of the token embedding, and of the head where it is not the same matrix."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def params(self) -> int:
        """All weights; shared ones count once."""
        return self.linear_params + self.embedding_params + self._norm_params() + self._bias_params()

    @property
    def plain_causal(self) -> bool:
        """Whether plain causal attention without a mask is right: no window that matters, no soft caps."""
        family = FAMILIES[self.family]
        small = self.sliding_window is not None and self.sliding_window < self.max_position_embeddings
        return not (family.whole_every or family.soft_caps or small)

    @property
    def sdpa(self) -> bool:
        """Whether torch's SDPA computes this family's attention; if not, attention holds all scores unless layers are fused."""
        return not FAMILIES[self.family].soft_caps

    @property
    def whole_every(self) -> int:
        """One in so many layers sees the whole row and the others a window, if there is one; 0: none does."""
        return FAMILIES[self.family].whole_every

    @property
    def fused(self) -> bool:
        """Whether query, key and value come from one linear module, and gate and up from another."""
        return FAMILIES[self.family].fused

    @property
    def norms_per_layer(self) -> int:
        """Norms over the hidden size in one layer."""
        return 2 + FAMILIES[self.family].extra_norms

    def _norm_params(self) -> int:
        size = self.norms_per_layer * self.hidden_size
        match FAMILIES[self.family].qk_norm:
            case "head":
                size += 2 * self.head_dim
            case "full":
                size += self.query_size + self.key_value_size
        return self.num_hidden_layers * size + self.hidden_size

    def _bias_params(self) -> int:
        attention = 0
        if FAMILIES[self.family].qkv_bias:
            attention = self.query_size + 2 * self.key_value_size
        elif self.attention_bias:
            attention = self.query_size + 2 * self.key_value_size + self.hidden_size
        mlp = 2 * self.intermediate_size + self.hidden_size if self.mlp_bias else 0
        return self.num_hidden_layers * (attention + mlp)


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the catalogue, with what a person must know before fetching it."""

    spec: ModelSpec
    licence: str
    gated: bool
    also: tuple[str, ...] = ()


def from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Read the shape of a model from the values of its `config.json`; of a model that also sees, its text part's.

    Raises:
        ModelError: the architecture has no formula here, the weights are quantized in a way that cannot be trained
            on, or a value is missing.
    """
    text, kind, wrapper = text_part(config, name)
    family = FAMILIES[kind]
    heads = _size(text, "num_attention_heads", name, family.defaults.get("num_attention_heads"))
    hidden = _size(text, "hidden_size", name)
    spec = ModelSpec(
        name=name,
        family=kind,
        hidden_size=hidden,
        intermediate_size=_size(text, "intermediate_size", name),
        num_hidden_layers=_size(text, "num_hidden_layers", name),
        num_attention_heads=heads,
        num_key_value_heads=_size(text, "num_key_value_heads", name, family.defaults.get("num_key_value_heads", heads)),
        head_dim=_size(text, "head_dim", name, family.default_head_dim or hidden // heads),
        vocab_size=_size(text, "vocab_size", name, family.defaults.get("vocab_size")),
        tie_word_embeddings=_flag(text, "tie_word_embeddings", family.default_tied),
        max_position_embeddings=_size(text, "max_position_embeddings", name, family.defaults.get("max_position_embeddings")),
        attention_bias=family.qkv_bias or (family.biased and _flag(text, "attention_bias", False)),
        mlp_bias=family.biased and kind in ("llama", "granite", "smollm3") and _flag(text, "mlp_bias", False),
        qk_norm=bool(family.qk_norm),
        sliding_window=_window(text, kind, family, name),
        wrapper=wrapper,
    )
    stored = read_quantization(config, name)
    return spec if stored is None else _stored(spec, stored)


def _stored(spec: ModelSpec, stored: Quantization) -> ModelSpec:
    """Return `spec` with how its checkpoint is stored.

    Raises:
        ModelError: which layers were left in 16 bits cannot be told from the names.
    """
    patterns = [pattern for pattern in stored.kept if not outside_layers(pattern)]
    if any(spec.wrapper or set(pattern) & set("*+?[](){}|\\^$") for pattern in patterns):
        raise ModelError(
            f"its weights are already quantized, and some layers were left in 16 bits by a name that is not understood ({patterns[0]!r})",
            hint="name the 16-bit original; it is quantized while loading",
            where=spec.name,
        )
    kept = 0
    for layer in range(spec.num_hidden_layers if patterns else 0):
        for linear in spec.linears():
            module = f"model.layers.{layer}.{'self_attn' if linear.name in _IN_ATTENTION else 'mlp'}.{linear.name}"
            kept += linear.weights if any(keeps(pattern, module) for pattern in patterns) else 0
    return dataclasses.replace(spec, quantized=stored.kind, double_quant=stored.double, kept_params=kept)


def from_folder(path: Path) -> ModelSpec:
    """Read the shape of the model in the folder `path`.

    Raises:
        ModelError: there is no readable `config.json`, or the model is not supported.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "no config.json in this folder", hint="name the folder that holds config.json and *.safetensors", where=str(path)
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError("config.json cannot be read", hint=f"{type(error).__name__}; fetch the model again", where=str(path)) from None
    if not isinstance(config, dict):
        raise ModelError("config.json is not a table of values", hint="fetch the model again", where=str(path))
    return from_config(config, str(path))


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Return the catalogue's models of supported families, in its order."""
    return tuple(_by_name()[_names(row)[0]] for row in _rows())


def catalogue() -> tuple[ModelSpec, ...]:
    """Return the shapes of all models of the catalogue."""
    return tuple(entry.spec for entry in entries())


def find_entry(name: str) -> Entry | None:
    """Return the catalogue's entry for a hub id, for one of its sister models, or for the demo's model."""
    if name == DEMO_MODEL:
        entry = _by_name()[_DEMO_ORIGINAL]
        return dataclasses.replace(entry, spec=dataclasses.replace(entry.spec, name=name))
    return _by_name().get(name)


def find(name: str) -> ModelSpec | None:
    """Return the shape of a model that the catalogue knows; nothing is fetched."""
    entry = find_entry(name)
    return entry.spec if entry else None


@functools.cache
def _rows() -> tuple[Mapping[str, Any], ...]:
    rows = json.loads(importlib.resources.files("qlora_tui.engine").joinpath("catalogue.json").read_text(encoding="utf-8"))
    return tuple(row for row in rows if _kinds(row)[1] in FAMILIES)


@functools.cache
def _by_name() -> Mapping[str, Entry]:
    known: dict[str, Entry] = {}
    for row in _rows():
        for name in _names(row):
            known.setdefault(name, _entry(row, name, row.get("overrides", {}).get(name, {})))
    return known


def _names(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the hub ids of a row that hold plain numbers; `stored` says that the row's own does not."""
    return tuple(row.get("also", ())) if row.get("stored") else (row["id"], *row.get("also", ()))


def _kinds(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the model type around a row's text model, or an empty text, and the text model's family."""
    family = str(row["family"])
    if not row.get("multimodal"):
        return "", "gemma3_text" if family == "gemma3" else family
    for wrapper, inside in WRAPPERS.items():
        if family in (wrapper, *inside):
            return wrapper, inside.get(family, next(iter(inside.values())))
    return "", ""


def _entry(row: Mapping[str, Any], name: str, overrides: Mapping[str, Any]) -> Entry:
    wrapper, family = _kinds(row)
    merged = {**row, **overrides, "model_type": family}
    spec = dataclasses.replace(from_config(merged, name), wrapper=wrapper)
    return Entry(spec, str(merged["license"]), bool(merged["gated"]), tuple(part for part in _names(row) if part != name))


def _size(config: Mapping[str, Any], key: str, name: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(
            f"config.json: {key} is {value!r}, not a size", hint="the file is damaged or the model is of another kind", where=name
        )
    return value


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    return default if value is None else bool(value)


def _window(config: Mapping[str, Any], kind: str, family: Family, name: str) -> int | None:
    if kind in ("llama", "granite", "olmo2", "ministral3"):
        return None
    if kind in ("qwen2", "qwen3", "smollm3") and not config.get("use_sliding_window", False):
        return None
    if "sliding_window" in config and config["sliding_window"] is None:
        return None
    return _size(config, "sliding_window", name, family.default_window) if config.get("sliding_window") or family.default_window else None
