"""The bench's checkpoint and its plain peers, on a tiny shape: what is measured is QLoRA on NF4 weights, and rows stay apart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tests.bench import base_gate, one, peers
from tests.bench.workloads import WORKLOADS, Case, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # PEFT calls it
CASE = dataclasses.replace(WORKLOADS["b"][0], backend="plain-lean", length=64, rows=3, at_once=2, warm=1, steps=2, tiny=True)


@pytest.mark.parametrize("sixteen", [False, True])
@pytest.mark.parametrize("workload", ["a", "c"])
def test_every_layer_of_a_peer_holds_four_bits(tmp_path: Path, workload: str, sixteen: bool) -> None:
    case = dataclasses.replace(CASE, shape=WORKLOADS[workload][0].shape, sixteen=sixteen)
    one.make(case, tmp_path / "model", cpu=True)
    net = peers.base(tmp_path / "model", "cpu")
    linear = [module for module in net.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 7 * 4
    assert all(isinstance(module, Linear4bit) and module.weight.quant_state.nested for module in linear)
    assert all(torch.isfinite(parameter.float()).all() for parameter in net.parameters())


def test_packed_rows_have_the_loss_of_padded_ones(tmp_path: Path) -> None:
    one.make(CASE, tmp_path / "model", cpu=True)
    net = peers.base(tmp_path / "model", "cpu").eval()
    write_rows(CASE, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()][:3]
    with torch.no_grad():
        apart, together = (float(net(**batch).loss) for batch in (peers.padded(rows, "cpu"), peers.packed(rows, "cpu", unsloth=False)))
    assert apart == pytest.approx(together, abs=1e-3)  # rows that see each other differ by 5e-3


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_a_plain_peer_trains_on_every_row_once(tmp_path: Path, packing: str) -> None:
    case = dataclasses.replace(CASE, packing=packing, backend="plain")
    one.make(case, tmp_path / "model", cpu=True)
    write_rows(case, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    told = peers.measure(case, tmp_path / "model", tmp_path / "rows.jsonl", cpu=True)
    assert told["tokens"] == [sum(len(row["input_ids"]) for row in rows[first : first + 3]) for first in (3, 6)]
    assert Case.of(json.dumps(dataclasses.asdict(case))) == case


def test_the_gate_of_the_8_bit_base_goes_on_where_it_stopped(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gate.jsonl"
    given = ["--model", str(tiny_model), "--out", str(out), "--steps", "1", "--held", "8", "--seeds", "1", "2"]
    assert base_gate.main([*given, "--methods", "lora"]) == 0
    out.write_text(out.read_text() + '{"method": "lora-8bit", "se')  # a call that was cut off
    first = [json.loads(line) for line in out.read_text().splitlines()[:2]]
    assert base_gate.main(given) == 0
    assert "good enough: " in capsys.readouterr().out
    made = base_gate.read(out)
    assert made[:2] == first
    assert {(line["method"], line["seed"]) for line in made} == {(name, seed) for name in ("lora", "lora-8bit", "qlora") for seed in (1, 2)}
    assert len({(line["method"], line["held_out"]) for line in made}) == len(made) == 6  # nothing was done twice, and seeds differ
    assert len({line["before"] for line in made if line["method"] == "lora"}) == 1  # of the same rows
    monkeypatch.setattr(base_gate, "one", lambda *_: pytest.fail("all runs are there"))
    assert base_gate.main(given) == 0
