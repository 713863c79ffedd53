"""What is wrong is told before anything is made, fetched or loaded, and all of it at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.engine import fixes, hub, machine, models, preflight
from qlora_tui.engine.errors import BadRow, ConfigError, DataError, ExitCode, FetchError, ModelError, SpaceError, WontFit
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.preflight import check
from qlora_tui.engine.spec import RunConfig

CPU = Machine("a test", "cpu", 64 * 2**30, cores=2)
CARD = Machine("RTX 2080", "cuda", 8 * 2**30, bf16=False, compute_capability=(7, 5))
Writer = Callable[..., Path]


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "look", lambda: CPU)


@pytest.fixture
def good(tiny_model: Path, chat_rows: list[dict[str, Any]], write_jsonl: Writer, tmp_path: Path) -> RunConfig:
    data = str(write_jsonl(chat_rows))
    return RunConfig(model_name_or_path=str(tiny_model), data=(data,), max_length=256, runs_dir=str(tmp_path / "deep" / "runs"))


def told(run: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check(run)
    assert caught.value.exit_code is ExitCode.USAGE
    return str(caught.value)


def test_a_good_run_passes_and_nothing_is_made(good: RunConfig, tmp_path: Path) -> None:
    found = check(good)
    assert found.run is good
    assert (found.model_spec.num_hidden_layers, found.model_files.complete, len(found.dataset.rows)) == (2, True, 40)
    assert found.budget.fits
    assert not (tmp_path / "deep").exists()
    assert not (tmp_path / "home" / "state").exists()


def test_everything_wrong_is_listed_at_once(good: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    bad = replace(
        good,
        lora_r=0,
        per_device_train_batch_size=-1,
        lora_target_modules=("q_prj",),
        max_length=4096,
        optim="paged_adamw_8bit",
        data=(str(tmp_path / "no.jsonl"),),
        runs_dir=str(tmp_path / "file" / "runs"),
    )
    text = told(bad)
    for part in (
        "lora_r",
        "per_device_train_batch_size",
        "did you mean q_proj",
        "512 positions",
        "paged_adamw_8bit",
        "no such file",
        "is a file",
    ):
        assert part in text
    assert text.count("\n") == 6


def test_kinds_of_adapter_that_do_not_go_together_are_refused_in_one_sentence(good: RunConfig) -> None:
    text = told(replace(good, init_lora_weights="pissa"))
    assert text == (
        "init_lora_weights: pissa starts from the main directions of 16-bit weights, which a base in fewer bits no longer holds; "
        "say method=lora, or init_lora_weights=default"
    )
    assert check(replace(good, init_lora_weights="pissa", method="lora", use_rslora=True, loraplus_lr_ratio=16.0)).budget.fits


def test_a_checkpoint_in_four_bits_takes_only_the_settings_that_it_has(good: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "stored"
    shutil.copytree(good.model_name_or_path, folder)
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    run = replace(good, model_name_or_path=str(folder))
    assert told(run).endswith("say --set bnb_4bit_use_double_quant=false")
    assert check(replace(run, bnb_4bit_use_double_quant=False)).model_spec.quantized == "nf4"
    assert check(replace(run, bnb_4bit_use_double_quant=False, method="auto")).model_spec.quantized == "nf4"
    assert "pissa starts from 16-bit weights" in told(replace(run, method="auto", init_lora_weights="pissa"))
    assert "so there is nothing closer to the original" in told(replace(run, method="lora"))


def test_a_single_fault_keeps_its_kind(good: RunConfig, write_jsonl: Writer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        check(replace(good, data=(str(tmp_path / "no.jsonl"),)))
    broken = write_jsonl([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3, "broken.jsonl")
    broken.write_text(broken.read_text() + "{nonsense\n")
    with pytest.raises(BadRow, match="row 4"):
        check(replace(good, data=(str(broken),)))
    assert len(check(replace(good, data=(str(broken),), skip_bad_rows=True)).dataset.refused) == 1
    with pytest.raises(DataError):
        check(replace(good, data=(str(write_jsonl([{"odd": 1}], "odd.jsonl")),)))
    with pytest.raises(ModelError):
        check(replace(good, model_name_or_path=str(tmp_path / "no-model")))


def test_a_hub_is_asked_nothing_for_a_run_that_cannot_be(good: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(name: str, revision: str, look: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "small_files", asked)
    assert "lora_r" in told(replace(good, model_name_or_path="owner/model", lora_r=0))


def test_a_hub_out_of_reach_is_not_a_fault_of_the_config(good: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, revision: str, look: object) -> None:
        raise FetchError("the hub cannot be reached")

    monkeypatch.setattr(hub, "small_files", unreachable)
    with pytest.raises(FetchError) as caught:
        check(replace(good, model_name_or_path="owner/model"))
    assert caught.value.exit_code is ExitCode.FAILED


def test_a_limit_of_the_device_is_told(good: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no GPU" in told(replace(good, optim="paged_adamw_8bit"))
    monkeypatch.setattr(machine, "look", lambda: CARD)
    assert "bfloat16" in told(replace(good, dtype="bfloat16"))
    assert "grad_matmul: RTX 2080 makes no products in fp8; say auto" in told(replace(good, method="lora-8bit", grad_matmul="fp8"))
    assert "grad_matmul" not in told(replace(good, method="lora-8bit", grad_matmul="int8", dtype="bfloat16"))


def test_rows_that_cannot_lie_end_to_end_are_told_why_once(good: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rows cannot lie end to end: fused layers compute in bfloat16, on a CUDA card" in told(replace(good, packing="on"))
    assert told(replace(good, packing="on", use_dora=True)).count("end to end") == 1
    monkeypatch.setattr(machine, "look", lambda: replace(CARD, bf16=True))
    assert check(replace(good, packing="on", dtype="auto")).run.packing == "on"


def test_four_bits_on_a_processor_are_no_fault(good: RunConfig) -> None:
    assert check(replace(good, method="qlora", dtype="float32", optim="adamw_8bit")).machine is CPU


def test_what_does_not_fit_is_refused_with_the_cheapest_changes(good: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Machine("RTX 2080", "cuda", 2**30, bf16=False, compute_capability=(7, 5))
    monkeypatch.setattr(machine, "look", lambda: small)
    with pytest.raises(WontFit) as caught:
        check(replace(good, per_device_train_batch_size=1024, gradient_checkpointing="false"))
    assert caught.value.exit_code is ExitCode.WILL_NOT_FIT
    assert "try --set " in str(caught.value)
    assert re.search(r"per_device_train_batch_size=\d+ --set gradient_accumulation_steps=\d+ \(", str(caught.value))
    with pytest.raises(WontFit, match=r"no single change is enough.*these save most: --set"):
        check(replace(good, memory_limit_gib=0.01))
    assert not check(replace(good, per_device_train_batch_size=1024, gradient_checkpointing="false"), fit=False).budget.fits


def test_a_memory_limit_counts_as_the_size_of_the_device(good: RunConfig) -> None:
    with pytest.raises(WontFit):
        check(replace(good, memory_limit_gib=0.1))


def test_a_tokenizer_of_another_model_is_told(good: RunConfig, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = (folder / "config.json").read_text().replace('"vocab_size": 264', '"vocab_size": 100')
    (folder / "config.json").write_text(config)
    assert "do not belong together" in told(replace(good, model_name_or_path=str(folder)))


def test_no_space_is_told_with_both_figures(good: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = preflight.shutil.disk_usage(good.data[0])
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _path: usage._replace(free=2**20))
    with pytest.raises(SpaceError, match=r"64 MiB of disk and 1 MiB are free"):
        check(good)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_told(good: RunConfig, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(SpaceError, match="not writable"):
        check(replace(good, runs_dir=str(locked / "runs")))


def test_an_unknown_built_in_model_names_the_one_there_is(good: RunConfig) -> None:
    assert "builtin:smollm2-135m" in told(replace(good, model_name_or_path="builtin:smollm"))


def test_the_demo_is_checked_without_a_fetch() -> None:
    run = RunConfig(model_name_or_path="builtin:smollm2-135m", data=("builtin:python-docs",), max_length=512)
    found = check(run)
    assert (found.model_spec.name, found.model_files.complete) == ("builtin:smollm2-135m", False)


def test_attention_that_a_family_lacks_is_refused() -> None:
    gemma = models.find("google/gemma-2-9b-it")
    assert gemma is not None
    run = RunConfig(model_name_or_path=gemma.name, data=("d",))
    card = Machine("small", "cuda", 8 * 2**30, bf16=True)
    older = replace(card, bf16=False)
    for device, changes in ((older, {}), (card, {"fused_layers": "off"}), (card, {"use_dora": True}), (card, {"dtype": "float32"})):
        (problem,) = preflight.family_problems(replace(run, **changes), gemma, device)  # type: ignore[arg-type]
        told = "attn_implementation: sdpa does not exist for the family gemma2 where its layers are not fused; say eager"
        assert str(problem) == told
    assert preflight.family_problems(replace(run, attn_implementation="eager"), gemma, older) == []
    assert preflight.family_problems(run, gemma, card) == []
    for device, offered in ((card, True), (older, False)):
        found = fixes.fixes(gemma, replace(run, attn_implementation="eager"), device)
        assert any(fix.values == {"attn_implementation": "sdpa"} for fix in found) is offered


@pytest.mark.parametrize(("content", "fault"), [(None, "no tokenizer.json in it"), ("{torn", "its tokenizer.json cannot be read")])
def test_a_model_without_a_tokenizer_is_refused(good: RunConfig, tmp_path: Path, content: str | None, fault: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good.model_name_or_path, folder)
    (folder / "tokenizer.json").unlink()
    if content:
        (folder / "tokenizer.json").write_text(content)
    assert f"{folder}: {fault}" in told(replace(good, model_name_or_path=str(folder)))


def test_numbers_out_of_range_are_told_in_full(good: RunConfig) -> None:
    assert "max_length: 2000000 is out of range; it must be at most 1048576" in told(replace(good, max_length=2_000_000))


def test_empty_names_are_refused_and_never_mean_this_folder(good: RunConfig) -> None:
    text = told(replace(good, data=("",), runs_dir="", revision=""))
    assert [line.split(":")[0] for line in text.splitlines()] == ["data", "revision", "runs_dir"]


def test_preflight_loads_no_torch() -> None:
    code = "import sys, qlora_tui.engine.preflight\nassert not {'torch', 'transformers', 'numpy', 'psutil'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
