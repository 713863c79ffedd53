"""Fused layers are the model's own: same outputs, same gradients, same switches, on a processor with the kernels' plain twins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_driver import drive
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tui.engine.events import Phase, Stepped
from qlora_tui.engine.fast import eightbit
from qlora_tui.engine.fast.recompute import recompute
from qlora_tui.engine.load import Loaded, load
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.spec import RunConfig, from_values

CPU = Machine("cpu", "cpu", 1 << 34, cores=1)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {"partial_rotary_factor": 0.5},
    "gemma2": {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 0.5},
    "gemma3_text": {"head_dim": 32, "sliding_window": 8},
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.arange(40).reshape(2, 20) * 7 % 200
Gradients = dict[str, torch.Tensor]


def write(folder: Path, kind: str, dtype: torch.dtype = torch.float32, *, loud: bool = False, seed: int = 0) -> None:
    """Write a random model whose norms and biases are none of them trivial; `loud`: a few channels and outputs drown the rest."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **FAMILIES.get(kind, {})))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.2
    for name, parameter in model.named_parameters() if loud else ():
        if name.endswith(("layernorm.weight", "v_proj.weight", "up_proj.weight", "down_proj.weight")):  # loud queries choose one token
            parameter.data[::40] *= 10
    model.to(dtype).save_pretrained(folder)


def loaded_from(folder: Path, *, fused: bool, spread: float = 0.1, **values: Any) -> Loaded:
    """Load a model with B's that are not zero, by default large enough to be seen beside the base."""
    usual: dict[str, Any] = {"method": "lora", "dtype": "bfloat16", "lora_r": 4, "gradient_checkpointing": "false"}
    run = from_values({"model_name_or_path": str(folder), "data": ("rows",), "fused_layers": "auto" if fused else "off", **usual, **values})
    loaded = load(run, folder, CPU)
    torch.manual_seed(1)
    for name, parameter in loaded.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, spread)
    return loaded


def in_32_bits(loaded: Loaded) -> Loaded:
    loaded.model.float()
    return loaded


def gradients(loaded: Loaded, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, Gradients]:
    for parameter in loaded.model.parameters():
        parameter.grad = None
    hidden = loaded.hidden(ids)
    (hidden.float() * torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)).sum().backward()
    return hidden.detach().float(), {name: part.grad.float() for name, part in loaded.model.named_parameters() if part.grad is not None}


def apart(left: Gradients, right: Gradients) -> float:
    """The length of the difference of all gradients together, over that of the right ones."""
    assert left.keys() == right.keys()
    differences = [torch.linalg.vector_norm(left[name] - right[name]) for name in right]
    return float(torch.stack(differences).norm() / torch.stack([torch.linalg.vector_norm(part) for part in right.values()]).norm())


