"""One measurement in one process, asked by `step.py`: the last line of its output is `RESULT` and JSON.

usage: python -m tests.bench.one ceiling [--cpu]
       python -m tests.bench.one make CASE MODEL [--cpu]     write the checkpoint, 4-bit or in bfloat16
       python -m tests.bench.one run CASE MODEL DATA [--cpu]
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.workloads import Case, flops

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".pkg"), str(ROOT / "tests"), str(ROOT / "tests/loop"), str(ROOT / "tests/gpu")]
GONE = ("OutOfMemoryError", "WontFit")
PROFILED = 3


def ceiling(*, cpu: bool) -> dict[str, Any]:
    """Return this device's name and its bf16 matmul rate in FLOP/s: the median of 20 products of 8192^3."""
    import torch

    size = 256 if cpu else 8192
    device = "cpu" if cpu else "cuda"
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    right, seconds = torch.randn_like(left), []
    for _ in range(25):
        if not cpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        left @ right
        if not cpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    name = "CPU" if cpu else torch.cuda.get_device_name()
    return {"device": name, "torch": torch.__version__, "ceiling": 2 * size**3 / statistics.median(seconds[5:])}


def make(case: Case, model: Path, *, cpu: bool) -> dict[str, Any]:
    """Write a random checkpoint of the case's shape: as transformers saves one, or its quantized form without the bf16 detour.

    The 4-bit one holds what bitsandbytes' layers put into a state dict, so transformers, PEFT and Unsloth load it like any other.
    """
    import shapes
    import torch
    from safetensors.torch import save_file

    from qlora_tui.engine.spec import from_values

    device = torch.device("cpu" if cpu else "cuda")
    spec = shapes.spec_of(case.shape, tiny=case.tiny)
    if case.sixteen:
        shapes.write_checkpoint(model, spec, device)
        return {"model": str(model)}
    shapes.write_tokenizer(model)
    net = shapes.random_base(spec, from_values({"model_name_or_path": "x", "method": "qlora"}), device, torch.bfloat16)
    state = net.state_dict()
    if spec.tie_word_embeddings:
        state.pop("lm_head.weight")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, model / "model.safetensors", {"format": "pt"})
    config = net.config.to_dict() | {
        "architectures": [type(net).__name__],
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        },
    }
    (model / "config.json").write_text(json.dumps(config))
    return {"model": str(model)}


def ours(case: Case, model: Path, data: Path, *, cpu: bool) -> dict[str, Any]:
    """Train through the product's own job, on a base made on the device, or on `model` where its weights are of 16 bits."""
    with tempfile.TemporaryDirectory() as home:
        return _ours(case, model, data, Path(home), cpu=cpu)


def _ours(case: Case, model: Path, data: Path, home: Path, *, cpu: bool) -> dict[str, Any]:
    import contextlib

    import shapes
    from loop_driver import drive
    from tests.bench.kernel_time import Profile
    from tests.bench.peers import memory

    from qlora_tui.engine.events import Finding, Planned, Stepped

    shapes.use_home(home)
    machine = shapes.device_of(cpu)
    if case.older:
        machine = dataclasses.replace(machine, bf16=False, compute_capability=(7, 5))
    spec = shapes.spec_of(case.shape, tiny=case.tiny)
    if not case.sixteen:
        model = home / "model"
        shapes.write_small_files(model, spec)
    run = run_of(case, model, data, home, cpu=cpu)
    profile = Profile(cpu=cpu, first=case.warm, last=case.warm + PROFILED) if case.profile else None
    held: list[dict[str, Any]] = []
    spans = list[float]()
    mark = time.monotonic()

    def listen(stepped: Stepped) -> None:
        nonlocal mark
        spans.append(time.monotonic() - mark)  # from one step's end to the next one's: what lies between two is part of it
        mark = time.monotonic()
        if stepped.step == stepped.total_steps:
            held.append(memory(cpu=cpu))  # while the model is there, and once, as with the peers
        if profile:
            profile.step(stepped)

    with contextlib.nullcontext() if case.sixteen else shapes.made_here(spec):
        ran = drive(run, home / "run", machine=machine, rehearse=True, on_step=listen)
    if ran.error is not None:
        raise ran.error
    if skipped := [step for step in ran.of(Stepped) if step.skipped]:
        raise SystemExit(f"{len(skipped)} steps were not applied: they measure nothing")
    late = ran.of(Stepped)[case.warm :]
    result: dict[str, Any] = {
        "seconds": spans[case.warm :],
        "tokens": [step.tokens for step in late],
        "supervised": [step.supervised_tokens for step in late],
        "allocated": max(step.memory_peak_bytes for step in ran.of(Stepped)),
        "reserved": held[-1]["reserved"],
        "choices": dict(ran.of(Planned)[-1].choices),
        "findings": [finding.message for finding in ran.of(Finding) if finding.detector == "memory"],  # rows halved, a full cache
        "last_loss": late[-1].loss,
        "data_share": sum(step.data_seconds for step in late) / sum(spans[case.warm :]),
        "device": held[-1]["device"],
        "rows": [row for step in late for row in step.rows],
        "config": json.loads((model / "config.json").read_text()),
    }
    if profile:
        result["times"] = profile.told(spans[case.warm : case.warm + PROFILED])
    return result


