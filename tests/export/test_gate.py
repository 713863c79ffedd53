"""The parity gate: exports that are what was trained pass; one with a fault planted in it is refused, by what lies on disk."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tokenizer
from export_runs import bench_of, opened, target_of
from safetensors.torch import load_file, save_file

from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.export import Target, gguf, llama, merged, ollama
from qlora_tui.engine.export.as_gguf import only
from qlora_tui.engine.export.make import make
from qlora_tui.engine.export.target import Source, Work

KINDS = [("adapter", ""), ("merged", ""), ("gguf", "f16"), ("gguf", "q8_0"), ("ollama", "f16")]


@pytest.fixture
def without_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads the file back, whether or not llama.cpp is installed."""
    monkeypatch.setattr(llama, "available", lambda: "llama-cpp-python is not installed here")


def faulty(target: Target, plant: Callable[[Path], object]) -> Target:
    """The target with a fault planted after it has written."""

    def write(work: Work) -> None:
        target.write(work)
        plant(work.folder)

    return dataclasses.replace(target, write=write)


def faults(source: Source, name: str, plant: Callable[[Path], object], tmp_path: Path, kind: str = "") -> str:
    """Export with a fault planted, check that it was refused and kept apart, and return the sentences."""
    out = tmp_path / "out"
    record = make(bench_of(source), faulty(target_of(name), plant), out, kind)
    assert not record["parity"]["passed"]
    assert not out.exists()
    assert Path(record["path"]) == tmp_path / "out.failed"
    assert json.loads((tmp_path / "out.failed" / "export.json").read_text())["parity"] == _listed(record["parity"])
    return "\n".join(record["parity"]["faults"])