@pytest.fixture
def small_tiles(fused_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_tui.engine.fast import operations

    monkeypatch.setattr(operations, "TILE", 16)


@pytest.mark.parametrize("recomputed", [0, 2, 3])
@pytest.mark.parametrize("kind", FAMILIES)
def test_outputs_and_gradients_are_those_of_transformers(tmp_path: Path, small_tiles: None, kind: str, recomputed: int) -> None:
    write(tmp_path, kind)
    plain, fused = (in_32_bits(loaded_from(tmp_path, fused=way)) for way in (False, True))
    assert (plain.why_plain, fused.why_plain) == ("fused_layers=off", "")
    recompute(fused.decoder.layers, recomputed, dropout=False)  # type: ignore[arg-type]  # it is a ModuleList
    (hidden, expected), (ours, found) = gradients(plain), gradients(fused)
    torch.testing.assert_close(ours, hidden, rtol=1e-4, atol=1e-5)
    assert apart(found, expected) < 1e-5


@pytest.mark.parametrize(
    "values",
    [
        {"init_lora_weights": "pissa"},
        {"lora_target_modules": ("q_proj", "v_proj")},
        {"lora_target_modules": ("gate_proj", "down_proj")},
        {"use_rslora": True},
        {"method": "qlora"},
        {"method": "lora-8bit"},
    ],
    ids=str,
)
def test_every_plain_adapter_goes_through_them(tmp_path: Path, small_tiles: None, values: dict[str, Any]) -> None:
    write(tmp_path, "llama")
    plain, fused = (loaded_from(tmp_path, fused=way, **values) for way in (False, True))
    assert fused.why_plain == ""
    recompute(fused.decoder.layers, 1, dropout=False)  # type: ignore[arg-type]
    if "method" not in values:  # the others are widened to bfloat16
        plain, fused = in_32_bits(plain), in_32_bits(fused)
    (hidden, expected), (ours, found) = gradients(plain), gradients(fused)
    rough = 0.1 if "method" in values else 1e-3  # rsLoRA doubles what an adapter of this size does
    assert (ours - hidden).norm() < rough * hidden.norm()
    assert apart(found, expected) < rough


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_in_8_bits_are_nearer_to_16_bits_than_a_4_bit_base(
    tmp_path: Path, small_tiles: None, narrow_on_cpu: str, kind: str, recomputed: int
) -> None:
    write(tmp_path, kind, loud=True)
    whole, fused, four = (loaded_from(tmp_path, fused=True, method=method) for method in ("lora", "lora-8bit", "qlora"))
    recompute(fused.decoder.layers, recomputed, dropout=False)  # type: ignore[arg-type]
    (hidden, expected), (ours, found), (rough, rougher) = gradients(whole), gradients(fused), gradients(four)
    assert (ours - hidden).norm() < (rough - hidden).norm()
    assert apart(found, expected) < apart(rougher, expected)
    layer = fused.decoder.layers[0].self_attn.o_proj.get_base_layer()  # type: ignore[union-attr]
    assert eightbit.narrow_gradient(layer, hidden.bfloat16().flatten(0, -2)) == narrow_on_cpu
    for each in fused.model.modules():
        if isinstance(each, eightbit.EightBit):
            each.narrow = None
    same, closer = gradients(fused)
    assert torch.equal(same, ours)  # forward products are in 16 bits either way
    assert 0 < apart(found, closer) < 0.5 * apart(rougher, expected)


class Counted(TorchDispatchMode):
    """Counts what would start kernels: every operation but views and memory; the plain twins' inside is out of its sight."""

    started = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.started += not func.is_view and "empty" not in str(func) and "detach" not in str(func)
        return found


def test_a_layer_starts_few_kernels(tmp_path: Path, small_tiles: None) -> None:
    """Each costs two microseconds of a card and ten to fifty of its host; adapters of one input go together."""
    write(tmp_path, "llama")
    loaded = loaded_from(tmp_path, fused=True)
    counts = []
    for recomputed in (0, len(loaded.decoder.layers)):  # type: ignore[arg-type]
        recompute(loaded.decoder.layers, recomputed, dropout=False)  # type: ignore[arg-type]
        gradients(loaded)
        with Counted() as counted:
            loaded.hidden(IDS).sum().backward()
        counts.append(counted.started / len(loaded.decoder.layers))  # type: ignore[arg-type]
    assert counts[0] <= 90
    assert counts[1] <= 170  # with its MLP in tiles of five tokens


@pytest.mark.parametrize("kind", FAMILIES)
def test_in_16_bits_they_are_as_close_to_32_bits_as_the_plain_ones(tmp_path: Path, small_tiles: None, kind: str) -> None:
    assert errors_beside_plain_layers(tmp_path, kind).max() < 1.1


def errors_beside_plain_layers(folder: Path, kind: str, **values: Any) -> torch.Tensor:
    """Return how much farther from 32 bits fused layers are than plain ones: of hidden states, and of gradients.

    One model and one batch are a matter of luck, for either: errors are compared over some of both. Adapters are of a size that
    training makes; with large ones either way can be twice as far as the other.
    """
    logs = torch.zeros(2, 2)
    for seed in range(4):
        write(folder, kind, seed=seed)
        plain, fused = (loaded_from(folder, fused=way, spread=0.01, **values) for way in (False, True))
        assert fused.why_plain == ""
        exact = in_32_bits(loaded_from(folder, fused=False, spread=0.01))
        for _ in range(4):
            ids = torch.randint(0, 200, (2, 20), device=IDS.device)
            hidden, expected = gradients(exact, ids)
            for way, loaded in enumerate((plain, fused)):
                ours, found = gradients(loaded, ids)
                logs[way] += torch.tensor([float((ours - hidden).norm() / hidden.norm()), apart(found, expected)]).log()
    return (logs[1] - logs[0]).div(16).exp()


@pytest.mark.parametrize("start", [{}, {"init_lora_weights": "pissa"}], ids=["usual", "with a start"])
@pytest.mark.parametrize("targets", [(), ("q_proj", "up_proj", "down_proj")], ids=["all", "some"])
@pytest.mark.parametrize("layers", ["true", "false"])
def test_gradients_that_are_there_are_added_to(
    tmp_path: Path, small_tiles: None, start: dict[str, str], targets: tuple[str, ...], layers: str
) -> None:
    write(tmp_path, "llama")
    chosen = {"lora_target_modules": targets} if targets else {}
    loaded = loaded_from(tmp_path, fused=True, gradient_checkpointing=layers, **start, **chosen)
    _, alone = gradients(loaded)
    named = {name: part for name, part in loaded.model.named_parameters() if part.requires_grad}
    lent = {name: torch.randn_like(part) for name, part in named.items()}
    for name, part in named.items():
        part.grad = lent[name].clone()
    places = {name: part.grad for name, part in named.items()}
    hidden = loaded.hidden(IDS)
    (hidden.float() * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
    for name, part in named.items():
        assert part.grad is places[name]
        assert torch.equal(part.grad, lent[name] + alone[name])


def test_the_adapter_can_be_switched_off(tmp_path: Path, small_tiles: None) -> None:
    write(tmp_path, "qwen3")
    plain, fused = (in_32_bits(loaded_from(tmp_path, fused=way)) for way in (False, True))
    with torch.no_grad(), plain.model.disable_adapter(), fused.model.disable_adapter():
        bare = plain.hidden(IDS)
        torch.testing.assert_close(fused.hidden(IDS), bare, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fused.hidden(IDS), bare, atol=1e-2)


def test_an_answer_with_a_cache_is_the_plain_one(tmp_path: Path, small_tiles: None) -> None:
    write(tmp_path, "llama")
    plain, fused = (in_32_bits(loaded_from(tmp_path, fused=way)) for way in (False, True))
    written = [loaded.model.generate(input_ids=IDS[:1], max_new_tokens=8, do_sample=False) for loaded in (plain, fused)]
    assert torch.equal(*written)


@pytest.mark.parametrize(
    ("kind", "values", "why"),
    [
        ("llama", {"use_dora": True}, "DoRA and dropout"),
        ("llama", {"lora_dropout": 0.1}, "DoRA and dropout"),
        ("llama", {"attn_implementation": "eager"}, "holds its scores"),
        ("llama", {"dtype": "float32"}, "bfloat16 alone"),
        ("olmo2", {}, "olmo2 have no fused layers"),
        ("granite", {}, "granite have no fused layers"),
    ],
)
def test_what_cannot_be_fused_says_why(tmp_path: Path, small_tiles: None, kind: str, values: dict[str, Any], why: str) -> None:
    write(tmp_path, kind)
    assert why in loaded_from(tmp_path, fused=True, **values).why_plain


def test_a_run_trains_through_them_and_says_so(run_of: Callable[..., RunConfig], tmp_path: Path, small_tiles: None) -> None:
    losses = []
    for way in ("off", "auto"):
        ran = drive(run_of(dtype="bfloat16", fused_layers=way, gradient_checkpointing="1", max_steps=20), tmp_path / way)
        assert ran.error is None
        losses.append([step.loss for step in ran.of(Stepped)])
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    assert losses[1][-1] < losses[1][0] - 0.3
    assert not any(phase.note == "layers are fused" for phase in ran.of(Phase))  # on a processor that is never said
