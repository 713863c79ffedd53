"""A merged model as one GGUF file, the form that llama.cpp, Ollama and LM Studio run.

GGUF holds names and numbers and no rules: how a family turns its positions, scales its norms or cuts its text is
built into llama.cpp, by name. So a family is written only if a test has held its file against the original in
llama.cpp itself; any other, and any setting that the file cannot say, is refused with its name.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.engine.errors import ConfigError, ModelError, SpaceError
from qlora_tui.engine.places import sync_folder
from qlora_tui.engine.text import one_line

KINDS = ("f16", "q8_0")
"""How weights are stored: 16 bits a weight, or 8.5 bits. Norms, biases and other vectors are 32 bits in both."""

Note = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Family:
    """What llama.cpp takes for granted of a model type: the name of its graph, its activation, the form of its weights."""

    graph: str
    activation: str = "silu"
    paired: bool = False  # query and key rows lie in pairs that turn together, not in two halves
    norms_from_one: bool = False  # norms are stored as they are used; this type keeps their distance from one
    windowed: bool = False  # five layers of six see a window


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", paired=True),
    "mistral": Family("llama", paired=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma3_text": Family("gemma3", activation="gelu_pytorch_tanh", norms_from_one=True, windowed=True),
}
"""The model types that are written, each held against llama.cpp by a test."""

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
_WINDOW_PERIOD = 6


def supported(config: Mapping[str, object]) -> str:
    """Return an empty text if a model with this `config.json` can be written, else the sentence why not, with its name."""
    kind = one_line(config.get("model_type") or "no type", limit=40)
    try:
        facts = text_facts(config)
    except ModelError as error:
        return error.problem.message
    family = FAMILIES.get(str(facts["model_type"]))
    if family is None:
        return f"GGUF files of {kind} models are not written here, only of {', '.join(FAMILIES)}"
    fault = _fault(facts, family)
    return f"a {kind} model {fault} cannot be written as GGUF here" if fault else ""


def write(merged: Path, out: Path, kind: str, note: Note) -> int:
    """Write the 16-bit model in the folder `merged` to the file `out` and return its size in bytes.

    The file has its name only once it is whole and on disk. Memory holds one tensor, in the written form. `note` is
    called with the number of tensors done and of all; what it raises ends the writing, and nothing stays.

    Raises:
        ConfigError: `kind` is not one of `KINDS`.
        ModelError: the family, one of its settings or its tokenizer cannot be written; a weight is missing or too large.
        SpaceError: the disk is full or cannot be written.
    """
    from qlora_tui.engine.export.gguf_weights import write_model

    if kind not in KINDS:
        raise ConfigError(f"{one_line(kind, limit=40)!r} is not a kind of GGUF written here", hint=f"one of {', '.join(KINDS)}")
    config = _read_config(merged)
    fault = supported(config)
    if fault:
        raise ModelError(fault, hint="llama.cpp's own convert_hf_to_gguf.py may know it", where=one_line(merged))
    facts = text_facts(config)
    with published(out) as partial:
        write_model(merged, partial, out.stem, FAMILIES[str(facts["model_type"])], facts, kind, note)
    return out.stat().st_size


def text_facts(config: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings of the text model, with what transformers takes for granted where `config.json` is silent.

    Raises:
        ModelError: transformers does not know the type, or refuses the settings.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ModelError("config.json names no model_type")
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"transformers knows no models of type {one_line(kind, limit=40)!r}")
    try:
        read = CONFIG_MAPPING[kind].from_dict(dict(config))
        facts: dict[str, Any] = read.get_text_config().to_dict()
    except Exception as error:  # noqa: BLE001  (each type checks its settings in its own way)
        raise ModelError(f"its config.json cannot be read ({one_line(error, limit=200)})") from None
    facts["tie_word_embeddings"] = read.to_dict()["tie_word_embeddings"]  # a model that also sees says it once for both parts
    facts["head_dim"] = facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"] if "hidden_size" in facts else 0
    return facts


def rope(facts: Mapping[str, Any], layers: str = "full_attention") -> Mapping[str, Any]:
    """Return how positions are turned in one kind of `layers`, where a model has several."""
    found: Mapping[str, Any] = facts.get("rope_parameters") or {}
    return found.get(layers, found) if any(isinstance(value, Mapping) for value in found.values()) else found


def _fault(facts: Mapping[str, Any], family: Family) -> str:
    """Return what of a supported type the file could not say."""
    activation = facts.get("hidden_act") or facts.get("hidden_activation")
    turning = rope(facts)
    if facts.get("quantization_config"):
        return "with quantized weights"
    if activation != family.activation:
        return f"with the activation {one_line(activation, limit=40)}"
    if turning.get("rope_type", "default") not in ROPE_KINDS:
        return f"with positions of the kind {one_line(turning.get('rope_type'), limit=40)}"
    if turning.get("rope_type") == "llama3" and family.graph != "llama":
        return "with positions of the kind llama3"
    if turning.get("partial_rotary_factor", 1.0) != 1.0:
        return "that turns only a part of each head"
    if facts["model_type"] == "qwen2" and facts["head_dim"] * facts["num_attention_heads"] != facts["hidden_size"]:
        return "whose heads are not as wide as its hidden states"
    if facts["model_type"] == "qwen3" and facts.get("attention_bias"):
        return "with biases in its attention"
    return _window_fault(facts) if family.windowed else ""


def _window_fault(facts: Mapping[str, Any]) -> str:
    """Return what of a Gemma 3 differs from the published sizes, which llama.cpp has built in."""
    layers = facts["num_hidden_layers"]
    usual = ["full_attention" if (layer + 1) % _WINDOW_PERIOD == 0 else "sliding_attention" for layer in range(layers)]
    if facts.get("layer_types") != usual:
        return "whose layers do not see a window in five of six"
    if facts.get("attn_logit_softcapping") or facts.get("use_bidirectional_attention"):
        return "with capped or two-way attention"
    if rope(facts, "sliding_attention").get("rope_type", "default") != "default":
        return "with scaled positions inside the window"
    scalar = facts["hidden_size"] // facts["num_attention_heads"] if layers == _GEMMA3_27B else facts["head_dim"]
    return "" if facts["query_pre_attn_scalar"] == scalar else "with an attention scale of its own"


_GEMMA3_27B = 62
"""Layers of the one size that scales attention by the hidden size over the heads; llama.cpp knows it by this number."""


def _read_config(merged: Path) -> dict[str, Any]:
    try:
        config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"its config.json cannot be read ({one_line(error, limit=200)})", where=one_line(merged)) from None
    if not isinstance(config, dict):
        raise ModelError("its config.json is not a table", where=one_line(merged))
    return config


@contextlib.contextmanager
def published(out: Path) -> Iterator[Path]:
    """Lend a name beside `out`; what was written there is on disk before it takes the name `out`, and else goes away."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        raise SpaceError(
            f"the GGUF file cannot be written: {error.strerror or one_line(error, limit=200)}",
            where=one_line(out),
            hint="make room or choose another folder",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
