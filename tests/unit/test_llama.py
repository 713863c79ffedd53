"""llama.cpp reads what was written: the same tokens, the same losses; and its own tools, found on the PATH.

The tests that ask llama.cpp itself need the extra `llama`; without it they are skipped.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_families as families
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_tui.engine.data import Tokenizer, TokenRow, load_tokenizer
from qlora_tui.engine.errors import ConfigError, ModelError, Stopped
from qlora_tui.engine.export import gguf, gguf_weights, llama

CASES = list(families.CASES)
asks_llama = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs the extra llama, built from source")

LIMITS = {"f16": 0.01, "q8_0": 0.5}
"""Nats a token on one row: 16-bit arithmetic, and 8-bit weights of models with random weights, which rounding hurts most."""


@dataclasses.dataclass(frozen=True)
class Original:
    """A merged folder with its tokenizer, some rows, and their losses in transformers with 32-bit arithmetic."""

    folder: Path
    tokenizer: Tokenizer
    rows: list[TokenRow]
    losses: list[float]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Original]:
    home = tmp_path_factory.mktemp("merged")
    known: dict[str, Original] = {}

    def build(name: str) -> Original:
        if name not in known:
            folder = families.build(families.CASES[name], home / name)
            rows = families.rows_of(folder, [*families.NASTY, " ".join(families.NASTY)[:230]])
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            known[name] = Original(folder, load_tokenizer(folder), rows, families.losses(model, rows))
        return known[name]

    return build


def write(folder: Path, out: Path, kind: str = "f16") -> Path:
    gguf.write(folder, out, kind, lambda _done, _total: None)
    return out


def worst(found: list[float], wanted: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, wanted, strict=True))


@asks_llama
@pytest.mark.parametrize("kind", gguf.KINDS)
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_gives_the_same_losses(name: str, kind: str, original: Callable[[str], Original], tmp_path: Path) -> None:
    wanted = original(name)
    assert 128 < max(len(row.input_ids) for row in wanted.rows) < 300  # some pieces, and the mistral's window is not felt
    found = llama.losses(write(wanted.folder, tmp_path / "m.gguf", kind), wanted.rows)
    assert worst(found, wanted.losses) < LIMITS[kind]
    assert abs(sum(found) - sum(wanted.losses)) / len(found) < LIMITS[kind] / 10


@asks_llama
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_reads_the_same_tokens(name: str, original: Callable[[str], Original], tmp_path: Path) -> None:
    wanted = original(name)
    case, out = families.CASES[name], write(wanted.folder, tmp_path / "m.gguf")
    texts = [chat(wanted.tokenizer, text) for text in families.NASTY if text.strip()]
    texts += [case.full.replace("«", "").replace("»", "") for case in (case.chat,)]
    if name != "mistral":  # it puts a space before the first word of a plain text alone, which llama.cpp cannot
        texts += families.NASTY
    assert llama.ask(out, (), texts).tokens == [wanted.tokenizer.encode(text)[0] for text in texts]


def chat(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.render(
        [{"role": "user", "content": text}, {"role": "assistant", "content": text}, {"role": "user", "content": "  More? "}]
    )


def unpaired(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llama", "mistral"):
        monkeypatch.setitem(gguf.FAMILIES, name, dataclasses.replace(gguf.FAMILIES[name], paired=False))


def norms_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gguf.FAMILIES, "gemma3_text", dataclasses.replace(gguf.FAMILIES["gemma3_text"], norms_from_one=False))


def without(method: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(gguf_weights.GGUFWriter, method, lambda *_: None)


def unstretched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_weights, "_rope_factors", lambda _: ())


FAULTS = (
    ("llama", unpaired),
    ("smollm", unpaired),
    ("llama", unstretched),
    ("llama2", without("add_rope_scaling_factor")),
    ("qwen2", without("add_rope_scaling_type")),
    ("gemma3", norms_as_they_are),
    ("gemma3", without("add_sliding_window")),
    ("gemma3", without("add_rope_freq_base_swa")),
    ("gemma3", without("add_rope_scaling_factor")),
)


@asks_llama
@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_fault_of_the_writer_shows(
    name: str,
    fault: Callable[[pytest.MonkeyPatch], None],
    original: Callable[[str], Original],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = original(name)
    fault(monkeypatch)
    found = llama.losses(write(wanted.folder, tmp_path / "m.gguf"), wanted.rows)
    assert worst(found, wanted.losses) > 4 * LIMITS["f16"]


@asks_llama
def test_a_missing_size_is_seen_by_llama_cpp_itself(
    original: Callable[[str], Original], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = original("qwen3")
    without("add_key_length")(monkeypatch)
    with pytest.raises(ModelError, match=r"llama\.cpp cannot use the file: .*error"):
        llama.losses(write(wanted.folder, tmp_path / "m.gguf"), wanted.rows)


@asks_llama
def test_another_model_shows(original: Callable[[str], Original], tmp_path: Path) -> None:
    wanted = original("llama")
    other = families.build(families.CASES["llama"], tmp_path / "other", seed=1)
    found = llama.losses(write(other, tmp_path / "m.gguf"), wanted.rows)
    assert worst(found, wanted.losses) > LIMITS["q8_0"]


@asks_llama
def test_only_trained_tokens_count_and_progress_is_told(original: Callable[[str], Original], tmp_path: Path) -> None:
    wanted = original("smollm")
    out, row = write(wanted.folder, tmp_path / "m.gguf"), wanted.rows[-1]
    ones = [TokenRow(number, row.input_ids, bytes(number == place for place in range(len(row.input_ids)))) for number in (1, 63, 64, 65)]
    both = TokenRow(9, row.input_ids, bytes(place in (1, 63, 64, 65) for place in range(len(row.input_ids))))
    seen: list[tuple[int, int]] = []
    *alone, together = llama.losses(out, [*ones, both], note=lambda done, total: seen.append((done, total)))
    assert together == pytest.approx(sum(alone) / 4, abs=1e-6)
    assert seen[-1] == (5, 5)


@asks_llama
@pytest.mark.parametrize("data", [b"no such thing", b"GGUF" + b"\0" * 64])
def test_a_file_that_llama_cpp_cannot_read_is_said_so(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"m\.gguf: llama\.cpp cannot use the file"):
        llama.tokenize(tmp_path / "m.gguf", "text")


@asks_llama
def test_a_stop_ends_the_question(original: Callable[[str], Original], tmp_path: Path) -> None:
    wanted = original("smollm")
    with pytest.raises(Stopped):
        llama.losses(write(wanted.folder, tmp_path / "m.gguf"), wanted.rows, stopping=lambda: True)


def test_without_the_extra_the_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install 'qlora-tui[llama]'" in llama.available()
    with pytest.raises(ModelError, match="not installed"):
        llama.tokenize(tmp_path / "m.gguf", "text")


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_tools_are_found_on_the_path(tools: Path) -> None:
    assert llama.external() is None
    quantize = program(tools, "llama-quantize", "#!/bin/sh\n")
    assert llama.external() == llama.LlamaTools(str(quantize), "")
    convert = program(tools, "convert_hf_to_gguf.py", "")
    assert llama.external() == llama.LlamaTools(str(quantize), str(convert))


ECHO = "import json, sys\nopen(sys.argv[3], 'w').write(json.dumps(sys.argv[1:]))\n"
FAILS = "import sys\nopen(sys.argv[3], 'w').write('half')\nsys.exit('ERROR: no such architecture')\n"


def test_the_converter_writes_what_is_not_written_here(tools: Path, tmp_path: Path) -> None:
    found = llama.LlamaTools(convert=str(program(tools, "convert_hf_to_gguf.py", ECHO)))
    out = tmp_path / "out" / "m.gguf"
    assert llama.convert(found, tmp_path / "merged", out, "q8_0") == out.stat().st_size
    assert json.loads(out.read_text()) == [str(tmp_path / "merged"), "--outfile", f"{out}.partial", "--outtype", "q8_0"]
    assert list(out.parent.iterdir()) == [out]


def test_the_quantizer_makes_smaller_kinds(tools: Path, tmp_path: Path) -> None:
    found = llama.LlamaTools(quantize=str(program(tools, "llama-quantize", '#!/bin/sh\necho "$@" > "$2"\n')))
    out = tmp_path / "m-q4.gguf"
    assert llama.quantize(found, tmp_path / "m.gguf", out, "q4_k_m") > 0
    assert out.read_text() == f"{tmp_path / 'm.gguf'} {out}.partial Q4_K_M\n"


def test_a_tool_that_fails_leaves_nothing_and_is_quoted(tools: Path, tmp_path: Path) -> None:
    found = llama.LlamaTools(convert=str(program(tools, "convert_hf_to_gguf.py", FAILS)))
    with pytest.raises(ModelError, match="no such architecture"):
        llama.convert(found, tmp_path / "merged", tmp_path / "out" / "m.gguf", "f16")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tool_that_writes_nothing_is_no_success(tools: Path, tmp_path: Path) -> None:
    found = llama.LlamaTools(quantize=str(program(tools, "llama-quantize", "#!/bin/sh\n")))
    with pytest.raises(ModelError, match="wrote no file"):
        llama.quantize(found, tmp_path / "m.gguf", tmp_path / "out.gguf", "q6_k")


def test_a_tool_is_stopped(tools: Path, tmp_path: Path) -> None:
    found = llama.LlamaTools(convert=str(program(tools, "convert_hf_to_gguf.py", "import time\ntime.sleep(60)\n")))
    began = time.monotonic()
    with pytest.raises(Stopped):
        llama.convert(found, tmp_path, tmp_path / "m.gguf", "f16", stopping=lambda: True)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("kind", ["q4_k_m", "f32"])
def test_the_converter_is_not_asked_for_other_kinds(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=kind):
        llama.convert(llama.LlamaTools(), tmp_path, tmp_path / "m.gguf", kind)


def test_missing_tools_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"convert_hf_to_gguf\.py"):
        llama.convert(llama.LlamaTools(), tmp_path, tmp_path / "m.gguf", "f16")
    with pytest.raises(ModelError, match="llama-quantize"):
        llama.quantize(llama.LlamaTools(), tmp_path, tmp_path / "m.gguf", "q6_k")
    with pytest.raises(ConfigError, match="q9"):
        llama.quantize(llama.LlamaTools(), tmp_path, tmp_path / "m.gguf", "q9")
