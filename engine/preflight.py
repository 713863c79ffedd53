"""What must hold before a run: looked at in the order of cost, without making or fetching anything big.

Options and config, then data, then the runs folder and its disk, then the model's small files, then the budget:
so nothing is asked of the network for a run that cannot be, and all faults found on the way are told at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qlora_tui.engine import builtin, data, fixes, hub, machine, models, notify, planner, trackers, until
from qlora_tui.engine.budget import Budget
from qlora_tui.engine.data import Dataset
from qlora_tui.engine.data.tokenizer import OLDER_FILES
from qlora_tui.engine.errors import ConfigError, ConfigErrors, EngineError, ExitCode, Problem, SpaceError, WontFit
from qlora_tui.engine.export import planned as exports
from qlora_tui.engine.fused import has_scoreless, unpacked_because
from qlora_tui.engine.hub import ModelFiles
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.places import is_folder, is_here, place
from qlora_tui.engine.rules import bounds, problems
from qlora_tui.engine.sizes import adapter_params, compute_type, element_bytes
from qlora_tui.engine.spec import BUILTIN, RunConfig, values_of
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import gib
from qlora_tui.engine.values import Value

_Found = TypeVar("_Found")
_FLOOR_BYTES = 64 * 2**20
_STATE_BYTES = 12  # a trained weight on disk: itself and two moments, all in 32 bit
_MOST_CHARACTERS_A_TOKEN = 8


@dataclass(frozen=True, slots=True)
class Checked:
    """A run that can begin, with everything that was read to find that out."""

    run: RunConfig
    model_files: ModelFiles
    model_spec: ModelSpec
    dataset: Dataset
    eval_dataset: Dataset | None
    machine: Machine
    budget: Budget


def check(
    run: RunConfig,
    *,
    fit: bool = True,
    alone: bool = False,
    stopping: Callable[[], None] = lambda: None,
    progress: data.Progress = lambda done, total: None,
) -> Checked:
    """Return `run` checked, or say everything that is wrong with it; nothing is made.

    Args:
        run: what a person decided.
        fit: refuse a run that the budget says will not fit; a dry run wants to show the budget instead.
        alone: judge the device as if nobody else used it: the run begins later, when what fills it now has ended.
        stopping: called about ten times a second; raises to interrupt.
        progress: gets bytes of data read and bytes in all, as often; 0 in all where nobody knows (a hub).

    Raises:
        ConfigErrors: several faults, or one of the config.
        DataError, ModelError, SpaceError: the only fault that was found, as its own kind.
        FetchError: the hub could not be reached for the model's small files.
        WontFit: the budget says no; the cheapest changes are named.
    """
    faults = Faults()
    faults.problems += [*problems(run), *notify.unready(run), *trackers.unready(run)]
    readable = run.data and not {"data", "data_columns", "data_weights", "data_format"} & {problem.where for problem in faults.problems}
    dataset = faults.attempt(lambda: data.load(run, stopping=stopping, progress=progress)) if readable else None
    wanted = run.eval_data or dataset
    eval_dataset = faults.attempt(lambda: data.load_eval(run, stopping=stopping, progress=progress)) if wanted else None
    faults.attempt(lambda: check_space(Path(run.runs_dir).expanduser(), _FLOOR_BYTES))
    if faults and not _is_here(run.model_name_or_path):
        faults.tell()  # a hub is asked only for a run that is right so far
    found = faults.attempt(lambda: find_model(run, stopping)) if run.model_name_or_path else None
    seen = machine.look()
    device = machine.limited(dataclasses.replace(seen, others_bytes=0, others=()) if alone else seen, run)
    faults.problems += device_problems(run, device)
    if found is not None:
        faults.problems += [
            *model_problems(run, *found),
            *family_problems(run, found[1], device),
            *_packing_problems(run, found[1], device),
        ]
        if not faults:
            faults.attempt(lambda: _check_disk(run, *found))
    faults.tell()
    if found is None or dataset is None:
        raise AssertionError("a run without model or data has no fault")
    files, spec = found
    shortest = _least_tokens(run, dataset)
    plan = planner.choose(spec, run, device, longest=shortest)
    if fit and not plan.budget.fits:
        needed = f"this run needs about {gib(plan.budget.total_bytes)} (an estimate, ± {gib(plan.budget.margin_bytes)})"
        raise fixes.refusal(spec, plan.run, device, needed, longest=shortest)
    if fit and not plan.budget.fits_host:
        free = gib(plan.budget.machine.host_free_bytes or 0)
        told = f"inputs of layers would take {gib(plan.budget.host_bytes)} of pinned RAM, and {free} are free"
        raise WontFit(told, hint="say offload_checkpoints=auto, close other programs, or lower max_length", where="memory")
    return Checked(run, files, spec, dataset, eval_dataset, device, plan.budget)


class Faults:
    """Faults gathered until somebody wants to hear them."""

    def __init__(self) -> None:
        """Start with none."""
        self.problems: list[Problem] = []
        self._errors: list[EngineError] = []

    def __bool__(self) -> bool:
        return bool(self.problems or self._errors)

    def attempt(self, look: Callable[[], _Found]) -> _Found | None:
        """Return what `look` returns; keep a usage fault for later, let anything else (a network) through."""
        try:
            return look()
        except EngineError as error:
            if error.exit_code is not ExitCode.USAGE:
                raise
            self._errors.append(error)
            return None

    def tell(self) -> None:
        """Raise what was gathered: one error as itself, several as a list.

        Raises:
            EngineError: there is at least one fault.
        """
        if len(self._errors) == 1 and not self.problems:
            raise self._errors[0]
        told = list(self.problems)
        for error in self._errors:
            told += error.problems if isinstance(error, ConfigErrors) else [error.problem]
        if told:
            raise ConfigErrors(told)


def find_model(run: RunConfig, look: hub.Look = lambda: None) -> tuple[ModelFiles, ModelSpec]:
    """Return the model's small files and its shape; a hub is asked for a few kilobytes, never for weights.

    Whatever `look`, called meanwhile, raises interrupts that.

    Raises:
        ModelError: there is no such model, or it is not supported.
        FetchError: the hub could not be reached.
    """
    name = run.model_name_or_path
    files = builtin_files(name) if name.startswith(BUILTIN) else hub.small_files(name, run.revision, look)
    return files, dataclasses.replace(models.from_folder(files.folder), name=name)


def builtin_files(name: str) -> ModelFiles:
    """Return the small files of the demo's model.

    Raises:
        ConfigError: no such model ships with the program.
    """
    if name != builtin.NAME:
        raise ConfigError(f"no built-in model {one_line(name)!r}", hint=f"there is {builtin.NAME}", where="model_name_or_path")
    return builtin.small_files()


def bounded(run: RunConfig, *faults: Problem) -> RunConfig:
    """Return `run` if each of its values alone is one that a run may have: what a budget or a look at data needs.

    Raises:
        ConfigErrors: some are not, or `faults` were found already; all are named.
    """
    if found := [*bounds(run), *faults]:
        raise ConfigErrors(found)
    return run


def find_spec(run: RunConfig) -> ModelSpec:
    """Return the model's shape, from a folder, the catalogue or, failing both, the hub: what a budget needs.

    Raises:
        ModelError: there is no such model, or it is not supported.
        FetchError: it is not in the catalogue and the hub could not be reached.
    """
    name = run.model_name_or_path
    if not is_folder(name) and (known := models.find(name)) is not None:
        return known
    return find_model(run)[1]


def device_problems(run: RunConfig, device: Machine) -> list[Problem]:
    """Return what `run` asks of a device that cannot do it."""
    found = []
    if device.kind == "cpu" and run.optim == "paged_adamw_8bit":
        found.append(Problem("optim", "paged_adamw_8bit pages GPU memory and there is no GPU here", "say auto, adamw_8bit or adamw_torch"))
    name = one_line(device.name)
    if device.kind == "cuda" and run.dtype == "bfloat16" and not device.bf16:
        found.append(Problem("dtype", f"{name} cannot compute in bfloat16", "say auto or float32"))
    if run.dtype == "float16" and (device.bf16 or not device.half):
        why = "computes in bfloat16, which overflows nowhere" if device.bf16 else "is no card that multiplies float16 fast"
        found.append(Problem("dtype", f"{name} {why}", "say auto"))
    if run.grad_matmul not in ("auto", "16bit", *device.narrow):
        found.append(Problem("grad_matmul", f"{name} makes no products in {run.grad_matmul}", "say auto"))
    if run.max_temperature and machine.temperature() is None:
        found.append(Problem("max_temperature", "no sensor of a GPU answers here", "leave it out"))
    if run.until and until.has_passed(run.until, time.time()):
        found.append(Problem("until", f"{one_line(run.until)} has passed", "name a later time"))
    return found


def model_problems(run: RunConfig, files: ModelFiles, spec: ModelSpec) -> list[Problem]:
    """Return what `run` asks of a model that it does not have, its tokenizer included."""
    found = shape_problems(run, spec)
    if (files.complete or files.commit) and not run.model_name_or_path.startswith(BUILTIN):
        found += _tokenizer_problems(run, files.folder)
    words = _vocabulary(files.folder)
    if words > spec.vocab_size:
        text = f"its tokenizer knows {words} tokens and the model {spec.vocab_size}: they do not belong together"
        found.append(Problem(one_line(run.model_name_or_path), text, "take the tokenizer files that came with the model"))
    return [*found, *exports.problems(run, spec, files.folder)]


def shape_problems(run: RunConfig, spec: ModelSpec) -> list[Problem]:
    """Return what `run` asks of a model's shape that it does not have; its files are not needed to see it."""
    found = []
    if run.max_length > spec.max_position_embeddings:
        limit = spec.max_position_embeddings
        found.append(Problem("max_length", f"{run.max_length} is longer than the {limit} positions of this model", f"say at most {limit}"))
    try:
        spec.targeted(run.lora_target_modules)
    except ConfigError as error:
        found.append(error.problem)
    return [*found, *_start_problems(run, spec), *stored_problems(run, spec), *_other_parts(run, spec)]