def run_of(case: Case, model: Path, data: Path, home: Path, *, cpu: bool) -> Any:
    """Return the settings of ours; nothing is held out or saved on the way, so that a step is a step."""
    from qlora_tui.engine.spec import from_values

    layers = {"full": "true", "offloaded": "true", "none": "false", "auto": "auto"}[case.setting]
    free = case.setting == "auto" and case.rows > 1  # the planner chooses rows at once too; `accumulation` is then the rows of a step
    steps = case.warm + case.steps
    return from_values(
        {
            "model_name_or_path": str(model),
            "method": case.method,
            "grad_matmul": case.gradients,
            "packing": "on" if case.packing == "packed" else "off",
            "lora_r": case.rank,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "optim": "adamw_torch" if cpu else "paged_adamw_8bit",
            "data": (str(data),),
            "data_format": "tokenized",
            "val_set_size": 0.0,
            "final_checks": False,
            "max_length": case.length,
            "per_device_train_batch_size": 0 if free else case.at_once,
            "gradient_accumulation_steps": case.rows if free else -(-case.rows // case.at_once),
            "gradient_checkpointing": layers,
            "offload_checkpoints": "on" if case.setting == "offloaded" else "auto",
            "memory_limit_gib": 0.0 if cpu else case.limit,
            "max_steps": steps,
            "num_train_epochs": 1.0,
            "save_steps": steps,
            "runs_dir": str(home),
        }
    )


def run(case: Case, model: Path, data: Path, *, cpu: bool) -> dict[str, Any]:
    """Measure a case; running out of memory is a result, any other error is told and is none."""
    from tests.bench import peers

    try:
        found = (ours if case.backend == "ours" else peers.measure)(case, model, data, cpu=cpu)
    except Exception as error:
        if type(error).__name__ in GONE:
            return {"out_of_memory": f"{type(error).__name__}: {error}"[:300]}
        raise
    steps = range(len(found["seconds"]))
    rates = {name: statistics.median(found[name][n] / found["seconds"][n] for n in steps) for name in ("tokens", "supervised")}
    sizes = [len(json.loads(line)["input_ids"]) for line in data.read_text().splitlines()]
    trained = [sizes[row - 1] for row in found.pop("rows")]
    if sum(trained) != sum(found["tokens"]):
        raise SystemExit(f"{sum(found['tokens'])} tokens were trained, and the rows named have {sum(trained)}")
    work = flops(found.pop("config"), trained, sum(found["supervised"])) / sum(found["tokens"])  # a token of these rows, on average
    return found | {"tokens_per_second": rates["tokens"], "supervised_per_second": rates["supervised"], "flops": work * rates["tokens"]}


def main(words: list[str]) -> None:
    """Do what `step.py` asked for."""
    cpu = "--cpu" in words
    what, *rest = [word for word in words if word != "--cpu"]
    if what == "ceiling":
        found = ceiling(cpu=cpu)
    elif what == "make":
        found = make(Case.of(rest[0]), Path(rest[1]), cpu=cpu)
    else:
        found = run(Case.of(rest[0]), Path(rest[1]), Path(rest[2]), cpu=cpu)
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
