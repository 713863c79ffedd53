"""What works on this machine, and the one command that mends what does not.

Each check is a fact found by trying, not by reading version numbers: the 4-bit kernels really quantize, multiply
and step. That happens in a process of its own, because a kernel built for another machine ends the process that
runs it, and because the command line must not pay for torch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import locale
import os
import platform
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qlora_tui.engine import child
from qlora_tui.engine.errors import EngineError
from qlora_tui.engine.machine import cpu_machine
from qlora_tui.engine.places import place
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import gib

OLDEST_PYTHON = (3, 11)
CHILD_SECONDS = 180.0
HUB_SECONDS = 2.0
CACHE_BYTES = 2 << 30  # the demo model and a checkpoint or two
RUNS_BYTES = 1 << 30
SMALLEST_SCREEN = (80, 24)
CUDA_BUILDS = ((13, 0), (12, 8), (12, 6), (11, 8))  # the builds that PyTorch offers for download, newest first


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: what was found, and for a failure the one command that mends it."""

    check: str
    ok: bool
    found: str
    mend: str = ""


def checks(runs_dir: str = "runs") -> Iterator[Check]:
    """Look at everything a run needs, cheap things first, and tell each as soon as it is known.

    Nothing is changed on the machine, and nothing here raises: a check that cannot be made is a failed check.
    """
    for check in _all(runs_dir):
        yield replace(check, mend="" if check.ok else check.mend)


def _all(runs_dir: str) -> Iterator[Check]:
    yield python()
    yield from packages()
    driver = look_at_driver()
    yield gpu(driver)
    yield from compute(driver)
    yield disk("disk for models", hub_cache(), CACHE_BYTES, "export HF_HOME=/path/on/a/larger/disk")
    yield disk("disk for this program", place("cache"), CACHE_BYTES, "export XDG_CACHE_HOME=/path/on/a/larger/disk")
    yield disk("disk for runs", Path(runs_dir), RUNS_BYTES, "qlora-tui --runs-dir /path/on/a/larger/disk")
    yield from terminal()
    yield hub()


def python() -> Check:
    """Look at the interpreter that runs this."""
    found = f"{platform.python_version()} ({sys.executable})"
    return Check("Python", sys.version_info[:2] >= OLDEST_PYTHON, found, "uv venv --python 3.12 .venv")


def packages() -> Iterator[Check]:
    """Compare what is installed with what this version asks for; all that is wrong is mended by one command."""
    wrong, named = [], []
    for requirement in _requirements():
        name, bounds = _split(requirement)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append((requirement, f"{name} is missing"))
            continue
        if not _within(version, bounds):
            wrong.append((requirement, f"{name} {version} is not {bounds}"))
        elif name in ("torch", "transformers", "peft", "bitsandbytes"):
            named.append(f"{name} {version}")
    found = "; ".join(text for _, text in wrong) or ", ".join(named)
    yield Check("packages", not wrong, found, install(*[requirement for requirement, _ in wrong]))


@dataclass(frozen=True, slots=True)
class Driver:
    """What NVIDIA's driver says: its cards, its version and the newest CUDA it serves; or why it says nothing."""

    cards: tuple[str, ...] = ()
    version: str = ""
    cuda: tuple[int, int] = (0, 0)
    fault: str = ""


def look_at_driver() -> Driver:
    """Ask the driver through NVML, which needs no CUDA and takes no memory on the card."""
    try:
        import pynvml
    except ImportError:
        return Driver(fault="nvidia-ml-py is not installed" if _card_is_there() else "")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Driver(fault=str(error) if _card_is_there() else "")
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        cards = tuple(f"{_text(pynvml.nvmlDeviceGetName(card))}, {gib(pynvml.nvmlDeviceGetMemoryInfo(card).total)}" for card in handles)
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion())
        return Driver(cards, _text(pynvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10))
    except pynvml.NVMLError as error:
        return Driver(fault=str(error))
    finally:
        pynvml.nvmlShutdown()


def gpu(driver: Driver) -> Check:
    """Say what there is to train on; no GPU is not a fault, a GPU that does not answer is one."""
    if driver.fault:
        mend = install("nvidia-ml-py>=12") if "nvidia-ml-py" in driver.fault else "sudo reboot"
        return Check("GPU", False, f"a card is there but its driver does not answer: {one_line(driver.fault)}", mend)
    if not driver.cards:
        here = cpu_machine()
        return Check("GPU", True, f"none: training runs on the processor ({here.name}, {gib(here.total_bytes)} of memory)")
    cuda = ".".join(map(str, driver.cuda))
    hidden = " (hidden from runs by CUDA_VISIBLE_DEVICES)" if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") else ""
    return Check("GPU", True, f"{'; '.join(driver.cards)}; driver {driver.version}, up to CUDA {cuda}{hidden}")