def family_problems(run: RunConfig, spec: ModelSpec, device: Machine) -> list[Problem]:
    """Return what a family cannot do on this device: attend without holding scores, since SDPA has no cap for them, or stay in range.

    Gemma's models were trained in bfloat16, and their activations go far beyond float16's 65,504.
    """
    found = []
    if run.attn_implementation != "eager" and not has_scoreless(spec, run, device):
        told = f"sdpa does not exist for the family {spec.family} where its layers are not fused"
        found.append(Problem("attn_implementation", told, "say eager"))
    if compute_type(run, device) == "float16" and spec.family.startswith("gemma"):
        told = f"activations of {spec.family} overflow in float16, the only type of 16 bits that {one_line(device.name)} computes in"
        found.append(Problem("dtype", told, "say float32"))
    return found


def _packing_problems(run: RunConfig, spec: ModelSpec, device: Machine) -> list[Problem]:
    """Return why rows cannot lie end to end as asked, of this model on this device; what `rules` say is not said again."""
    if run.packing != "on" or any(problem.where == "packing" for problem in problems(run)):
        return []
    reason = unpacked_because(spec, run, device.fuses and element_bytes(run, device) == 2)
    return [Problem("packing", f"rows cannot lie end to end: {reason}", "say packing=auto, or off")] if reason else []


