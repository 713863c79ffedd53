"""What must hold before a run: looked at in the order of cost, without making or fetching anything big.

Options and config, then data, then the runs folder and its disk, then the model's small files, then the budget:
so nothing is asked of the network for a run that cannot be, and all faults found on the way are told at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qlora_tui.engine import budget, builtin, data, hub, machine, models
from qlora_tui.engine.budget import Budget
from qlora_tui.engine.data import Dataset
from qlora_tui.engine.data.tokenizer import OLDER_FILES
from qlora_tui.engine.errors import ConfigError, ConfigErrors, EngineError, ExitCode, Problem, SpaceError, WontFit
from qlora_tui.engine.hub import ModelFiles
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.places import place
from qlora_tui.engine.sizes import adapter_params
from qlora_tui.engine.spec import BUILTIN, RunConfig, Value, bounds, from_values, problems, values_of
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import gib

_Found = TypeVar("_Found")
_FLOOR_BYTES = 64 * 2**20
_STATE_BYTES = 12  # a trained weight on disk: itself and two moments, all in 32 bit
_FIXES_SHOWN = 3


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


def check(run: RunConfig, *, fit: bool = True) -> Checked:
    """Return `run` checked, or say everything that is wrong with it; nothing is made.

    Args:
        run: what a person decided.
        fit: refuse a run that the budget says will not fit; a dry run wants to show the budget instead.

    Raises:
        ConfigErrors: several faults, or one of the config.
        DataError, ModelError, SpaceError: the only fault that was found, as its own kind.
        FetchError: the hub could not be reached for the model's small files.
        WontFit: the budget says no; the cheapest changes are named.
    """
    faults = Faults()
    faults.problems += problems(run)
    dataset = faults.attempt(lambda: data.load(run)) if run.data and all(run.data) else None
    eval_dataset = faults.attempt(lambda: data.load_eval(run)) if run.eval_data else None
    faults.attempt(lambda: check_space(Path(run.runs_dir).expanduser(), _FLOOR_BYTES))
    if faults and not _is_here(run.model_name_or_path):
        faults.tell()  # a hub is asked only for a run that is right so far
    found = faults.attempt(lambda: find_model(run)) if run.model_name_or_path else None
    device = machine.limited(machine.look(), run)
    faults.problems += device_problems(run, device)
    if found is not None:
        faults.problems += model_problems(run, *found)
        if not faults:
            faults.attempt(lambda: _check_disk(run, *found))
    faults.tell()
    if found is None or dataset is None:
        raise AssertionError("a run without model or data has no fault")
    files, spec = found
    estimate = budget.estimate(spec, run, device)
    if fit and not estimate.fits:
        raise wont_fit(estimate, spec, run, device)
    return Checked(run, files, spec, dataset, eval_dataset, device, estimate)


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


def find_model(run: RunConfig) -> tuple[ModelFiles, ModelSpec]:
    """Return the model's small files and its shape; a hub is asked for a few kilobytes, never for weights.

    Raises:
        ModelError: there is no such model, or it is not supported.
        FetchError: the hub could not be reached.
    """
    name = run.model_name_or_path
    files = builtin_files(name) if name.startswith(BUILTIN) else hub.small_files(name, run.revision)
    return files, dataclasses.replace(models.from_folder(files.folder), name=name)


_ON_RESUME: Mapping[str, str] = {
    "max_steps": "the run ends there, and the rest of the learning rate schedule is stretched to it",
    "num_train_epochs": "the run ends there, and the rest of the learning rate schedule is stretched to it",
    "max_time": "counted anew from this resume",
    "eval_steps": "measured at those steps from now on",
    "save_steps": "saved at those steps from now on",
    "save_total_limit": "older checkpoints beyond it go at the next save",
}


def resumable(saved: RunConfig, flags: Mapping[str, Value]) -> tuple[RunConfig, list[str]]:
    """Return the config of a resume and, in sentences, what each change does.

    Raises:
        ConfigErrors: a change that would make it another run; every one of them is named.
    """
    before = values_of(saved)
    changes = {name: value for name, value in flags.items() if value != before[name]}
    refused = [name for name in changes if name not in _ON_RESUME]
    if refused:
        hint = f"leave it out, or start a new run; a resume may change {', '.join(_ON_RESUME)}"
        raise ConfigErrors([Problem(name, f"it was {_told(before[name])} when the run began", hint) for name in refused])
    run = from_values({**before, **changes})
    if found := problems(run):
        raise ConfigErrors(found)
    return run, [f"{name}: {_told(before[name])} -> {_told(value)}; {_ON_RESUME[name]}" for name, value in changes.items()]


def _told(value: Value) -> str:
    return one_line(", ".join(value) if isinstance(value, tuple) else value)


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
    if not Path(name).expanduser().is_dir() and (known := models.find(name)) is not None:
        return known
    return find_model(run)[1]


def device_problems(run: RunConfig, device: Machine) -> list[Problem]:
    """Return what `run` asks of a device that cannot do it."""
    found = []
    if device.kind == "cpu" and run.optim == "paged_adamw_8bit":
        found.append(Problem("optim", "paged_adamw_8bit pages GPU memory and there is no GPU here", "say auto, adamw_8bit or adamw_torch"))
    if device.kind == "cuda" and run.dtype == "bfloat16" and not device.bf16:
        found.append(Problem("dtype", f"{one_line(device.name)} cannot compute in bfloat16", "say auto or float32"))
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
    return found


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
    if run.attn_implementation == "sdpa" and not spec.sdpa:
        found.append(Problem("attn_implementation", f"sdpa does not exist for the family {spec.family}", "say eager"))
    return found


def check_space(folder: Path, needed: int, what: str = "a run") -> None:
    """Check that `folder` could be made and written, and that its disk has room; nothing is made.

    Raises:
        SpaceError: it cannot, or there is none.
    """
    parent = folder
    while not parent.exists() and parent != parent.parent:
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


def wont_fit(estimate: Budget, spec: ModelSpec, run: RunConfig, device: Machine) -> WontFit:
    """Return the refusal of a run that is too large, with the cheapest changes that would make it fit."""
    free, card = gib(estimate.machine.free_bytes), one_line(device.name)
    told = f"this run needs about {gib(estimate.total_bytes)} (an estimate, ± {gib(estimate.margin_bytes)}) and {free} of {card} are free"
    known = budget.fixes(spec, run, device)
    enough = [fix for fix in known if fix.enough]
    hint = "; or ".join(f"{fix.options} ({fix.text})" for fix in (enough or known)[:_FIXES_SHOWN])
    alone = f"no change of the settings is enough; these save most: {hint}" if hint else "a smaller model is the only way"
    return WontFit(told, hint=f"try {hint}" if enough else alone, where="memory")


def _check_disk(run: RunConfig, files: ModelFiles, spec: ModelSpec) -> None:
    """Check the disks again, now that the sizes are known: the checkpoints kept, and the weights to fetch."""
    kept = checkpoint_bytes(run, spec) * (run.save_total_limit + 1)
    check_space(Path(run.runs_dir).expanduser(), kept + _FLOOR_BYTES, "this run with its checkpoints")
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
    return name.startswith((BUILTIN, "/", ".", "~")) or Path(name).expanduser().exists()


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
