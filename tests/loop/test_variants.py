"""What can be loaded and trained besides a plain adapter on a plain checkpoint, held against PEFT and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import write_tokenizer
from loop_driver import CPU, Asked, Ran, drive
from safetensors.torch import load_file
from torch.nn import functional as F

from qlora_tui.engine import checkpoint, models, preflight
from qlora_tui.engine.data import load_tokenizer
from qlora_tui.engine.events import Evaluated
from qlora_tui.engine.fast import lora, pissa
from qlora_tui.engine.fast.recompute import recompute
from qlora_tui.engine.load import Loaded, load, trainable
from qlora_tui.engine.report.sections import _sees
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train.optim import build_optimizer, flatten, set_rate

Make = Callable[..., RunConfig]
PISSA = {"init_lora_weights": "pissa"}
VARIANTS: list[dict[str, Any]] = [
    {"use_rslora": True},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True},
    PISSA,
    {**PISSA, "use_rslora": True},
]
IDS = (torch.arange(40).reshape(2, 20) * 5 + 3) % 256


def named(values: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in values.items())


def loaded_of(run: RunConfig) -> Loaded:
    return load(run, Path(run.model_name_or_path), CPU)


def disturb(model: Any, amount: float = 0.05) -> None:
    """Move every trained tensor, since a fresh adapter does nothing and would hide every mistake."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * amount)


def logits_of(loaded: Loaded) -> torch.Tensor:
    return loaded.head.logits(loaded.hidden(IDS).flatten(0, 1)).unflatten(0, IDS.shape)


def gradients(model: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items() if parameter.grad is not None}


def adapter(ran: Ran) -> dict[str, torch.Tensor]:
    assert ran.error is None, ran.error
    return load_file(ran.folder / "adapter" / "adapter_model.safetensors")


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Layers checkpointed


@pytest.mark.parametrize("values", [{"lora_dropout": 0.2}, {"use_dora": True}, PISSA, {"method": "qlora"}], ids=named)
def test_none_some_and_all_layers_checkpointed_give_the_same_bits(run_of: Make, values: dict[str, Any]) -> None:
    found = []
    for layers in ("false", "1", "true"):
        loaded = loaded_of(run_of(gradient_checkpointing=layers, **values))
        disturb(loaded.model)
        torch.manual_seed(5)
        logits = logits_of(loaded)
        found.append({"logits": logits.detach(), **gradients(loaded.model, logits)})
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def test_the_number_of_layers_can_be_changed_on_a_loaded_model(run_of: Make) -> None:
    loaded = loaded_of(run_of(gradient_checkpointing="true"))
    kept = []
    for number in (2, 1, 0):
        recompute(loaded.decoder.layers, number, dropout=False)
        bytes_kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logits_of(loaded)
        kept.append(bytes_kept)
    assert kept[0] < kept[1] < kept[2]


# rsLoRA, DoRA and PiSSA against PEFT


