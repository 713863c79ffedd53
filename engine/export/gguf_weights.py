"""The numbers of a GGUF file: a model's weights by llama.cpp's names, and the sizes that say how they fit together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
    quantize,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qlora_tui.engine.data import load_tokenizer
from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.export.gguf import Family, rope
from qlora_tui.engine.export.gguf_vocabulary import add_vocabulary
from qlora_tui.engine.text import one_line

_STORED = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}
_FILE_KINDS = {"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
_LARGEST = {GGMLQuantizationType.F32: math.inf, GGMLQuantizationType.F16: 65504.0, GGMLQuantizationType.Q8_0: 127 * 65504.0}
"""The largest weight of each form; the scale of 8-bit blocks is a 16-bit float."""
_PIECE = 1 << 22
"""Weights converted at once: 16 MB of floats, whatever the size of the tensor."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file: its name there, its shape and form, and how to make its bytes."""

    name: str
    shape: tuple[int, ...]
    form: GGMLQuantizationType
    make: Callable[[], np.ndarray[Any, Any]]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        block, width = GGML_QUANT_SIZES[self.form]
        return math.prod(self.shape) // int(block) * int(width)


def write_model(
    merged: Path, path: Path, name: str, family: Family, facts: Mapping[str, Any], kind: str, note: Callable[[int, int], None]
) -> None:
    """Write settings, vocabulary and weights to `path`; what is raised is said in `gguf.write`."""
    tokenizer = load_tokenizer(merged)
    writer = GGUFWriter(path, family.graph)
    with ExitStack() as files:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(_FILE_KINDS[kind])
        writer.add_quantization_version(2)
        _add_sizes(writer, family, facts)
        add_vocabulary(writer, tokenizer, facts)
        tensors = [*_rope_factors(facts), *_weights(merged, family, facts, _STORED[kind], files)]
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=tensor.form)
        files.callback(writer.close)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors, start=1):
            writer.write_tensor_data(tensor.make())
            note(done, len(tensors))


def _add_sizes(writer: GGUFWriter, family: Family, facts: Mapping[str, Any]) -> None:
    """Write the numbers that llama.cpp builds the graph from."""
    writer.add_vocab_size(facts["vocab_size"])
    writer.add_context_length(_context(family, facts))
    writer.add_embedding_length(facts["hidden_size"])
    writer.add_block_count(facts["num_hidden_layers"])
    writer.add_feed_forward_length(facts["intermediate_size"])
    writer.add_head_count(facts["num_attention_heads"])
    writer.add_head_count_kv(facts["num_key_value_heads"])
    writer.add_key_length(facts["head_dim"])
    writer.add_value_length(facts["head_dim"])
    writer.add_rope_dimension_count(facts["head_dim"])
    writer.add_layer_norm_rms_eps(facts["rms_norm_eps"])
    turning = rope(facts)
    writer.add_rope_freq_base(turning["rope_theta"])
    if family.windowed:
        writer.add_sliding_window(facts["sliding_window"])
        writer.add_rope_freq_base_swa(rope(facts, "sliding_attention")["rope_theta"])
        if facts.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(facts["final_logit_softcapping"])
    _add_scaling(writer, turning, facts)


def _context(family: Family, facts: Mapping[str, Any]) -> int:
    """Return the longest text in tokens; where llama.cpp knows no window, no more than the window, which is then never felt."""
    longest = int(facts["max_position_embeddings"])
    window = facts.get("sliding_window")
    sliding = "sliding_attention" in (facts.get("layer_types") or ()) or facts["model_type"] == "mistral"
    return min(longest, int(window)) if window and sliding and not family.windowed else longest


