"""What this machine has to train on: one card seen through NVML, or the processor and its memory.

torch is never imported: the wizard must paint at once, and CUDA must belong to the thread that trains. A
sensor that does not answer is None, never a made-up zero, and no GPU is not an error.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import importlib.util
import json
import os
import platform
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.events import Device, Event
from qlora_tui.engine.spec import RunConfig, nearest

_MIB, _GIB = 1 << 20, 1 << 30
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Machine:
    """The device a run would use. `others_bytes` is what other programs hold of it at this moment."""

    name: str
    kind: Literal["cuda", "cpu"]
    total_bytes: int
    others_bytes: int = 0
    bf16: bool = False
    compute_capability: tuple[int, int] | None = None
    driver: str = ""
    cores: int = 0

    @property
    def free_bytes(self) -> int:
        """What a run may use: all of the device but what others hold."""
        return max(self.total_bytes - self.others_bytes, 0)


@dataclass(frozen=True, slots=True)
class Card:
    """A known card: memory, and the two figures from which times are estimated."""

    name: str
    memory_bytes: int
    bandwidth_bytes: float
    flops: float
    bf16: bool
    capability: tuple[int, int]


def look() -> Machine:
    """Return the card that a run would use, or the processor when there is none that torch can use.

    `CUDA_VISIBLE_DEVICES` counts as it does for torch: its first entry is the card, empty or -1 hides all.
    """
    return _cuda_machine() or cpu_machine()


def cpu_machine() -> Machine:
    """Return the processor as a device: memory is RAM, or less where a container may not use it all."""
    total, available = _ram()
    used_by_us = resident_bytes()
    cores = _ask(lambda: len(os.sched_getaffinity(0))) or os.cpu_count() or 1
    others = max(total - available - used_by_us, 0)
    return Machine(name=f"{_cpu_name()}, {cores} cores", kind="cpu", total_bytes=total, others_bytes=others, cores=cores)


def limited(machine: Machine, run: RunConfig) -> Machine:
    """Return `machine` with no more memory than `memory_limit_gib` leaves to the run.

    What others hold is put into the part that the limit cuts off first, so a smaller card can be imitated.
    """
    limit = int(run.memory_limit_gib * _GIB)
    if not limit or limit >= machine.total_bytes:
        return machine
    hidden = machine.total_bytes - limit
    return dataclasses.replace(machine, total_bytes=limit, others_bytes=max(machine.others_bytes - hidden, 0))


@functools.cache
def cards() -> tuple[Card, ...]:
    """Return the known cards, smallest families first."""
    table = json.loads(importlib.resources.files("qlora_tui.engine").joinpath("cards.json").read_text(encoding="utf-8"))
    return tuple(
        Card(
            name=row["name"],
            memory_bytes=row["memory_mib"] * _MIB,
            bandwidth_bytes=row["bandwidth_gb_s"] * 1e9,
            flops=row["bf16_tflops"] * 1e12,
            bf16=row["bf16"],
            capability=tuple(row["capability"]),
        )
        for row in table["cards"]
    )


def find_card(name: str) -> Machine:
    """Return an empty card called `name`; case, blanks, "NVIDIA", "GeForce" and "RTX" do not matter.

    Raises:
        ConfigError: no such card is known, or more than one; the nearest are named.
    """
    wanted = "".join(_tokens(name))
    spellings = {card: _spellings(card) for card in cards()}
    found = [card for card in cards() if spellings[card][0] == wanted] or [card for card in cards() if wanted in spellings[card]]
    if len(found) == 1:
        card = found[0]
        return Machine(card.name, "cuda", card.memory_bytes, 0, card.bf16, card.capability)
    if found:
        raise ConfigError(f"more than one card is called {name!r}", hint=f"say {' or '.join(card.name for card in found)}", where="--card")
    hint = nearest(name.upper(), [card.name for card in cards()])
    raise ConfigError(f"no card called {name!r}", hint=hint or f"known: {', '.join(card.name for card in cards())}", where="--card")


def card_of(machine: Machine) -> Card | None:
    """Return the known card that `machine` is, by name and then by memory; None for a processor or a stranger."""
    if machine.kind != "cuda":
        return None
    tokens = _tokens(machine.name)
    same = [card for card in cards() if _is_called(tokens, card)]
    return min(same, key=lambda card: abs(card.memory_bytes - machine.total_bytes), default=None)


def sample(baseline_bytes: int | None = None) -> Device:
    """Return one look at the device: memory of this process and of others, load, power, heat.

    Args:
        baseline_bytes: what the card held before this process used it; tells ours from others' where the
            driver does not know our process number, as in a container.
    """
    card = _nvml_card()
    return _sample_cuda(*card, baseline_bytes) if card else _sample_cpu()


class Sampler:
    """A thread that writes a `device` event about once a second; it never touches torch."""

    def __init__(self, write: Callable[[Event], object], interval: float = 1.0) -> None:
        """Remember what the card holds before the run starts.

        Args:
            write: takes each event; called on the sampler's own thread.
            interval: seconds between two looks.
        """
        self._write, self._interval = write, interval
        self._stopping = threading.Event()
        _cpu_load()  # its first answer covers no time and is thrown away
        card = _nvml_card()
        self._baseline = _ask(lambda: int(card[0].nvmlDeviceGetMemoryInfo(card[1]).used)) if card else None
        self._thread = threading.Thread(target=self._run, name="device-sampler", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Stop and wait until the last event is written; idempotent, and safe before `start`."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._write(sample(self._baseline))
            self._stopping.wait(self._interval)


def _tokens(name: str) -> list[str]:
    return [part for part in re.findall(r"[a-z0-9]+", name.lower()) if part not in ("nvidia", "geforce", "tesla", "gpu", "rtx")]


def _stem(card: Card) -> list[str]:
    return [part for part in _tokens(card.name) if not re.fullmatch(r"\d+gb", part)]


def _spellings(card: Card) -> tuple[str, str]:
    return "".join(_tokens(card.name)), "".join(_stem(card))


def _is_called(tokens: list[str], card: Card) -> bool:
    """Say whether a driver's name means `card`; a Ti, a SUPER, a laptop or a slice of the card is another one."""
    stem = _stem(card)
    rest = tokens[len(stem) :]
    return tokens[: len(stem)] == stem and not {"ti", "super", "laptop", "mobile", "mig", "max"} & set(rest)