def peft_model(folder: Path, loaded: Loaded, quantized: bool, **values: Any) -> Any:
    """PEFT's own model with the adapter of `loaded`, on PEFT's own forward."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config if quantized else None)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **values))
    own = trainable(model)
    for name, parameter in trainable(loaded.model).items():
        own[name].data = parameter.data.clone()
    return model


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("values", [{"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}], ids=named)
def test_rslora_and_dora_give_pefts_outputs_and_gradients(run_of: Make, tiny_model: Path, method: str, values: dict[str, Any]) -> None:
    loaded = loaded_of(run_of(method=method, lora_r=4, lora_alpha=8, **values))
    disturb(loaded.model)
    theirs = peft_model(tiny_model, loaded, method == "qlora", r=4, lora_alpha=8, **values)
    expected_logits = theirs(input_ids=IDS).logits
    expected = gradients(theirs, expected_logits)
    logits = logits_of(loaded)
    found = gradients(loaded.model, logits)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    assert found.keys() == expected.keys()
    assert bool(values.get("use_dora")) == any("magnitude" in name for name in found)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6, msg=name)


def test_pissa_is_pefts_residual_base_with_the_adapter_on_it(run_of: Make, tiny_model: Path) -> None:
    loaded = loaded_of(run_of(lora_r=4, lora_alpha=8, **PISSA))
    starts = {name: layer.forward.start for name, layer in lora.fused(loaded.model)}
    disturb(loaded.model, 0.01)
    theirs = peft_model(tiny_model, loaded, False, r=4, lora_alpha=8)
    for name, layer in theirs.named_modules():
        if name in starts:
            layer.get_base_layer().weight.data -= 2.0 * starts[name][1] @ starts[name][0]
    expected_logits = theirs(input_ids=IDS).logits
    expected = gradients(theirs, expected_logits)
    logits = logits_of(loaded)
    found = gradients(loaded.model, logits)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    assert len(starts) == 14
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6, msg=name)


def test_pissa_takes_the_main_directions() -> None:
    torch.manual_seed(0)
    weight = torch.randn(60, 48) @ torch.diag(torch.linspace(2, 0.1, 48))
    a, b = pissa.main_directions(weight, 5, 0.5)
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    best = (left[:, :5] * sizes[:5]) @ right[:5]
    assert (a.shape, b.shape) == ((5, 48), (60, 5))
    assert float((weight - 0.5 * b @ a).norm()) <= 1.001 * float((weight - best).norm())
    torch.testing.assert_close((a**2).sum(1), (b**2).sum(0))  # each half carries the root of the size


@pytest.mark.parametrize("values", VARIANTS, ids=named)
def test_every_adapter_starts_as_no_change_to_the_base(run_of: Make, values: dict[str, Any]) -> None:
    loaded = loaded_of(run_of(**values))
    on = logits_of(loaded).detach()
    with torch.no_grad(), loaded.model.disable_adapter():
        off = logits_of(loaded)
    torch.testing.assert_close(on, off, rtol=1e-5, atol=1e-6)
    plain = loaded_of(run_of())
    with torch.no_grad(), plain.model.disable_adapter():
        assert torch.equal(off, logits_of(plain))


@pytest.mark.parametrize("values", VARIANTS, ids=named)
def test_in_bfloat16_every_adapter_starts_as_exactly_no_change_and_has_all_its_gradients(run_of: Make, values: dict[str, Any]) -> None:
    loaded = loaded_of(run_of(dtype="bfloat16", **values))
    on = logits_of(loaded).detach()
    with torch.no_grad(), loaded.model.disable_adapter():
        assert torch.equal(on, logits_of(loaded))
    disturb(loaded.model, 0.02)
    found = gradients(loaded.model, logits_of(loaded))
    assert len(found) == len(trainable(loaded.model)) == (42 if values.get("use_dora") else 28)
    assert all(grad.dtype == torch.float32 and bool(torch.isfinite(grad).all()) for grad in found.values())


@pytest.mark.parametrize("values", VARIANTS, ids=named)
def test_the_saved_adapter_means_the_same_to_other_tools_on_the_original_base(
    run_of: Make, tiny_model: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = loaded_of(run_of(**values))
    disturb(loaded.model)
    path = checkpoint.write_adapter(tmp_path, loaded.model, str(tiny_model), load_tokenizer(tiny_model))
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
        theirs = PeftModel.from_pretrained(base, path)(input_ids=IDS).logits
        torch.testing.assert_close(logits_of(loaded), theirs, rtol=1e-4, atol=1e-5)
    assert float((theirs - plain).abs().max()) > 0.1
    said = json.loads((path / "adapter_config.json").read_text())
    assert said["r"] == (32 if values.get("init_lora_weights") else 16)
    assert said["init_lora_weights"] is True
    assert not _sees(path)


@pytest.mark.parametrize("values", [*VARIANTS, {"loraplus_lr_ratio": 8.0}, {"loraplus_lr_ratio": 8.0, "optim": "adamw_8bit"}], ids=named)
def test_stop_and_resume_is_the_uninterrupted_run(run_of: Make, tmp_path: Path, values: dict[str, Any]) -> None:
    run = run_of(max_steps=5, learning_rate=1e-3, **values)
    whole = drive(run, tmp_path / "whole")
    drive(run, tmp_path / "part", Asked({2: "stop"}))
    rest = drive(run, tmp_path / "part", resume=True)
    assert same_bits(adapter(rest), adapter(whole))
    assert whole.losses[-1] < whole.losses[0]


def test_pissa_is_measured_against_the_base_that_people_have(run_of: Make, tmp_path: Path) -> None:
    plain, started = drive(run_of(), tmp_path / "plain"), drive(run_of(**PISSA, learning_rate=1e-3), tmp_path / "pissa")
    assert started.error is None
    first, last = started.of(Evaluated)[0], started.of(Evaluated)[-1]
    assert first.loss == plain.of(Evaluated)[0].loss
    assert last.base_loss == first.loss
    assert last.drop > 0.1


# LoRA+


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_loraplus_moves_b_by_its_ratio(run_of: Make, optim: str) -> None:
    """The first step of Adam has the length of the learning rate in every direction."""
    run = run_of(loraplus_lr_ratio=16.0, optim=optim, learning_rate=1e-4)
    parameters = {
        "x.lora_A.default.weight": torch.nn.Parameter(torch.zeros(4, 4)),
        "x.lora_B.default.weight": torch.nn.Parameter(torch.zeros(4, 4)),
    }
    flat = flatten(run, parameters, torch.device("cpu"))
    optimizer = build_optimizer(run, flat, torch.device("cpu"))
    set_rate(optimizer, 5e-5)
    flat.lend()
    for parameter in parameters.values():
        parameter.grad.fill_(1.0)  # type: ignore[union-attr]
    optimizer.step()
    moved = [float(-parameter.detach().mean()) for parameter in parameters.values()]
    assert moved == pytest.approx([5e-5, 16 * 5e-5], rel=1e-3)


# Checkpoints that are in four bits already


def write_four_bits(
    source: Path, folder: Path, *, kind: str = "nf4", double: bool = True, dtype: torch.dtype = torch.float32, kept: list[str] | None = None
) -> Path:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config).train().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def four_bit_weights(loaded: Loaded) -> int:
    layers = (module for module in loaded.model.modules() if isinstance(module, Linear4bit))
    return sum(module.in_features * module.out_features for module in layers)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_checkpoint_in_four_bits_is_the_base_that_quantizing_while_loading_gives(
    run_of: Make, tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    folder = write_four_bits(tiny_model, tmp_path / "stored", kind=kind)
    spec = models.from_folder(folder)
    assert (spec.quantized, spec.double_quant) == (kind, True)
    run = run_of(method="qlora", bnb_4bit_quant_type=kind)
    expected = loaded_of(run)
    found = load(run, folder, CPU)
    assert four_bit_weights(found) == spec.quantized_params == spec.linear_params
    assert torch.equal(logits_of(found), logits_of(expected))


def test_a_checkpoint_stored_in_another_type_computes_in_ours_and_learns(run_of: Make, tiny_model: Path, tmp_path: Path) -> None:
    folder = write_four_bits(tiny_model, tmp_path / "stored", double=False, dtype=torch.bfloat16)
    run = run_of(method="qlora", model_name_or_path=str(folder), bnb_4bit_use_double_quant=False, max_steps=2)
    assert preflight.shape_problems(run, models.from_folder(folder)) == []
    ran = drive(run, tmp_path / "run")
    assert ran.error is None
    assert ran.losses[1] < ran.losses[0]


def test_layers_that_a_checkpoint_keeps_in_sixteen_bits_stay_so_and_are_counted(run_of: Make, tiny_model: Path, tmp_path: Path) -> None:
    folder = write_four_bits(tiny_model, tmp_path / "stored", kept=["lm_head", "model.layers.1.mlp", "model.layers.0.self_attn.q_proj"])
    spec = models.from_folder(folder)
    loaded = load(run_of(method="qlora"), folder, CPU)
    assert four_bit_weights(loaded) == spec.quantized_params < spec.linear_params
    assert len(list(lora.fused(loaded.model))) == 14
    disturb(loaded.model)
    assert len(gradients(loaded.model, logits_of(loaded))) == 28


def test_settings_that_a_stored_base_contradicts_are_refused_with_what_to_say(run_of: Make, tiny_model: Path, tmp_path: Path) -> None:
    spec = models.from_folder(write_four_bits(tiny_model, tmp_path / "stored", kind="fp4", double=False))
    told = [str(problem) for problem in preflight.shape_problems(run_of(method="qlora"), spec)]
    assert told == [
        "bnb_4bit_quant_type: this checkpoint was quantized with fp4, not nf4; say --set bnb_4bit_quant_type=fp4",
        "bnb_4bit_use_double_quant: this checkpoint was quantized with false, not true; say --set bnb_4bit_use_double_quant=false",
    ]
    (refused,) = preflight.shape_problems(run_of(method="lora"), spec)
    assert str(refused).startswith("method: this checkpoint holds its weights in 4 bits (fp4)")


def test_more_directions_than_a_layer_has_are_refused(run_of: Make, tiny_model: Path) -> None:
    spec = models.from_folder(tiny_model)
    (refused,) = preflight.shape_problems(run_of(lora_r=64, **PISSA), spec)
    assert str(refused) == "lora_r: pissa takes 64 directions and the narrowest layer has 32; say at most 32"
    assert preflight.shape_problems(run_of(lora_r=64), spec) == []


# The text part of models that also see


TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 264,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 259,
}
QWEN_TEXT = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}}
SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
QWEN_SIGHT = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14}
SEEING: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": {**TEXT, "sliding_window": 64}, "vision_config": SIGLIP, "mm_tokens_per_image": 4, "image_token_index": 260},
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**SIGLIP, "model_type": "pixtral", "head_dim": 16},
        "tie_word_embeddings": False,
    },
    "qwen2_vl": {"text_config": QWEN_TEXT, "vision_config": {**QWEN_SIGHT, "embed_dim": 32, "hidden_size": 64}},
    "qwen2_5_vl": {"text_config": QWEN_TEXT, "vision_config": QWEN_SIGHT},
    "qwen3_vl": {
        "text_config": QWEN_TEXT,
        "vision_config": {**QWEN_SIGHT, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    },
}


def write_seeing(kind: str, folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **SEEING[kind])).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_every_model_around_a_text_part_is_built_here() -> None:
    assert set(SEEING) == set(models.WRAPPERS)


@pytest.mark.parametrize("kind", SEEING)
def test_the_text_part_of_a_model_that_sees_is_loaded_alone_and_its_adapter_fits_the_whole(run_of: Make, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder = write_seeing(kind, tmp_path / "model")
    loaded = load(run_of(), folder, CPU)
    spec = models.from_folder(folder)
    assert spec.wrapper == kind
    frozen = {id(parameter): parameter.numel() for parameter in loaded.model.parameters() if not parameter.requires_grad}
    assert sum(frozen.values()) == spec.params
    assert len(list(lora.fused(loaded.model))) == 14
    disturb(loaded.model)
    path = checkpoint.write_adapter(tmp_path, loaded.model, str(folder), load_tokenizer(folder))
    assert _sees(path)  # so that the report says how to load it
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        plain = whole(input_ids=IDS).logits
        theirs = PeftModel.from_pretrained(whole, path)
        torch.testing.assert_close(logits_of(loaded), theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
        assert float((theirs(input_ids=IDS).logits - plain).abs().max()) > 0.1
    adapted = [name for name, _ in theirs.named_parameters() if "lora_" in name]
    assert len(adapted) == 28
    assert all("language_model" in name for name in adapted)


@pytest.mark.parametrize("values", [{"method": "qlora"}, {"lora_target_modules": ("self_attn.q_proj", "v_proj")}], ids=named)
def test_a_text_part_trains(run_of: Make, tmp_path: Path, values: dict[str, Any]) -> None:
    folder = write_seeing("gemma3", tmp_path / "model")
    run = run_of(model_name_or_path=str(folder), max_steps=4, **values)
    ran = drive(run, tmp_path / "run")
    assert len(adapter(ran)) == (28 if values.get("method") else 8)
    assert ran.losses[-1] < ran.losses[0]
