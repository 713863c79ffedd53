from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_tui.engine import models
from qlora_tui.engine.errors import ConfigError, ModelError
from qlora_tui.engine.models import FAMILIES, ModelSpec

ROWS = {
    name: row
    for row in json.loads((Path(models.__file__).parent / "catalogue.json").read_text())
    for name in (row["id"], *row.get("also", ()))
}
SIGHT = {  # vision towers without layers: the text part alone is counted
    "gemma3": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 0, "num_attention_heads": 2},
    "mistral3": {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 0, "num_attention_heads": 2},
}


def config_of(spec: ModelSpec) -> dict[str, object]:
    """The `config.json` of a model with this shape."""
    return {
        "model_type": spec.family,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "max_position_embeddings": spec.max_position_embeddings,
        "attention_bias": spec.attention_bias,
        "mlp_bias": spec.mlp_bias,
        "pad_token_id": 0,
    }


BIASED = ModelSpec(
    name="biased",
    family="llama",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=100,
    tie_word_embeddings=False,
    max_position_embeddings=64,
    attention_bias=True,
    mlp_bias=True,
)


@pytest.mark.parametrize("spec", [*models.catalogue(), BIASED], ids=lambda spec: spec.name)
def test_the_formula_counts_what_transformers_builds(spec):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = config_of(spec)
    loader = AutoModelForCausalLM
    if spec.wrapper:
        loader = AutoModelForImageTextToText
        sight = {"text_config": config, "vision_config": SIGHT[spec.wrapper], "tie_word_embeddings": spec.tie_word_embeddings}
        config = {"model_type": spec.wrapper, **sight}
    built_config = AutoConfig.for_model(config["model_type"], **{key: value for key, value in config.items() if key != "model_type"})
    with torch.device("meta"):
        model = loader.from_config(built_config, attn_implementation="sdpa" if spec.sdpa else "eager")
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    parts = {id(parameter): parameter.numel() for part in (decoder, head) for parameter in part.parameters()}
    linears = {name: part for name, part in decoder.named_modules() if isinstance(part, torch.nn.Linear)}
    assert sum(parts.values()) == spec.params
    assert sum(part.weight.numel() for part in linears.values()) == spec.linear_params
    first = [(name.split(".")[-1], part.in_features, part.out_features) for name, part in linears.items() if name.startswith("layers.0.")]
    assert sorted(first) == sorted((part.name, part.inputs, part.outputs) for part in spec.linears())
    read = models.from_config(built_config.to_dict(), spec.name)
    assert (read.params, read.family, read.wrapper) == (spec.params, spec.family, spec.wrapper)


@pytest.mark.parametrize("entry", models.entries(), ids=lambda entry: entry.spec.name)
def test_catalogue_entries_agree_with_their_published_counts(entry):
    row = ROWS[entry.spec.name]
    assert (entry.spec.params, entry.spec.linear_params) == (row["params"], row["linear_params"])
    assert entry.licence
    assert row["published_params"] in (None, entry.spec.params, row.get("checkpoint_params"))


def test_every_family_has_a_model_in_the_catalogue():
    assert {spec.family for spec in models.catalogue()} == set(FAMILIES)


def test_sister_models_are_found_with_their_own_limits():
    assert models.find("Qwen/Qwen3-4B-Instruct-2507").max_position_embeddings == 262144
    assert models.find("Qwen/Qwen3-4B").max_position_embeddings == 40960
    assert models.find_entry("meta-llama/Llama-3.1-8B-Instruct").gated
    assert models.find("nobody/nothing") is None


def test_the_demo_model_is_known_by_its_built_in_name():
    spec = models.find("builtin:smollm2-135m")
    assert (spec.name, spec.params) == ("builtin:smollm2-135m", 134_515_008)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", True),
        ("Qwen/Qwen2.5-7B-Instruct", True),
        ("Qwen/Qwen3-8B", True),
        ("microsoft/Phi-3.5-mini-instruct", True),  # its window is longer than its positions
        ("microsoft/Phi-3-mini-4k-instruct", False),
        ("google/gemma-2-9b-it", False),
        ("google/gemma-3-1b-it", False),
    ],
)
def test_the_maskless_kernel_is_for_families_without_windows_and_caps(name, plain):
    assert models.find(name).plain_causal is plain


def test_a_window_that_is_switched_off_is_none():
    config = {**config_of(BIASED), "model_type": "qwen2", "sliding_window": 16}
    assert models.from_config(config, "x").sliding_window is None
    assert models.from_config({**config, "use_sliding_window": True}, "x").sliding_window == 16
    assert models.from_config({**config_of(BIASED), "model_type": "mistral"}, "x").sliding_window == 4096
    assert models.from_config({**config_of(BIASED), "model_type": "mistral", "sliding_window": None}, "x").sliding_window is None


@pytest.mark.parametrize("kind", ["mamba2", "gemma3n", "qwen3_next"])
def test_an_unsupported_architecture_is_refused_by_name(kind):
    with pytest.raises(ModelError, match=rf"some/model.*'{kind}' \(OddForCausalLM\) are not supported; supported: llama"):
        models.from_config({**config_of(BIASED), "model_type": kind, "architectures": ["OddForCausalLM"]}, "some/model")