def compute(driver: Driver) -> Iterator[Check]:
    """Run torch and the 4-bit kernels in a child and tell what they did."""
    try:
        ended = child.run([sys.executable, "-P", "-m", "qlora_tui.engine.doctor"], doing="checking torch", seconds=CHILD_SECONDS)
    except (OSError, EngineError) as error:
        yield Check("torch", False, f"could not be tried: {one_line(error)}", install("--force-reinstall", "torch>=2.10"))
        return
    said = _said(ended.talk)
    yield torch_check(said.get("torch"), driver, ended)
    for name, package in (("4-bit kernels", "bitsandbytes"), ("8-bit optimizer", "bitsandbytes")):
        if "torch" in said:
            fact = said.get(name, {})
            why = fact.get("error") or f"the process ended with code {ended.code}: {ended.last_words}"
            yield Check(name, bool(fact.get("ok")), fact.get("found") or one_line(why, limit=300), install("-U", f"{package}>=0.49"))
    if "fused layers" in said:
        yield Check("fused layers", True, one_line(said["fused layers"]["found"], limit=300))


def torch_check(fact: Mapping[str, Any] | None, driver: Driver, ended: child.Ended) -> Check:
    """Judge torch's own account of itself against what the driver offers."""
    if fact is None:
        return Check("torch", False, f"does not load: {ended.last_words}", install("--force-reinstall", "torch>=2.10"))
    build = f"CUDA {fact['cuda']}" if fact["cuda"] else "CPU only"
    found = f"{fact['version']}, built for {build}, {fact['threads']} threads"
    wanted = bool(driver.cards) and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    if not wanted or fact["usable"]:
        return Check("torch", True, f"{found}, uses {fact['device']}" if fact["usable"] else found)
    fits = next((build for build in CUDA_BUILDS if build <= driver.cuda), None)
    why = "it cannot use the GPU" if not fact["cuda"] else f"the driver serves CUDA up to {'.'.join(map(str, driver.cuda))}"
    index = f"https://download.pytorch.org/whl/cu{fits[0]}{fits[1]}" if fits else ""
    mend = install("--force-reinstall", "torch>=2.10", "--index-url", index) if index else "sudo apt install nvidia-driver-580"
    return Check("torch", False, f"{found}: {why}", mend)


def disk(name: str, folder: Path, needed: int, mend: str) -> Check:
    """Look at the free space and the right to write where `folder` is or would be made."""
    there = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Check(name, False, f"{folder}: {error.strerror}", mend)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Check(name, False, f"{folder} cannot be written", mend)
    return Check(name, free >= needed, f"{gib(free)} free in {folder}", mend)


def hub_cache() -> Path:
    """Return where the hub's client keeps models, by its own variables."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def terminal() -> Iterator[Check]:
    """Look at size, colours, letters, and at what happens when an SSH line drops."""
    size = _screen_size()
    if size is None:
        yield Check("terminal", True, "none here: use --no-ui, or start in a terminal for the screens")
        return
    small = size[0] < SMALLEST_SCREEN[0] or size[1] < SMALLEST_SCREEN[1]
    yield Check("terminal size", not small, f"{size[0]}x{size[1]}, at least 80x24 is needed", "printf '\\e[8;30;100t'")
    yield colours(os.environ)
    coding = (sys.stdout.encoding or locale.getpreferredencoding(False)).lower().replace("-", "")
    yield Check("letters", coding == "utf8", f"{sys.stdout.encoding}; bars and curves are drawn with Unicode", "export LC_ALL=C.UTF-8")
    if os.environ.get("SSH_CONNECTION") or os.environ.get("SSH_TTY"):
        kept = os.environ.get("TMUX") or os.environ.get("STY")
        found = "inside tmux or screen: the picture survives a lost line"
        yield Check(
            "SSH",
            True,
            found if kept else "a lost line closes the picture, not the run: start `tmux` first, or `qlora-tui attach last` later",
        )


def colours(environment: Mapping[str, str]) -> Check:
    """Say how many colours the terminal shows, from the variables that terminals set."""
    term, deep = environment.get("TERM", ""), environment.get("COLORTERM", "")
    if term in ("", "dumb"):
        return Check("colours", False, f"TERM={term or 'nothing'}: no screen can be drawn", "export TERM=xterm-256color")
    if "NO_COLOR" in environment:
        return Check("colours", True, f"{term}; switched off by NO_COLOR")
    number = "16 million" if deep in ("truecolor", "24bit") else "256" if "256" in term else "8 to 16"
    return Check("colours", True, f"{term}, {number}")


def hub() -> Check:
    """Knock at the hub's door, briefly; behind a proxy only a real request would tell, so none is made."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Check("hub", True, "not asked (HF_HUB_OFFLINE): local folders, the hub's cache and the demo work")
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return Check("hub", True, "reached through a proxy, not tried")
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=HUB_SECONDS):
            return Check("hub", True, f"{address.hostname} answers")
    except OSError as error:
        found = f"{address.hostname} does not answer ({error.strerror or error}): local folders and the demo still work"
        return Check("hub", False, found, "export HF_HUB_OFFLINE=1")


