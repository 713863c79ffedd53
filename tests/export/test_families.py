"""Every family that is written as GGUF, trained a little and exported to every target: the gate lets each pass, and says how near it is."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from export_runs import bench_of, opened, target_of
from gguf_families import CASES, build

from qlora_tui.engine.export import llama
from qlora_tui.engine.export.make import make

TARGETS = (("adapter", ""), ("merged", ""), ("gguf", "f16"), ("gguf", "q8_0"), ("ollama", "q8_0"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_family_passes_the_gate_in_every_form(ran: Callable[..., Path], tmp_path: Path, name: str) -> None:
    if name in ("smollm3", "granite") and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("transformers reads no GGUF of it, and llama-cpp-python is not installed")
    base = build(CASES[name], tmp_path / "base")
    attention = "eager" if name == "gemma2" else "sdpa"
    source = opened(ran(base, learning_rate=5e-3, max_length=400, attn_implementation=attention))
    bench = bench_of(source)
    for target, kind in TARGETS:
        parity = make(bench, target_of(target), tmp_path / f"{target}-{kind}", kind)["parity"]
        moved = abs(parity["adapter_loss"] - parity["base_loss"])
        told = {"moved": moved, **{key: parity[key] for key in ("difference", "worst", "prompts", "engine", "stop")}}
        print(name, target, kind, json.dumps(told))
        assert parity["passed"], parity["faults"]
        assert parity["prompts"] == parity["rows"] == 6
        assert moved > 5 * parity["limit"]
    assert llama.available() or "llama.cpp" in parity["engine"]