def test_a_mixture_of_experts_is_called_one():
    with pytest.raises(ModelError, match="'qwen3_moe' are not supported: they are mixtures of experts"):
        models.from_config({**config_of(BIASED), "model_type": "qwen3_moe", "num_experts": 128}, "x")


def test_a_text_part_without_a_formula_is_named_with_the_model_around_it():
    around = {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}}
    with pytest.raises(ModelError, match="'qwen3_5' are not supported: their text part, of type 'qwen3_5_text', has no formula"):
        models.from_config(around, "x")
    with pytest.raises(ModelError, match="'mistral3' are not supported: their text part, of type 'mamba'"):
        models.from_config({"model_type": "mistral3", "text_config": {"model_type": "mamba"}}, "x")


def test_the_text_part_is_read_from_a_config_that_leaves_out_what_is_usual():
    """As google/gemma-3-4b-it publishes it: heads, vocabulary and positions are left to the library."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024}
    spec = models.from_config({"model_type": "gemma3", "text_config": text, "vision_config": {}}, "google/gemma-3-4b-it")
    assert spec == models.find("google/gemma-3-4b-it")


def test_the_older_flat_config_of_a_model_that_sees_is_read():
    flat = {**config_of(BIASED), "model_type": "qwen2_5_vl", "vision_config": {"depth": 32}, "use_sliding_window": False}
    spec = models.from_config(flat, "x")
    assert (spec.family, spec.wrapper, spec.hidden_size) == ("qwen2", "qwen2_5_vl", 64)


def test_the_catalogue_offers_no_checkpoint_that_would_be_refused():
    assert models.find("mistralai/Ministral-3-8B-Instruct-2512") is None  # its weights are FP8
    assert models.find("mistralai/Ministral-3-8B-Reasoning-2512").wrapper == "mistral3"


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bitsandbytes as int4"),
        ("odd", "a method it does not name"),
    ],
)
def test_weights_quantized_in_another_way_are_refused_by_its_name(table, says):
    with pytest.raises(ModelError, match=f"already quantized by {says}.*name the 16-bit original"):
        models.from_config({**config_of(BIASED), "quantization_config": table}, "x")


FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def test_weights_in_four_bits_are_accepted_and_remembered():
    spec = models.from_config({**config_of(BIASED), "quantization_config": FOUR_BITS}, "x")
    assert (spec.quantized, spec.double_quant, spec.quantized_params) == ("nf4", True, BIASED.linear_params)
    assert models.from_config(config_of(BIASED), "x").quantized == ""


@pytest.mark.parametrize(
    ("kept", "weights"),
    [
        (["lm_head", "vision_tower", "multi_modal_projector"], 0),
        (["lm_head", "model.layers.1.mlp"], 3 * 64 * 96),
        (["model.layers.0"], 3 * 64 * 96 + 2 * 64 * 64 + 2 * 64 * 32),
        (["q_proj"], 2 * 64 * 64),
    ],
)
def test_layers_left_in_sixteen_bits_are_counted(kept, weights):
    spec = models.from_config({**config_of(BIASED), "quantization_config": {**FOUR_BITS, "llm_int8_skip_modules": kept}}, "x")
    assert spec.kept_params == weights


def test_names_of_layers_left_in_sixteen_bits_that_are_patterns_are_refused():
    with pytest.raises(ModelError, match="already quantized, and some layers"):
        models.from_config({**config_of(BIASED), "quantization_config": {**FOUR_BITS, "llm_int8_skip_modules": ["layers.*.mlp"]}}, "x")


@pytest.mark.parametrize("value", [None, 0, "64", True, 1.5])
def test_a_missing_or_impossible_size_is_named(value):
    with pytest.raises(ModelError, match="hidden_size"):
        models.from_config({**config_of(BIASED), "hidden_size": value}, "x")


def test_a_folder_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of(BIASED)))
    assert models.from_folder(tmp_path).params == BIASED.params


@pytest.mark.parametrize("content", ["{", "[]", "\xff\xfe"])
def test_a_folder_with_a_broken_config_is_refused_with_its_path(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=str(tmp_path)):
        models.from_folder(tmp_path)


def test_a_folder_without_a_config_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        models.from_folder(tmp_path)


def test_targets_are_looked_up_by_their_last_name():
    assert BIASED.targeted(("all-linear",)) == BIASED.linears()
    assert [part.name for part in BIASED.targeted(("v_proj", "self_attn.q_proj"))] == ["q_proj", "v_proj"]
    with pytest.raises(ConfigError, match="did you mean q_proj"):
        BIASED.targeted(("q_prj",))
    with pytest.raises(ConfigError, match="qkv_proj"):
        models.find("microsoft/phi-4").targeted(("q_proj",))


def test_the_arithmetic_rooms_need_nothing_but_the_standard_library():
    code = (
        "import sys; from qlora_tui.engine import budget, forecast, machine, models, preset\n"
        "machine.look(); machine.sample(); [preset.load(name) for name in preset.names()]; models.catalogue()\n"
        "heavy = {'torch', 'numpy', 'transformers', 'textual', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    hidden = "import sys; sys.modules['pynvml'] = sys.modules['psutil'] = None\n"
    found = subprocess.run([sys.executable, "-c", hidden + code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
