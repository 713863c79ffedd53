"""GGUF files as other readers see them: the gguf library, transformers' own loader, and our reader of headers."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_families as families
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration, LlamaConfig, Mistral3ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qlora_tui.engine.data import load_tokenizer
from qlora_tui.engine.errors import ConfigError, ModelError, SpaceError, Stopped
from qlora_tui.engine.export import gguf, gguf_weights
from qlora_tui.engine.export.gguf_check import faults, settings

CASES = list(families.CASES)


def silent(_done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("merged")

    def build(name: str) -> Path:
        folder = home / name
        return folder if folder.exists() else families.build(families.CASES[name], folder)

    return build


@pytest.fixture
def small(merged: Callable[[str], Path], tmp_path: Path) -> Path:
    """A merged folder that a test may damage."""
    folder = tmp_path / "small"
    folder.mkdir()
    for path in merged("smollm").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write(folder: Path, out: Path, kind: str = "f16") -> Path:
    size = gguf.write(folder, out, kind, silent)
    assert size == out.stat().st_size > 0
    assert [path.name for path in out.parent.iterdir() if path.is_file()] == [out.name]
    return out


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_same_model_from_the_file(name: str, merged: Callable[[str], Path], tmp_path: Path) -> None:
    folder = merged(name)
    out = write(folder, tmp_path / "out" / "m.gguf")
    rows = families.rows_of(folder)
    config: Any = AutoConfig.from_pretrained(folder)  # the file holds no scaling that this reader knows
    if config.model_type == "mistral":  # which this reader has no name for; within the window it is a llama
        config = LlamaConfig.from_dict({**config.to_dict(), "model_type": "llama"})
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, config=config, dtype=torch.float32)
    before, after = families.losses(original, rows), families.losses(again, rows)
    assert after == pytest.approx(before, abs=2e-3)


@pytest.mark.parametrize("name", CASES)
def test_the_file_says_what_the_model_is(name: str, merged: Callable[[str], Path], tmp_path: Path) -> None:
    case, folder = families.CASES[name], merged(name)
    out = write(folder, tmp_path / "m.gguf")
    config, tokenizer = json.loads((folder / "config.json").read_text()), load_tokenizer(folder)
    fields = {key: field.contents() for key, field in GGUFReader(str(out)).fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == config["vocab_size"]
    assert fields["tokenizer.ggml.token_type"].count(TokenType.UNUSED) == 5
    assert fields["tokenizer.ggml.pre"] == case.pre
    assert fields["tokenizer.chat_template"] == case.chat.template
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == case.chat.eos
    assert fields["tokenizer.ggml.add_bos_token"] == bool(case.chat.bos)
    stop = next((token for token in ("<end_of_turn>", "<|eot_id|>", "<|im_end|>") if token in tokens), "</s>")
    assert tokens[fields["tokenizer.ggml.eot_token_id"]] == stop
    assert faults(out, tokenizer) == []


def test_a_window_that_llama_cpp_does_not_know_bounds_the_context(merged: Callable[[str], Path], tmp_path: Path) -> None:
    assert settings(write(merged("mistral"), tmp_path / "m" / "m.gguf"))["llama.context_length"] == 300
    assert settings(write(merged("tekken"), tmp_path / "t" / "t.gguf"))["llama.context_length"] == 512
    assert settings(write(merged("gemma3"), tmp_path / "g" / "g.gguf"))["gemma3.attention.sliding_window"] == 24


def test_8_bits_hold_every_weight_to_half_a_step_and_vectors_exactly(merged: Callable[[str], Path], tmp_path: Path) -> None:
    folder = merged("qwen3")
    reader = GGUFReader(str(write(folder, tmp_path / "m.gguf", "q8_0")))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = load_file(folder / "model.safetensors")
    norm = tensors["output_norm.weight"]
    assert norm.tensor_type == GGMLQuantizationType.F32
    assert np.array_equal(norm.data, weights["model.norm.weight"].float().numpy())
    stored = tensors["blk.0.ffn_down.weight"]
    assert stored.tensor_type == GGMLQuantizationType.Q8_0
    blocks = stored.data.reshape(-1, 34)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    values = blocks[:, 2:].copy().view(np.int8) * scales
    off = np.abs(values - weights["model.layers.0.mlp.down_proj.weight"].float().numpy().reshape(-1, 32))
    assert (off <= scales * (0.5 + 127 * 2**-11) + 1e-7).all()  # the scale itself is rounded to 11 bits


def test_rows_that_are_no_whole_blocks_stay_at_16_bits(tmp_path: Path) -> None:
    case = families.CASES["smollm"]
    odd = families.Case({**case.settings, "intermediate_size": 80}, case.tokenizer, case.chat, case.pre)
    out = write(families.build(odd, tmp_path / "odd"), tmp_path / "out" / "m.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(str(out)).tensors}
    assert kinds["blk.0.ffn_down.weight"] == GGMLQuantizationType.F16
    assert kinds["blk.0.ffn_up.weight"] == GGMLQuantizationType.Q8_0


def test_tied_embeddings_are_stored_once(merged: Callable[[str], Path], tmp_path: Path) -> None:
    names = {name: {tensor.name for tensor in GGUFReader(str(write(merged(name), tmp_path / name / "m.gguf"))).tensors} for name in CASES}
    assert {name for name in CASES if "output.weight" not in names[name]} == {"smollm", "qwen3", "gemma3"}
    assert {name for name in CASES if "rope_freqs.weight" in names[name]} == {"llama"}


def sighted(kind: str) -> Any:
    """Return a tiny model that also sees, around a small text model."""
    tokens = families.CASES["gemma3" if kind == "gemma3" else "tekken"].tokenizer().get_vocab_size()
    text = {**families.SIZES, "vocab_size": tokens, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    if kind == "gemma3":
        text |= {"num_hidden_layers": 2, "query_pre_attn_scalar": 32, "model_type": "gemma3_text"}
        return Gemma3ForConditionalGeneration(
            CONFIG_MAPPING[kind].from_dict({"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4})
        )
    text |= {"model_type": "mistral"}
    vision |= {"head_dim": 8, "model_type": "pixtral"}
    return Mistral3ForConditionalGeneration(CONFIG_MAPPING[kind].from_dict({"text_config": text, "vision_config": vision}))


@pytest.mark.parametrize(("kind", "case"), [("gemma3", "gemma3"), ("mistral3", "tekken")])
def test_of_a_model_that_also_sees_the_text_part_is_written(kind: str, case: str, merged: Callable[[str], Path], tmp_path: Path) -> None:
    model = sighted(kind).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "whole" / name).write_bytes((merged(case) / name).read_bytes())
    assert gguf.supported(json.loads((tmp_path / "whole" / "config.json").read_text())) == ""
    out = write(tmp_path / "whole", tmp_path / "out" / "m.gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(str(out)).tensors}
    assert not [name for name in tensors if "vis" in name or "mm" in name]
    ours = model.model.language_model.embed_tokens.weight.detach().to(torch.float16).numpy()
    assert np.array_equal(tensors["token_embd.weight"].data, ours)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"model_type": "phi3"}, "phi3"),
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": "no_such"}, "no_such"),
        ({}, "no model_type"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "gelu"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"model_type": "qwen3", "rope_scaling": families._LLAMA3_ROPE, "max_position_embeddings": 512}, "llama3"),
        ({"model_type": "qwen3", "attention_bias": True}, "biases"),
        ({"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}, "heads"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized"),
        ({"model_type": "gemma3_text", "num_hidden_layers": 6, "layer_types": ["full_attention"] * 6}, "window"),
        ({"model_type": "gemma3_text", "query_pre_attn_scalar": 168}, "scale"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "capped"),
    ],
)
def test_what_the_file_cannot_say_is_refused_by_name(config: dict[str, object], word: str) -> None:
    assert word in gguf.supported(config)


@pytest.mark.parametrize("scalar", [168, 256])
def test_the_largest_gemma_scales_attention_in_its_own_way(scalar: int) -> None:
    config = {"model_type": "gemma3_text", "num_hidden_layers": 62, "hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128}
    assert (gguf.supported({**config, "query_pre_attn_scalar": scalar}) == "") == (scalar == 168)


def test_the_published_shapes_are_supported() -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    published = (
        {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": llama3, "max_position_embeddings": 131072},
        {"model_type": "mistral", "head_dim": 128, "hidden_size": 5120, "sliding_window": None},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072},
        {"model_type": "qwen3", "head_dim": 128, "hidden_size": 2560},
        {"model_type": "gemma3_text", "num_hidden_layers": 26, "hidden_size": 1152, "query_pre_attn_scalar": 256, "sliding_window": 512},
    )
    assert [gguf.supported(config) for config in published] == [""] * len(published)


def test_an_unknown_kind_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="q4_k_m"):
        gguf.write(tmp_path / "nowhere", tmp_path / "m.gguf", "q4_k_m", silent)


def damaged(small: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(small / "model.safetensors")
    change(weights)
    save_file(weights, small / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight is missing"),
        (lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}), r"norm.weight has the shape \(3,\)"),
        (lambda weights: weights["model.layers.0.mlp.up_proj.weight"].fill_(1e5), "up_proj.weight holds 99840"),
        (lambda weights: weights["model.layers.0.mlp.up_proj.weight"][1].fill_(float("nan")), "up_proj.weight holds nan"),
        (lambda weights: weights["model.norm.weight"].fill_(float("inf")), "norm.weight holds inf"),
    ],
)
def test_weights_that_are_not_right_are_named_and_nothing_is_left(
    change: Callable[..., object], word: str, small: Path, tmp_path: Path
) -> None:
    damaged(small, change)
    with pytest.raises(ModelError, match=word):
        gguf.write(small, tmp_path / "out" / "m.gguf", "f16", silent)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_folder_is_refused_in_one_sentence(name: str, small: Path, tmp_path: Path) -> None:
    (small / name).write_bytes(b"no such thing")
    with pytest.raises(ModelError, match="cannot be read"):
        gguf.write(small, tmp_path / "m.gguf", "f16", silent)
    assert not list(tmp_path.glob("m.gguf*"))


def test_a_stop_leaves_the_older_file_and_nothing_else(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "m.gguf"
    out.parent.mkdir()
    out.write_text("older")
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 3:
            raise Stopped("enough")

    with pytest.raises(Stopped):
        gguf.write(small, out, "f16", stop)
    assert seen == [(1, 50), (2, 50), (3, 50)]
    assert {path.name: path.read_text() for path in out.parent.iterdir()} == {"m.gguf": "older"}


def test_a_full_disk_is_said_and_nothing_is_left(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_weights.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(SpaceError, match="No space left"):
        gguf.write(small, tmp_path / "out" / "m.gguf", "f16", silent)
    assert list((tmp_path / "out").iterdir()) == []


def test_more_tokens_than_embeddings_are_refused(small: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(small / "tokenizer.json"))
    tokenizer.add_tokens([f"<more{number}>" for number in range(9)])
    tokenizer.save(str(small / "tokenizer.json"))
    with pytest.raises(ModelError, match="tokens and the model"):
        gguf.write(small, tmp_path / "m.gguf", "f16", silent)


def no_bytes(rules: dict[str, Any]) -> None:
    rules["model"]["vocab"] = {token: index for token, index in rules["model"]["vocab"].items() if token != "<0x41>"}


def unmerged(rules: dict[str, Any]) -> None:
    pairs = rules["model"]["merges"]
    rules["model"]["merges"] = [pair for pair in pairs if "".join(pair) != "".join(pairs[-1])]


def squeezed(rules: dict[str, Any]) -> None:
    rules["normalizer"] = {"type": "NFKC"}


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("smollm", lambda rules: rules.update(pre_tokenizer={"type": "Whitespace"}), "cuts text in a way of its own"),
        ("smollm", lambda rules: rules["model"].update(ignore_merges=True), "cuts text in a way of its own"),
        ("smollm", lambda rules: rules["pre_tokenizer"]["pretokenizers"].pop(0) and rules["model"].update(ignore_merges=True), "cuts"),
        ("smollm", lambda rules: rules["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "cuts text"),
        ("smollm", lambda rules: rules.update(pre_tokenizer=None), "does not cut"),
        ("smollm", lambda rules: rules["model"].update(end_of_word_suffix="</w>"), "of the kind"),
        ("qwen2", squeezed, "changes text"),
        ("llama2", squeezed, "cuts or changes"),
        ("llama2", unmerged, "does not merge"),
        ("llama2", no_bytes, "for every byte"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(
    name: str, change: Callable[[Any], object], word: str, merged: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in merged(name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    rules = json.loads((folder / "tokenizer.json").read_text())
    change(rules)
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(ModelError, match=word):
        gguf.write(folder, tmp_path / "m.gguf", "f16", silent)


def test_a_tokenizer_without_merges_is_refused(small: Path, tmp_path: Path) -> None:
    other = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    other.pre_tokenizer = pre_tokenizers.Metaspace()
    other.save(str(small / "tokenizer.json"))
    with pytest.raises(ModelError, match="of the kind Unigram"):
        gguf.write(small, tmp_path / "m.gguf", "f16", silent)


def test_a_dropped_template_is_found_out(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_weights.GGUFWriter, "add_chat_template", lambda *_: None)
    assert faults(write(small, tmp_path / "out" / "m.gguf"), load_tokenizer(small)) == ["it has no chat template"]


def test_another_template_is_found_out(small: Path, tmp_path: Path) -> None:
    trained = load_tokenizer(small)
    template = (small / "chat_template.jinja").read_text()
    (small / "chat_template.jinja").write_text(template.replace("m.content", "m.content | trim"))
    assert faults(write(small, tmp_path / "out" / "m.gguf"), trained) == ["its chat template is not the one that was trained"]


def test_a_wrong_stop_token_is_found_out(small: Path, tmp_path: Path) -> None:
    trained = load_tokenizer(small)
    template = (small / "chat_template.jinja").read_text()
    (small / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|endoftext|>"))
    edit(small / "tokenizer_config.json", eos_token="<|endoftext|>")
    found = faults(write(small, tmp_path / "out" / "m.gguf"), trained)
    assert "it does not stop at <|im_end|>, with which the template ends an answer" in found


@pytest.mark.parametrize("data", [b"", b"GGUF", b"PK\x03\x04 something else", b"GGUF\x03\0\0\0" + b"\xff" * 40])
def test_what_is_no_gguf_file_is_said_so(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelError, match="GGUF file"):
        settings(tmp_path / "m.gguf")