def _start_problems(run: RunConfig, spec: ModelSpec) -> list[Problem]:
    """Return what an adapter that starts from the base's main directions cannot take from this one."""
    if run.init_lora_weights != "pissa" or (found := narrowest(spec, run)) is None or run.lora_r <= found:
        return []
    return [Problem("lora_r", f"pissa takes {run.lora_r} directions and the narrowest layer has {found}", f"say at most {found}")]


def narrowest(spec: ModelSpec, run: RunConfig) -> int | None:
    """Return the smallest side of the layers that get an adapter, or None where `lora_target_modules` names none of them."""
    try:
        return min(min(part.inputs, part.outputs) for part in spec.targeted(run.lora_target_modules))
    except ConfigError:
        return None


def _other_parts(run: RunConfig, spec: ModelSpec) -> list[Problem]:
    if run.method != "lora-8bit" or not spec.wrapper:
        return []
    return [Problem("method", f"an 8-bit base is made of text models alone, and this one is of type {spec.wrapper}", "say qlora, or lora")]


def stored_problems(run: RunConfig, spec: ModelSpec) -> list[Problem]:
    """Return where `run` asks for another base than the one in 4 bits that the checkpoint holds; nothing to see for other checkpoints."""
    if not spec.quantized:
        return []
    if run.init_lora_weights == "pissa":
        told = f"pissa starts from 16-bit weights, and this checkpoint holds them in 4 bits ({spec.quantized})"
        return [Problem("init_lora_weights", told, "say default, or name the 16-bit original with method=lora")]
    if run.method in ("lora", "lora-8bit"):
        told = f"this checkpoint holds its weights in 4 bits ({spec.quantized}), so there is nothing closer to the original"
        return [Problem("method", told, "say qlora, or name the 16-bit original")]
    held: dict[str, Value] = {"bnb_4bit_quant_type": spec.quantized, "bnb_4bit_use_double_quant": spec.double_quant}
    asked = values_of(run)
    return [
        Problem(name, f"this checkpoint was quantized with {_plain(value)}, not {_plain(asked[name])}", f"say --set {name}={_plain(value)}")
        for name, value in held.items()
        if asked[name] != value
    ]


