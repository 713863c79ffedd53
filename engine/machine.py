"""What this machine has to train on: one card seen through NVML, or the processor and its memory.

torch is never imported: the wizard must paint at once, and CUDA must belong to the thread that trains. A
sensor that does not answer is None, never a made-up zero, and no GPU is not an error.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_tui.engine import cards, nvml
from qlora_tui.engine.cards import Card
from qlora_tui.engine.events import Device, Event
from qlora_tui.engine.nvml import ask
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import gib

_GIB = 1 << 30
_UNNAMED, _DRIVER = "other programs", "the driver"
_WSL_NOTE = "WSL: the driver does not say which Windows programs hold memory; the memory that Windows shares with the card is not counted"


@dataclass(frozen=True, slots=True)
class Machine:
    """The device a run would use, and what it holds of others at this moment.

    All memory is the card's own ("dedicated"). Windows, and so WSL, lets a program spill into RAM that it calls shared
    memory of the card; it is reached over the bus, far slower, and is never counted as room.

    Attributes:
        others_bytes: what other programs and the driver hold.
        others: the same by name, largest first, adding up to `others_bytes`; what cannot be named comes last, as
            "other programs".
        siblings: how many other cards torch could use; a run uses the first only.
        host_free_bytes: of a card's machine, the RAM that is available, in whole GiB; None where it is not known, as of a card that is
            not here.
        note: one sentence that people should know about this device, mostly empty.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    total_bytes: int
    others_bytes: int = 0
    bf16: bool = False
    compute_capability: tuple[int, int] | None = None
    driver: str = ""
    cores: int = 0
    others: tuple[tuple[str, int], ...] = ()
    siblings: int = 0
    note: str = ""
    host_free_bytes: int | None = None

    @property
    def free_bytes(self) -> int:
        """What a run may use: all of the device but what others hold."""
        return max(self.total_bytes - self.others_bytes, 0)

    @property
    def kernels(self) -> bool:
        """Whether our Triton kernels run here, as far as can be said without trying: on Turing and later.

        A card that is only asked about is taken to have Triton; this machine's own is looked at.
        """
        there = not self.driver or importlib.util.find_spec("triton") is not None
        return self.kind == "cuda" and (self.bf16 or (self.compute_capability or (0, 0)) >= (7, 5)) and there

    @property
    def fuses(self) -> bool:
        """Whether fused layers run here: they compute in bfloat16."""
        return self.kernels and self.bf16

    @property
    def half(self) -> bool:
        """Whether tensor cores multiply float16 here: Volta and later."""
        return self.kind == "cuda" and (self.compute_capability or (0, 0)) >= (7, 0)

    @property
    def narrow(self) -> tuple[Literal["fp8", "int8"], ...]:
        """What 8-bit products this card makes, the usual first: INT8 from Turing on, FP8 from Ada on."""
        if not self.kernels or self.compute_capability is None:
            return ()
        return ("fp8", "int8") if self.compute_capability >= (8, 9) else ("int8",)

    def holders(self, most: int = 3) -> str:
        """Return who holds `others_bytes` in words, such as "Xorg 412 MiB, other programs 1.2 GiB"; "" if nobody does.

        Args:
            most: how many names are shown; smaller holders are put together as other programs.
        """
        named = Counter(dict(self.others[:most]))
        return ", ".join(f"{name} {gib(size)}" for name, size in _adding_up(named.items(), self.others_bytes))


def look() -> Machine:
    """Return the card that a run would use, or the processor when there is none that torch can use.

    `CUDA_VISIBLE_DEVICES` counts as it does for torch: its first entry is the card, empty or -1 hides all. A MIG
    slice has the memory of the slice, and its name says so.
    """
    return _cuda_machine() or cpu_machine()


def cpu_machine() -> Machine:
    """Return the processor as a device: memory is RAM, or less where a container may not use it all."""
    total, available = ram_bytes()
    used_by_us = resident_bytes()
    cores = ask(lambda: len(os.sched_getaffinity(0))) or os.cpu_count() or 1
    others = max(total - available - used_by_us, 0)
    name = f"{_cpu_name()}, {cores} cores"
    return Machine(name, "cpu", total_bytes=total, others_bytes=others, cores=cores, others=_adding_up((), others))