def _ask(question: Callable[[], _Answer]) -> _Answer | None:
    """Return the answer of one sensor, or None: cards, drivers and containers each lack some."""
    try:
        return question()
    except Exception:  # noqa: BLE001 - the driver's errors have no common base that can be named without pynvml
        return None


@functools.cache
def _nvml() -> Any | None:
    """Return the pynvml module, started once for this process; None without it or without a driver."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml if _ask(lambda: pynvml.nvmlInit() or True) else None


@functools.cache
def _torch_is_cpu_only() -> bool:
    """Say whether the installed torch was built without CUDA, read from its version file so that it is not imported."""
    found = _ask(lambda: importlib.util.find_spec("torch"))
    if found is None or not found.submodule_search_locations:
        return False
    folder = Path(found.submodule_search_locations[0])
    text = _ask((folder / "version.py").read_text) or ""
    return bool(re.search(r"^cuda\b[^=]*= None", text, re.MULTILINE))


def _nvml_card() -> tuple[Any, Any] | None:
    """Return pynvml and the handle of the card in use."""
    if _torch_is_cpu_only():
        return None
    nvml = _nvml()
    if nvml is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.split(",")[0].strip()
    if first.isdigit():
        handle = _ask(lambda: nvml.nvmlDeviceGetHandleByIndex(int(first)))
    else:
        handle = _ask(lambda: nvml.nvmlDeviceGetHandleByUUID(first)) if first.startswith(("GPU-", "MIG-")) else None
    return (nvml, handle) if handle is not None else None


def _cuda_machine() -> Machine | None:
    card = _nvml_card()
    if card is None:
        return None
    nvml, handle = card
    memory = _ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    if memory is None:
        return None
    capability = _ask(lambda: tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)))
    ours = _our_bytes(nvml, handle) or 0
    return Machine(
        name=_text(_ask(lambda: nvml.nvmlDeviceGetName(handle))) or "NVIDIA GPU",
        kind="cuda",
        total_bytes=int(memory.total),
        others_bytes=max(int(memory.used) - ours, 0),
        bf16=capability is not None and capability >= (8, 0),
        compute_capability=capability,
        driver=_text(_ask(nvml.nvmlSystemGetDriverVersion)),
    )


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _our_bytes(nvml: Any, handle: Any) -> int | None:
    processes = _ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    ours = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return int(ours[0]) if ours and ours[0] is not None else None


_THROTTLES: Mapping[str, str] = {
    "SwPowerCap": "power limit",
    "HwPowerBrakeSlowdown": "power brake",
    "SwThermalSlowdown": "too hot",
    "HwThermalSlowdown": "too hot",
    "HwSlowdown": "slowed by hardware",
}


def _throttle(nvml: Any, handle: Any) -> str:
    bits = _ask(lambda: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))) or 0
    known = vars(nvml)
    return next((words for name, words in _THROTTLES.items() if bits & known.get(f"nvmlClocksThrottleReason{name}", 0)), "")


def _sample_cuda(nvml: Any, handle: Any, baseline: int | None) -> Device:
    memory = _ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    used = int(memory.used) if memory else None
    ours = _our_bytes(nvml, handle)
    if ours is None and used is not None and baseline is not None:
        ours = max(used - baseline, 0)
    milliwatts = _ask(lambda: float(nvml.nvmlDeviceGetPowerUsage(handle)))
    limit = _ask(lambda: float(nvml.nvmlDeviceGetEnforcedPowerLimit(handle)))
    return Device(
        memory_ours_bytes=ours,
        memory_others_bytes=max(used - ours, 0) if used is not None and ours is not None else None,
        memory_total_bytes=int(memory.total) if memory else None,
        utilization=_ask(lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
        power_watts=milliwatts / 1000 if milliwatts is not None else None,
        power_limit_watts=limit / 1000 if limit is not None else None,
        temperature_c=_ask(lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
        throttle=_throttle(nvml, handle),
    )


def _sample_cpu() -> Device:
    total, available = _ram()
    ours = resident_bytes()
    return Device(
        memory_ours_bytes=ours or None,
        memory_others_bytes=max(total - available - ours, 0) if total else None,
        memory_total_bytes=total or None,
        utilization=_cpu_load(),
    )


def _cpu_load() -> float | None:
    try:
        import psutil
    except ImportError:
        return None
    return _ask(lambda: float(psutil.cpu_percent(interval=None)))


def resident_bytes() -> int:
    """Return the memory that this process holds in RAM; 0 where the system does not say."""
    try:
        import psutil
    except ImportError:
        pages = _ask(lambda: int(Path("/proc/self/statm").read_text().split()[1]))
        return (pages or 0) * os.sysconf("SC_PAGE_SIZE")
    return _ask(lambda: int(psutil.Process().memory_info().rss)) or 0


def _ram() -> tuple[int, int]:
    """Return the bytes of RAM and how many of them are available, within the limit of a container if there is one."""
    rows = _table("/proc/meminfo")
    total, available = rows.get("MemTotal", 0) * 1024, rows.get("MemAvailable", 0) * 1024
    if not total:
        total = available = _ask(lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) or 0
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is None or used is None or not 0 < limit < total:
        return total, available
    files = _table("/sys/fs/cgroup/memory.stat")  # cached files are given back when memory is asked for
    held = used - files.get("inactive_file", 0) - files.get("active_file", 0)
    return limit, min(available, max(limit - held, 0))


def _number(path: str) -> int | None:
    return _ask(lambda: int(Path(path).read_text()))


def _table(path: str) -> dict[str, int]:
    text = _ask(lambda: Path(path).read_text()) or ""
    return {name: int(size) for name, size in re.findall(r"^(\w+):?\s+(\d+)", text, re.MULTILINE)}


def _cpu_name() -> str:
    text = _ask(lambda: Path("/proc/cpuinfo").read_text()) or ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = match[1] if match else platform.processor() or platform.machine() or "CPU"
    return re.sub(r"\((R|TM)\)|\bCPU\b|@.*$", "", name).strip().replace("  ", " ")
