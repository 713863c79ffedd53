from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_tui.engine import models
from qlora_tui.engine.errors import ConfigError, ModelError
from qlora_tui.engine.models import FAMILIES, ModelSpec

ROWS = {row["id"]: row for row in json.loads((Path(models.__file__).parent / "catalogue.json").read_text())}


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


def smallest_and_largest(family: str) -> list[ModelSpec]:
    ranked = sorted((spec for spec in models.catalogue() if spec.family == family), key=lambda spec: spec.params)
    return list({spec.name: spec for spec in (ranked[0], ranked[-1])}.values())


BUILT = [spec for family in FAMILIES for spec in smallest_and_largest(family)]
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


@pytest.mark.parametrize("spec", [*BUILT, BIASED], ids=lambda spec: spec.name)
def test_the_formula_counts_what_transformers_builds(spec):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_of(spec)
    built_config = AutoConfig.for_model(str(config.pop("model_type")), **config)
    attention = "sdpa" if spec.sdpa else "eager"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built_config, attn_implementation=attention)
    linears = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name != "lm_head"}
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.params
    assert sum(part.weight.numel() for part in linears.values()) == spec.linear_params
    first = [(name.split(".")[-1], part.in_features, part.out_features) for name, part in linears.items() if ".layers.0." in name]
    assert sorted(first) == sorted((part.name, part.inputs, part.outputs) for part in spec.linears())
    assert models.from_config(built_config.to_dict(), spec.name).params == spec.params


@pytest.mark.parametrize("entry", models.entries(), ids=lambda entry: entry.spec.name)
def test_catalogue_entries_agree_with_their_published_counts(entry):
    row = ROWS[entry.spec.name]
    assert (entry.spec.params, entry.spec.linear_params) == (row["params"], row["linear_params"])
    assert entry.licence
    assert row["published_params"] in (None, entry.spec.params)


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


@pytest.mark.parametrize("kind", ["qwen3_moe", "mamba2", "gemma3", "mistral3"])
def test_an_unsupported_architecture_is_refused_by_name(kind):
    with pytest.raises(ModelError, match=f"some/model.*'{kind}' are not supported.*llama"):
        models.from_config({**config_of(BIASED), "model_type": kind}, "some/model")


def test_quantized_weights_are_refused():
    with pytest.raises(ModelError, match="already quantized"):
        models.from_config({**config_of(BIASED), "quantization_config": {"quant_method": "gptq"}}, "x")


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