def limited(machine: Machine, run: RunConfig) -> Machine:
    """Return `machine` with no more memory than `memory_limit_gib` leaves to the run.

    What others hold is put into the part that the limit cuts off first, so a smaller card can be imitated.
    """
    limit = int(run.memory_limit_gib * _GIB)
    if not limit or limit >= machine.total_bytes:
        return machine
    left = max(machine.others_bytes - (machine.total_bytes - limit), 0)
    return dataclasses.replace(machine, total_bytes=limit, others_bytes=left, others=_adding_up(machine.others, left))


def find_card(name: str) -> Machine:
    """Return an empty card called `name`, one of `cards.cards()`, as if it were here.

    Raises:
        ConfigError: no such card is known, or more than one; the nearest are named.
    """
    card = cards.find(name)
    return Machine(card.name, "cuda", card.memory_bytes, bf16=card.bf16, compute_capability=card.capability, note=card.note)


def card_of(machine: Machine) -> Card | None:
    """Return the known card that `machine` is, by name and then by memory; None for a processor or a stranger."""
    return cards.known(machine.name, machine.total_bytes) if machine.kind == "cuda" else None


def sample(baseline_bytes: int | None = None) -> Device:
    """Return one look at the device: memory of this process and of others, load, power, heat.

    Args:
        baseline_bytes: what the card held before this process used it; tells ours from others' where the
            driver does not know our process number, as in a container.
    """
    card = _nvml_card()
    return _sample_cuda(*card, baseline_bytes) if card else _sample_cpu()


def temperature() -> float | None:
    """Return the degrees Celsius of the card in use; None where no sensor answers."""
    card = _nvml_card()
    return nvml.temperature(*card) if card else None


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
        self._baseline = ask(lambda: int(card[0].nvmlDeviceGetMemoryInfo(card[1]).used)) if card else None
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


def _nvml_card() -> tuple[Any, Any] | None:
    """Return pynvml and the handle of the card in use."""
    found = nvml.visible()
    return (found[0], found[1][0]) if found else None


def _cuda_machine() -> Machine | None:
    found = nvml.visible()
    if found is None:
        return None
    driver, handle = found[0], found[1][0]
    memory = ask(lambda: driver.nvmlDeviceGetMemoryInfo(handle))
    if memory is None:
        return None
    capability = nvml.capability(driver, handle)
    held = nvml.processes(driver, handle, int(memory.used))
    others = max(int(memory.used) - held.pop(os.getpid(), 0), 0)
    return Machine(
        name=one_line(nvml.name(driver, handle), limit=80),
        kind="cuda",
        total_bytes=int(memory.total),
        others_bytes=others,
        bf16=capability is not None and capability >= (8, 0),
        compute_capability=capability,
        driver=one_line(nvml.text(ask(driver.nvmlSystemGetDriverVersion)), limit=40),
        others=_holders(held, nvml.reserved_bytes(driver, handle), others),
        siblings=len(found[1]) - 1,
        note=_WSL_NOTE if nvml.in_wsl() else "",
        host_free_bytes=ram_bytes()[1] // _GIB * _GIB,
    )


def _holders(held: Mapping[int, int], reserved: int, total: int) -> tuple[tuple[str, int], ...]:
    """Name who holds `total` bytes; processes of one name count together."""
    named = Counter({_DRIVER: reserved})
    for pid, size in held.items():
        named[one_line(nvml.process_name(pid), limit=40) or _UNNAMED] += size
    return _adding_up(named.items(), total)


def _adding_up(named: Iterable[tuple[str, int]], total: int) -> tuple[tuple[str, int], ...]:
    """Return names and bytes, largest first and the nameless last, cut or filled up to be `total` together.

    The driver's figures are read one after another, so they need not agree to the byte.
    """
    kept: Counter[str] = Counter()
    left = total
    for name, size in sorted(named, key=_rank):
        kept[name] += min(size, left)
        left -= min(size, left)
    kept[_UNNAMED] += left
    return tuple(sorted(((name, size) for name, size in kept.items() if size > 0), key=_rank))