def install(*arguments: str) -> str:
    """Return the command that installs into this very environment, with pip or, where there is none, with uv."""
    if not arguments:
        return ""
    uv = importlib.util.find_spec("pip") is None and shutil.which("uv")
    start = ["uv", "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
    return shlex.join([*start, *arguments])


def _requirements() -> list[str]:
    """Return what this program asks for, without extras; nothing when it runs from a bare source tree."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return [line for line in importlib.metadata.requires("qlora-tui") or [] if ";" not in line]
    return []


def _split(requirement: str) -> tuple[str, str]:
    name = re.match(r"[\w.-]+", requirement)
    return (name[0], requirement[name.end() :].strip()) if name else (requirement, "")


def _within(version: str, bounds: str) -> bool:
    """Compare release numbers; our own bounds use only `>=` and `<`, so no resolver is needed."""
    for bound in filter(None, bounds.split(",")):
        sign, limit = (">=", bound[2:]) if bound.startswith(">=") else ("<", bound[1:])
        if (_release(version) >= _release(limit)) != (sign == ">="):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))


def _card_is_there() -> bool:
    return Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia").exists()


def _text(name: str | bytes) -> str:
    return one_line(name.decode("utf-8", "replace") if isinstance(name, bytes) else name)


def _screen_size() -> tuple[int, int] | None:
    for stream in (2, 1, 0):
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(stream)
            return (size.columns, size.lines)
    return None


def _said(talk: str) -> dict[str, dict[str, Any]]:
    """Read the child's facts, one JSON line each, out of whatever libraries printed around them."""
    facts: dict[str, dict[str, Any]] = {}
    for line in talk.splitlines():
        with contextlib.suppress(ValueError, AttributeError, KeyError):
            fact = json.loads(line)
            facts[fact.pop("check")] = fact
    return facts


def _tell(check: str, **fact: Any) -> None:
    sys.stdout.write("\n" + json.dumps({"check": check, **fact}) + "\n")
    sys.stdout.flush()


def _try_all() -> None:
    """The child: each fact is told before the next is tried, since a bad kernel ends the process."""
    import torch

    usable = torch.cuda.is_available()
    device = torch.cuda.get_device_name(0) if usable else "cpu"
    _tell("torch", version=torch.__version__, cuda=torch.version.cuda, usable=usable, device=device, threads=torch.get_num_threads())
    for name, trial in (("4-bit kernels", _try_kernels), ("8-bit optimizer", _try_optimizer)):
        try:
            _tell(name, ok=True, found=trial("cuda" if usable else "cpu"))
        except Exception as error:  # noqa: BLE001  # whatever a foreign kernel raises is the finding
            _tell(name, ok=False, error=f"{type(error).__name__}: {error}")
    if usable:
        from qlora_tui.engine.fast import compiled

        card = torch.device("cuda", 0)
        why_not = compiled.why_not(card) or ("" if compiled.has_bfloat16(card) else compiled.NO_BFLOAT16)
        _tell("fused layers", ok=True, found=f"off, so steps take longer: {why_not}" if why_not else "their Triton kernels compile and run")


def _try_kernels(device: str) -> str:
    """Quantize a matrix, multiply by it forward and backward, and compare with plain arithmetic on the same values."""
    import torch
    from bitsandbytes import __version__, functional, matmul_4bit

    torch.manual_seed(0)
    weight = torch.randn(256, 256, device=device)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    plain = functional.dequantize_4bit(packed, state)
    error = float((plain - weight).abs().mean())
    rows = torch.randn(8, 256, device=device, requires_grad=True)
    product = matmul_4bit(rows, packed.t(), quant_state=state)
    product.sum().backward()
    apart = float((product - rows @ plain.t()).abs().max())
    if error > 0.15 or apart > 0.5 or rows.grad is None or not bool(torch.isfinite(rows.grad).all()):
        raise ArithmeticError(f"wrong results: quantization error {error:.3f}, product off by {apart:.3f}")
    return f"bitsandbytes {__version__} on {device}: quantize, multiply and backward are right"


def _try_optimizer(device: str) -> str:
    """Take one step with the optimizer that a run on this device would use at its leanest."""
    import torch
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    value = torch.nn.Parameter(torch.zeros(128, 128, device=device))
    kind: Any = PagedAdamW8bit if device == "cuda" else AdamW8bit
    optimizer = kind([value], lr=1e-2, min_8bit_size=1)
    value.grad = torch.ones_like(value)
    optimizer.step()
    if not bool((value < 0).all()):
        raise ArithmeticError("a step against the gradient did not lower the values")
    return f"{kind.__name__} steps on {device}"


if __name__ == "__main__":
    _try_all()