def _add_scaling(writer: GGUFWriter, turning: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    kind = turning.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(turning["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(turning["factor"])
        writer.add_rope_scaling_orig_ctx_len(turning.get("original_max_position_embeddings") or facts["max_position_embeddings"])


def _rope_factors(facts: Mapping[str, Any]) -> Iterator[Tensor]:
    """Give llama3's stretching of slow frequencies as the tensor that llama.cpp divides by, from the rule training used."""
    turning = rope(facts)
    if turning.get("rope_type") != "llama3":
        return
    config = CONFIG_MAPPING[facts["model_type"]].from_dict(dict(facts))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    half = int(facts["head_dim"]) // 2
    plain = float(turning["rope_theta"]) ** -(torch.arange(half, dtype=torch.float32) / half)
    factors = (plain / scaled).numpy()
    yield Tensor("rope_freqs.weight", (half,), GGMLQuantizationType.F32, lambda: factors)


def _weights(merged: Path, family: Family, facts: Mapping[str, Any], stored: GGMLQuantizationType, files: ExitStack) -> Iterator[Tensor]:
    """Give every weight of the model in its order; all are looked for before the first is converted.

    Raises:
        ModelError: a weight is missing or of another shape, or a file cannot be read.
    """
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.graph)
    names = get_tensor_name_map(arch, facts["num_hidden_layers"])
    found = _sources(merged, files)
    for name, shape in _expected(facts).items():
        if name not in found:
            raise ModelError(f"the weight {name} is missing", where=one_line(merged))
        source, key = found[name]
        there = tuple(source.get_slice(key).get_shape())
        if there != shape:
            raise ModelError(f"the weight {name} has the shape {there}, not {shape}", where=one_line(merged))
        title = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if title is None:
            raise ModelError(f"llama.cpp has no name for the weight {name}", where=one_line(merged))
        yield _tensor(title, name, shape, source, key, family, facts, stored)


def _expected(facts: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the model's weights; a shared one stands once, a name only where it is used."""
    config = CONFIG_MAPPING[facts["model_type"]].from_dict(dict(facts))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def _sources(merged: Path, files: ExitStack) -> dict[str, tuple[Any, str]]:
    """Return the open file and the key of every weight, by its name in a model of text alone."""
    found: dict[str, tuple[Any, str]] = {}
    for path in sorted(merged.glob("*.safetensors")):
        try:
            file: Any = files.enter_context(safe_open(str(path), framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"its weights cannot be read ({one_line(error, limit=200)})", where=one_line(path)) from None
        found.update({_text_name(key): (file, key) for key in file.keys()})  # noqa: SIM118  (an open file is no dictionary)
    return found


def _text_name(key: str) -> str:
    """Return a weight's name without the model around the text part: both orders of the two words are in use."""
    return key.replace("language_model.model.", "model.").replace("model.language_model.", "model.").removeprefix("language_model.")


def _tensor(
    title: str,
    name: str,
    shape: tuple[int, ...],
    source: Any,
    key: str,
    family: Family,
    facts: Mapping[str, Any],
    stored: GGMLQuantizationType,
) -> Tensor:
    heads = {"q_proj": facts["num_attention_heads"], "k_proj": facts["num_key_value_heads"]}.get(name.split(".")[-2], 0)
    order = _paired_rows(shape[0], heads) if family.paired and heads else None
    form, shift = stored, 0.0
    if len(shape) == 1:
        form = GGMLQuantizationType.F32
        shift = 1.0 if family.norms_from_one and name.endswith("norm.weight") else 0.0
    elif shape[-1] % GGML_QUANT_SIZES[stored][0]:
        form = GGMLQuantizationType.F16  # a row that is no whole number of 8-bit blocks
    return Tensor(title, shape, form, lambda: _converted(source.get_slice(key), shape, form, order, shift, name))


def _paired_rows(rows: int, heads: int) -> np.ndarray[Any, Any]:
    """Return which row goes where: transformers turns row i with row i + half of a head, llama.cpp with the next one."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def _converted(
    weight: Any, shape: Sequence[int], form: GGMLQuantizationType, order: np.ndarray[Any, Any] | None, shift: float, name: str
) -> np.ndarray[Any, Any]:
    """Return the bytes of one weight, row by row; a few rows at a time are floats.

    Raises:
        ModelError: a number is not finite, or larger than the form can hold.
    """
    block, width = GGML_QUANT_SIZES[form]
    columns = shape[-1] if len(shape) > 1 else 1
    out = np.empty((shape[0], columns // block * width), np.uint8)
    step = max(1, _PIECE // columns)
    for start in range(0, shape[0], step):
        values = weight[start : start + step].float().numpy().reshape(-1, columns) + np.float32(shift)
        largest = np.abs(values).max()
        if not largest <= _LARGEST[form] or not np.isfinite(largest):
            raise ModelError(f"the weight {name} holds {largest:g}, which {form.name} cannot", hint="the run may have diverged")
        out[start : start + step] = quantize(values, form).view(np.uint8).reshape(len(values), -1)
    return out if order is None else out[order]