def _rank(holder: tuple[str, int]) -> tuple[bool, int, str]:
    return holder[0] == _UNNAMED, -holder[1], holder[0]


def _our_bytes(driver: Any, handle: Any, most: int) -> int | None:
    return nvml.processes(driver, handle, most).get(os.getpid())


_THROTTLES: Mapping[str, str] = {
    "SwPowerCap": "power limit",
    "HwPowerBrakeSlowdown": "power brake",
    "SwThermalSlowdown": "too hot",
    "HwThermalSlowdown": "too hot",
    "HwSlowdown": "slowed by hardware",
}


def _throttle(driver: Any, handle: Any) -> str:
    bits = ask(lambda: int(driver.nvmlDeviceGetCurrentClocksThrottleReasons(handle))) or 0
    known = vars(driver)
    return next((words for name, words in _THROTTLES.items() if bits & known.get(f"nvmlClocksThrottleReason{name}", 0)), "")


def _sample_cuda(driver: Any, handle: Any, baseline: int | None) -> Device:
    memory = ask(lambda: driver.nvmlDeviceGetMemoryInfo(handle))
    used = int(memory.used) if memory else None
    ours = _our_bytes(driver, handle, used) if used is not None else None
    if ours is None and used is not None and baseline is not None:
        ours = max(used - baseline, 0)
    milliwatts = ask(lambda: float(driver.nvmlDeviceGetPowerUsage(handle)))
    limit = ask(lambda: float(driver.nvmlDeviceGetEnforcedPowerLimit(handle)))
    return Device(
        memory_ours_bytes=ours,
        memory_others_bytes=max(used - ours, 0) if used is not None and ours is not None else None,
        memory_total_bytes=int(memory.total) if memory else None,
        utilization=ask(lambda: float(driver.nvmlDeviceGetUtilizationRates(handle).gpu)),
        power_watts=milliwatts / 1000 if milliwatts is not None else None,
        power_limit_watts=limit / 1000 if limit is not None else None,
        temperature_c=nvml.temperature(driver, handle),
        throttle=_throttle(driver, handle),
    )


def _sample_cpu() -> Device:
    total, available = ram_bytes()
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
    return ask(lambda: float(psutil.cpu_percent(interval=None)))


def resident_bytes() -> int:
    """Return the memory that this process holds in RAM; 0 where the system does not say."""
    try:
        import psutil
    except ImportError:
        pages = ask(lambda: int(Path("/proc/self/statm").read_text().split()[1]))
        return (pages or 0) * os.sysconf("SC_PAGE_SIZE")
    return ask(lambda: int(psutil.Process().memory_info().rss)) or 0


def ram_bytes() -> tuple[int, int]:
    """Return the bytes of RAM and how many of them are available, within the limit of a container if there is one."""
    rows = _table("/proc/meminfo")
    total, available = rows.get("MemTotal", 0) * 1024, rows.get("MemAvailable", 0) * 1024
    if not total:
        total = available = ask(lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) or 0
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is None or used is None or not 0 < limit < total:
        return total, available
    files = _table("/sys/fs/cgroup/memory.stat")  # cached files are given back when memory is asked for
    held = used - files.get("inactive_file", 0) - files.get("active_file", 0)
    return limit, min(available, max(limit - held, 0))


def _number(path: str) -> int | None:
    return ask(lambda: int(Path(path).read_text()))


def _table(path: str) -> dict[str, int]:
    text = ask(lambda: Path(path).read_text()) or ""
    return {name: int(size) for name, size in re.findall(r"^(\w+):?\s+(\d+)", text, re.MULTILINE)}


def _cpu_name() -> str:
    text = ask(lambda: Path("/proc/cpuinfo").read_text()) or ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = match[1] if match else platform.processor() or platform.machine() or "CPU"
    return re.sub(r"\((R|TM)\)|\bCPU\b|@.*$", "", name).strip().replace("  ", " ")