def _listed(parity: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in parity.items()}


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_what_was_trained_passes(source: Source, tmp_path: Path, without_llama: None, name: str, kind: str) -> None:
    record = make(bench_of(source), target_of(name), tmp_path / "out", kind)
    parity = record["parity"]
    assert parity["passed"], parity["faults"]
    assert parity["rows"] == parity["prompts"] == 6
    assert parity["prompt_tokens_differing"] == 0
    assert parity["stop"] == "<|im_end|>"
    assert parity["difference"] < (0.02 if kind == "q8_0" else 0.002)
    assert abs(parity["adapter_loss"] - parity["base_loss"]) > 0.05
    assert sorted(record["files"]) == sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != "export.json")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_merged_model_is_what_its_folder_says_to_everybody(source: Source, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make(bench_of(source), target_of("merged"), tmp_path / "out", "")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


# The three planted faults


def unmerged(source: Source) -> Callable[[Path], object]:
    return lambda folder: shutil.copyfile(source.base / "model.safetensors", folder / "model.safetensors")


def test_a_model_without_the_adapter_is_refused(source: Source, tmp_path: Path) -> None:
    assert "it is the base, without the adapter" in faults(source, "merged", unmerged(source), tmp_path)


def test_a_gguf_of_the_base_is_refused(source: Source, tmp_path: Path, without_llama: None) -> None:
    def plant(folder: Path) -> None:
        base = tmp_path / "base"
        shutil.copytree(source.base, base)
        only(folder).unlink()
        gguf.write(base, folder / "base.gguf", "f16", lambda done, total: None)

    assert "it is the base, without the adapter" in faults(source, "gguf", plant, tmp_path, "f16")


def test_half_of_an_adapter_is_refused(source: Source, tmp_path: Path) -> None:
    def plant(folder: Path) -> None:
        base, found = (load_file(path / "model.safetensors") for path in (source.base, folder))
        kept = {name: base[name] if ".1." in name else tensor for name, tensor in found.items()}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    assert "may be rounding" in faults(source, "merged", plant, tmp_path)


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_another_template_is_refused(source: Source, tmp_path: Path, name: str) -> None:
    def plant(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|im_start|>' + message", "<|im_start|> ' + message"))

    told = faults(source, name, plant, tmp_path)
    assert told.startswith("it writes chats otherwise than they were trained")
    assert "token 2 of a prompt begins ' use" in told


def test_another_template_in_a_modelfile_is_refused(source: Source, tmp_path: Path, without_llama: None) -> None:
    def plant(folder: Path) -> None:
        path = folder / "Modelfile"
        path.write_text(path.read_text().replace("<|im_start|>assistant\n", "<|im_start|>assistant"))

    assert "it writes chats otherwise" in faults(source, "ollama", plant, tmp_path, "f16")


def test_another_template_in_a_gguf_file_is_refused(
    source: Source, tmp_path: Path, without_llama: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merged.write_to

    def write_to(work: Work, out: Path) -> None:
        real(work, out)
        (out / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")

    monkeypatch.setattr(merged, "write_to", write_to)
    assert "it writes chats otherwise" in faults(source, "gguf", lambda folder: None, tmp_path, "f16")


def test_a_wrong_stop_token_is_refused(source: Source, tmp_path: Path, without_llama: None) -> None:
    def plant(folder: Path) -> None:
        path = folder / "Modelfile"
        path.write_text(path.read_text().replace('stop "<|im_end|>"', 'stop "<|endoftext|>"'))

    told = faults(source, "ollama", plant, tmp_path, "f16")
    assert told == "answers were trained to end with <|im_end|>, and it stops at <|endoftext|>: it would not stop"


def test_a_wrong_stop_token_in_a_merged_model_is_refused(source: Source, tmp_path: Path) -> None:
    def plant(folder: Path) -> None:
        for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
            text = (folder / name).read_text()
            (folder / name).write_text(re.sub(r"<\|im_end\|>(?=\",?\n|\", \"pad)", "<|endoftext|>", text).replace(": 258", ": 256"))

    assert "it would not stop" in faults(source, "merged", plant, tmp_path)


def test_a_stop_token_that_the_base_does_not_name_is_named_by_the_export(
    ran: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    for name, old, new in (
        ("tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"'),
        ("config.json", "258", "256"),
    ):
        (model / name).write_text((model / name).read_text().replace(old, new))
    (model / "generation_config.json").unlink()
    record = make(bench_of(opened(ran(model))), target_of("merged"), tmp_path / "out", "")
    assert record["parity"]["passed"], record["parity"]["faults"]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [256, 258]}


# What the gate cannot see it says


def test_an_adapter_that_moves_nothing_is_told_not_judged(ran: Callable[..., Path], tmp_path: Path) -> None:
    source = opened(ran(learning_rate=1e-7))
    record = make(bench_of(source), faulty(target_of("merged"), unmerged(source)), tmp_path / "out", "")
    assert record["parity"]["passed"]
    assert "cannot tell whether it is in the export" in record["parity"]["notes"][0]


def test_data_that_are_gone_are_replaced_by_documentation(ran: Callable[..., Path], tmp_path: Path) -> None:
    source = opened(ran())
    Path(source.run.data[0]).unlink()
    parity = make(bench_of(source), target_of("merged"), tmp_path / "out", "")["parity"]
    assert parity["data"] == "rows of Python's documentation"
    assert parity["rows"] == 32
    assert parity["passed"], parity["faults"]
    assert parity["quantized_loss"] is None


def test_unchecked_says_so(source: Source, tmp_path: Path) -> None:
    record = make(bench_of(source), target_of("merged"), tmp_path / "out", "", checked=False)
    assert record["parity"] is None


# Kinds of adapters and bases


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "pissa", "use_rslora": True, "learning_rate": 2e-3},
        {"method": "qlora"},
    ],
    ids=str,
)
def test_every_kind_of_run_exports(ran: Callable[..., Path], tmp_path: Path, values: dict[str, Any]) -> None:
    bench = bench_of(opened(ran(**values)))
    for name in ("adapter", "merged"):
        parity = make(bench, target_of(name), tmp_path / name, "")["parity"]
        assert parity["passed"], parity["faults"]
        assert parity["difference"] < 1e-4


def test_a_base_in_four_bits_has_nothing_to_merge_into_and_its_adapter_is_exported(
    ran: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    from test_variants import write_four_bits

    from qlora_tui.engine.errors import ConfigError

    source = opened(ran(write_four_bits(tiny_model, tmp_path / "four"), method="qlora"))
    with pytest.raises(ConfigError, match="no 16-bit weights to merge into; export the adapter"):
        make(bench_of(source), target_of("merged"), tmp_path / "out", "")
    record = make(bench_of(source), target_of("adapter"), tmp_path / "adapter", "")
    assert record["parity"]["passed"], record["parity"]["faults"]


def test_prompts_and_completions_of_a_base_without_a_template_are_compared_as_they_were_trained(
    ran: Callable[..., Path], tiny_model: Path, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    write_tokenizer(model, None)  # it knows the tokens of ChatML, so that is assumed for chats, and only for chats
    data = write_jsonl([{"prompt": f"{n} and {n} is ", "completion": str(2 * n)} for n in range(40)], "sums.jsonl")
    parity = make(bench_of(opened(ran(model, data=(str(data),)))), target_of("merged"), tmp_path / "out", "")["parity"]
    assert parity["passed"], parity["faults"]
    assert (parity["rows"], parity["prompts"], parity["data"]) == (6, 0, "held-out rows")
    assert "6 of 6 prompts have tools, or are texts of another form than chats and were not compared" in parity["notes"]


def test_a_smaller_type_is_made_by_llama_quantize_from_an_f16_file(
    source: Source, tmp_path: Path, without_llama: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantize(tools: llama.LlamaTools, whole: Path, out: Path, kind: str, **_: object) -> int:
        assert (tools.quantize, kind) == ("/bin/llama-quantize", "q4_k_m")
        shutil.copyfile(whole, out)
        return out.stat().st_size

    monkeypatch.setattr(llama, "external", lambda: llama.LlamaTools(quantize="/bin/llama-quantize"))
    monkeypatch.setattr(llama, "quantize", quantize)
    record = make(bench_of(source), target_of("gguf"), tmp_path / "out", "q4_k_m")
    assert record["parity"]["passed"], record["parity"]["faults"]
    assert record["parity"]["limit"] == 0.3
    assert only(tmp_path / "out").name.endswith("-tuned-q4_k_m.gguf")


# Using what is there


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    real, calls = merged.write_to, []

    def write_to(work: Work, out: Path) -> None:
        calls.append(out)
        real(work, out)

    with monkeypatch.context() as patch:
        patch.setattr(merged, "write_to", write_to)
        yield calls


def test_an_export_uses_what_an_earlier_one_made_of_the_same_adapter(
    source: Source, without_llama: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = source.folder / "export"
    bench = bench_of(source)
    with counted(monkeypatch) as calls:
        make(bench, target_of("merged"), home / "merged", "")
        first = len(calls)
        make(bench, target_of("gguf"), home / "gguf", "f16")
        make(bench, target_of("ollama"), home / "ollama", "f16")
        assert len(calls) == first
        assert only(home / "gguf").stat().st_ino == only(home / "ollama").stat().st_ino
        (home / "merged" / "model.safetensors").write_bytes(b"torn")
        make(bench, target_of("ollama"), home / "other", "q8_0")
        assert len(calls) == first + 1


def test_a_modelfile_without_its_parts_is_refused(source: Source, tmp_path: Path, without_llama: None) -> None:
    def plant(folder: Path) -> None:
        (folder / ollama.MODELFILE).write_text("FROM ./x.gguf\n")

    with pytest.raises(ModelError, match="the Modelfile has no TEMPLATE"):
        make(bench_of(source), faulty(target_of("ollama"), plant), tmp_path / "out", "f16")
