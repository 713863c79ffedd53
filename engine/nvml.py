"""Questions to NVIDIA's driver: which card torch will use, and who holds its memory.

NVML needs no CUDA and takes no memory on the card. Each question may fail on its own (an old driver, a container,
a slice of a card), so each answer is a value or None, never an error and never a made-up zero.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_Answer = TypeVar("_Answer")
_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # the number Linux gives to the host's own process namespace (include/linux/proc_ns.h)


def ask(question: Callable[[], _Answer]) -> _Answer | None:
    """Return the answer of one sensor, or None: cards, drivers and containers each lack some."""
    try:
        return question()
    except Exception:  # noqa: BLE001 - the driver's errors have no common base that can be named without pynvml
        return None


@functools.cache
def module() -> Any | None:
    """Return the pynvml module, started once for this process; None without it or without a driver."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml if ask(lambda: pynvml.nvmlInit() or True) else None


@functools.cache
def torch_is_cpu_only() -> bool:
    """Say whether the installed torch was built without CUDA, read from its version file so that it is not imported."""
    found = ask(lambda: importlib.util.find_spec("torch"))
    if found is None or not found.submodule_search_locations:
        return False
    folder = Path(found.submodule_search_locations[0])
    text = ask((folder / "version.py").read_text) or ""
    return bool(re.search(r"^cuda\b[^=]*= None", text, re.MULTILINE))


def in_wsl() -> bool:
    """Say whether this Linux runs inside Windows, where the display driver owns the memory and names no process."""
    return "microsoft" in platform.release().lower()


def visible() -> tuple[Any, list[Any]] | None:
    """Return pynvml and the handles of the cards that torch may use, in torch's order; None where there is no such card.

    `CUDA_VISIBLE_DEVICES` is read as CUDA reads it: numbers, identifiers of cards (a unique beginning is enough) or of
    MIG slices; it ends at the first entry that names nothing, so that an empty text or -1 hides all. Of a card cut into
    slices CUDA uses the first, and none at all while it has none.
    """
    nvml = None if torch_is_cpu_only() else module()
    if nvml is None:
        return None
    cards = _numbered(nvml)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = cards if chosen is None else _listed(nvml, cards, chosen)
    usable = [part for part in (_slice_or_card(nvml, card) for card in named) if part is not None]
    return (nvml, usable) if usable else None


def _numbered(nvml: Any) -> list[Any]:
    """Return the whole cards as CUDA numbers them: the fastest first, or by slot where `CUDA_DEVICE_ORDER` says so.

    CUDA does not publish how it compares; cores times clock is the nearest that can be asked, and equal cards stay in
    the order of their slots, as they do there.
    """
    count = ask(lambda: int(nvml.nvmlDeviceGetCount())) or 0
    cards = [
        card for card in (ask(functools.partial(nvml.nvmlDeviceGetHandleByIndex, index)) for index in range(count)) if card is not None
    ]
    if len(cards) < 2 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return cards
    return sorted(cards, key=lambda card: -_speed(nvml, card))


def _speed(nvml: Any, card: Any) -> int:
    return ask(lambda: int(nvml.nvmlDeviceGetNumGpuCores(card) * nvml.nvmlDeviceGetMaxClockInfo(card, nvml.NVML_CLOCK_SM))) or 0


def _listed(nvml: Any, cards: list[Any], chosen: str) -> list[Any]:
    found: list[Any] = []
    for entry in chosen.split(","):
        card = _entry(nvml, cards, entry.strip())
        if card is None:
            break
        found.append(card)
    return found


def _entry(nvml: Any, cards: list[Any], entry: str) -> Any | None:
    if entry.isdecimal():
        return cards[int(entry)] if int(entry) < len(cards) else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    whole = ask(lambda: nvml.nvmlDeviceGetHandleByUUID(entry))
    if whole is not None:
        return whole
    begun = [card for card in cards if text(ask(functools.partial(nvml.nvmlDeviceGetUUID, card))).startswith(entry)]
    return begun[0] if len(begun) == 1 else None


def _slice_or_card(nvml: Any, card: Any) -> Any | None:
    if not ask(lambda: nvml.nvmlDeviceGetMigMode(card)[0]):  # a slice does not know the question: it is used as it is
        return card
    most = ask(lambda: int(nvml.nvmlDeviceGetMaxMigDeviceCount(card))) or 0
    slices = (ask(functools.partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, card, index)) for index in range(most))
    return next((part for part in slices if part is not None), None)


def name(nvml: Any, handle: Any) -> str:
    """Return what the driver calls a card; a MIG slice always says that it is one."""
    called = text(ask(lambda: nvml.nvmlDeviceGetName(handle))) or text(ask(lambda: nvml.nvmlDeviceGetName(_whole(nvml, handle))))
    called = called or "NVIDIA GPU"
    cut = bool(ask(lambda: nvml.nvmlDeviceIsMigDeviceHandle(handle)))
    return f"{called} MIG slice" if cut and "MIG" not in called else called


def capability(nvml: Any, handle: Any) -> tuple[int, int] | None:
    """Return the compute capability; a MIG slice is asked through its card."""
    question = nvml.nvmlDeviceGetCudaComputeCapability
    return ask(lambda: tuple(question(handle))) or ask(lambda: tuple(question(_whole(nvml, handle))))


def temperature(nvml: Any, handle: Any) -> float | None:
    """Return the degrees Celsius of a card; a MIG slice has no sensor of its own, and its card's is as good."""

    def degrees(card: Any) -> float:
        return float(nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU))

    found = ask(lambda: degrees(handle))
    return found if found is not None else ask(lambda: degrees(_whole(nvml, handle)))


def _whole(nvml: Any, handle: Any) -> Any:
    return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)


def reserved_bytes(nvml: Any, handle: Any) -> int:
    """Return what the driver keeps for itself of the used memory; 0 where it does not say (before version 510)."""
    return ask(lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2).reserved)) or 0


def processes(nvml: Any, handle: Any, most: int) -> dict[int, int]:
    """Return the bytes that each process holds of a card, by process number.

    A process that computes and draws stands in both of the driver's lists with the same figure, and is counted once.
    Processes without a believable figure (None, or more than `most` bytes) are left out. Within WSL nothing is asked:
    there are no figures there, and some drivers ended the process that asked (microsoft/WSL, issue 11277).
    """
    if in_wsl():
        return {}
    lists = (
        ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        ask(lambda: nvml.nvmlDeviceGetGraphicsRunningProcesses(handle)),
    )
    held: dict[int, int] = {}
    for process in (process for found in lists for process in found or ()):
        if process.usedGpuMemory is not None and 0 < process.usedGpuMemory <= most:
            held[process.pid] = max(held.get(process.pid, 0), int(process.usedGpuMemory))
    return held


def process_name(pid: int) -> str:
    """Return the name of a process, raw; "" where it cannot be known.

    The driver counts processes as the host does. Inside a container the same number is another process, or none, so
    names are given only where this process lives in the host's own namespace.
    """
    try:
        import psutil
    except ImportError:
        return ""
    if not _sees_the_hosts_processes():
        return ""
    return ask(lambda: str(psutil.Process(pid).name())) or ""


def _sees_the_hosts_processes() -> bool:
    return ask(lambda: Path("/proc/self/ns/pid").stat().st_ino) == _FIRST_PID_NAMESPACE


def text(value: object) -> str:
    """Return the driver's text, which older bindings give as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")