def _plain(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_space(folder: Path, needed: int, what: str = "a run") -> None:
    """Check that `folder` could be made and written, and that its disk has room; nothing is made.

    Raises:
        SpaceError: it cannot, or there is none.
    """
    parent = folder
    while not is_here(parent) and parent != parent.parent:
        parent = parent.parent
    shown = one_line(folder)
    if not parent.is_dir():
        raise SpaceError(f"{one_line(parent)} is a file, not a folder", where=shown, hint="choose another folder with --runs-dir")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SpaceError(f"{one_line(parent)} is not writable", where=shown, hint="choose another folder with --runs-dir")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise SpaceError(
            f"{what} needs about {gib(needed)} of disk and {gib(free)} are free", where=shown, hint="make room, or choose another folder"
        )


def checkpoint_bytes(run: RunConfig, spec: ModelSpec) -> int:
    """Return about how large one checkpoint is: the adapter's weights and the optimizer's two moments."""
    return adapter_params(spec, run) * _STATE_BYTES


def _least_tokens(run: RunConfig, dataset: Dataset) -> int:
    """Return how many tokens the longest row has at least, from its characters: only what is certain is refused so early.

    Counting tokens takes minutes on large data, so the exact figure is the run's first phase.
    """
    return min(run.max_length, max(16, dataset.longest // _MOST_CHARACTERS_A_TOKEN))


def _check_disk(run: RunConfig, files: ModelFiles, spec: ModelSpec) -> None:
    """Check the disks again, now that the sizes are known: the checkpoints kept, and the weights to fetch."""
    kept = checkpoint_bytes(run, spec) * (run.save_total_limit + 4)  # the last healthy, the next one, the best, and the one being written
    exported = exports.disk(run, spec, files.folder)
    what = f"this run with its checkpoints{' and exports' if exported else ''}"
    check_space(Path(run.runs_dir).expanduser(), kept + exported + _FLOOR_BYTES, what)
    if files.complete:
        return
    if run.model_name_or_path.startswith(BUILTIN):
        check_space(place("cache"), builtin.SPACE_BYTES, "the demo's model")
    else:
        check_space(_hub_cache(), 2 * spec.params, "the model")


def _hub_cache() -> Path:
    """Return where the hub's library keeps downloads, by the variables it reads; importing it costs too much here."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _is_here(name: str) -> bool:
    """Say whether looking at the model asks no network: built in, a folder, or a name that can only be a folder's."""
    return name.startswith((BUILTIN, "/", ".", "~")) or is_here(name)


def _tokenizer_problems(run: RunConfig, folder: Path) -> list[Problem]:
    """Return what is wrong with the tokenizer's files without loading them: it costs a second, and a run folder, to find out later."""
    where = one_line(run.model_name_or_path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", *OLDER_FILES)):
        return [Problem(where, "no tokenizer.json in it", "take the tokenizer files that came with the model")]
    try:
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        return [Problem(where, "its tokenizer.json cannot be read", "take the tokenizer files that came with the model")]
    return []


def _vocabulary(folder: Path) -> int:
    """Return one more than the highest id in the tokenizer's own vocabulary, or 0 where that cannot be read.

    Added tokens are left out: some models list one beyond their embedding that no text ever produces.
    """
    try:
        words: dict[str, int] | list[Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        return max(words.values(), default=-1) + 1 if isinstance(words, dict) else len(words)
    except (OSError, ValueError, KeyError, TypeError):
        return 0
