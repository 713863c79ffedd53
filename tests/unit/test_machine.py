from __future__ import annotations

import dataclasses
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine import machine, nvml
from qlora_tui.engine.events import Device
from qlora_tui.engine.machine import Machine, limited
from qlora_tui.engine.spec import RunConfig

GIB, MIB = 1 << 30, 1 << 20


class FakeDriver:
    """The parts of pynvml that are used; two cards, a slice, and sensors that can be broken by name.

    Handles are numbers: 0 and 1 are cards, 10 is a MIG slice of card 0.
    """

    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1
    nvmlMemory_v2 = 2  # noqa: N815
    nvmlClocksThrottleReasonSwPowerCap = 4  # noqa: N815
    nvmlClocksThrottleReasonHwThermalSlowdown = 64  # noqa: N815

    def __init__(self):
        self.broken = set()
        self.used = {0: 3 * GIB, 1: 1 * GIB, 10: GIB}
        self.reserved = 0
        self.pids, self.drawing = [], []
        self.reasons = 4
        self.sliced, self.slices = False, [10]
        self.cores = [16384, 10496]
        self.names = {0: b"NVIDIA GeForce RTX 4090", 1: "NVIDIA GeForce RTX 3090", 10: "NVIDIA GeForce RTX 4090 MIG 1g.5gb"}

    def __getattribute__(self, name):
        if name.startswith("nvml") and name in object.__getattribute__(self, "broken"):
            raise RuntimeError(name)
        return object.__getattribute__(self, name)

    def module(self):
        """A module whose `vars` hold the constants and whose functions are ours."""
        names = [name for name in dir(type(self)) if name.startswith(("nvml", "NVML"))]
        made = SimpleNamespace()
        for name in names:
            value = getattr(self, name)
            setattr(made, name, self._guarded(name) if callable(value) else value)
        return made

    def _guarded(self, name):
        return lambda *args: getattr(self, name)(*args)

    def nvmlInit(self):  # noqa: N802
        return None

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return [0, 1][index]

    def nvmlDeviceGetUUID(self, handle):  # noqa: N802
        return {0: "GPU-one-1234", 1: b"GPU-two-5678"}[handle]

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        return {"GPU-one-1234": 0, "GPU-two-5678": 1, "MIG-slice": 10}[uuid]

    def nvmlDeviceGetNumGpuCores(self, handle):  # noqa: N802
        return self.cores[handle]

    def nvmlDeviceGetMaxClockInfo(self, handle, which):  # noqa: N802
        return 2000

    def nvmlDeviceGetMigMode(self, handle):  # noqa: N802
        return [{0: self.sliced, 1: False}[handle], False]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, index):  # noqa: N802
        return {index + 1: part for index, part in enumerate(self.slices)}[index]

    def nvmlDeviceIsMigDeviceHandle(self, handle):  # noqa: N802
        return handle == 10

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle):  # noqa: N802
        return {10: 0}[handle]

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):  # noqa: N802
        total = 5 * GIB if handle == 10 else 24 * GIB
        if version:
            return SimpleNamespace(total=total, used=self.used[handle] - self.reserved, reserved=self.reserved)
        return SimpleNamespace(total=total, used=self.used[handle])

    def nvmlDeviceGetName(self, handle):  # noqa: N802
        return self.names[handle]

    def nvmlDeviceGetCudaComputeCapability(self, handle):  # noqa: N802
        return {0: (8, 9), 1: (7, 5)}[handle]  # a slice does not answer

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        return "580.1"

    def nvmlDeviceGetComputeRunningProcesses(self, index):  # noqa: N802
        return self.pids

    def nvmlDeviceGetGraphicsRunningProcesses(self, index):  # noqa: N802
        return self.drawing

    def nvmlDeviceGetUtilizationRates(self, index):  # noqa: N802
        return SimpleNamespace(gpu=98)

    def nvmlDeviceGetPowerUsage(self, index):  # noqa: N802
        return 402_000

    def nvmlDeviceGetEnforcedPowerLimit(self, index):  # noqa: N802
        return 450_000

    def nvmlDeviceGetTemperature(self, handle, which):  # noqa: N802
        return {0: 71, 1: 64}[handle]  # a slice does not answer

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, index):  # noqa: N802
        return self.reasons


@pytest.fixture
def driver(monkeypatch):
    fake = FakeDriver()
    monkeypatch.setitem(sys.modules, "pynvml", fake.module())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setattr(nvml, "torch_is_cpu_only", lambda: False)
    monkeypatch.setattr(nvml, "in_wsl", lambda: False)
    nvml.module.cache_clear()
    yield fake
    nvml.module.cache_clear()


@pytest.fixture
def names(monkeypatch):
    """Names of processes by number, as the system would give them."""
    known = {}
    monkeypatch.setattr(nvml, "process_name", lambda pid: known.get(pid, ""))
    return known


@pytest.fixture
def no_driver(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    nvml.module.cache_clear()
    yield
    nvml.module.cache_clear()


def process(pid, size):
    return SimpleNamespace(pid=pid, usedGpuMemory=size)


def test_without_a_gpu_the_processor_is_the_device(no_driver):
    found = machine.look()
    assert (found.kind, found.bf16, found.compute_capability) == ("cpu", False, None)
    assert found.total_bytes > 0
    assert found.cores >= 1
    assert 0 <= found.others_bytes <= found.total_bytes


def test_without_a_gpu_a_sample_still_shows_memory_and_no_made_up_sensors(no_driver):
    seen = machine.sample()
    assert seen.memory_ours_bytes > 0
    assert seen.memory_total_bytes > seen.memory_ours_bytes
    assert (seen.power_watts, seen.temperature_c) == (None, None)


def test_without_psutil_memory_comes_from_the_system(no_driver, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    seen = machine.sample()
    assert seen.memory_ours_bytes > 0
    assert seen.utilization is None


def test_the_first_card_is_seen(driver):
    found = machine.look()
    others = (("other programs", 3 * GIB),)
    expected = Machine("NVIDIA GeForce RTX 4090", "cuda", 24 * GIB, 3 * GIB, True, (8, 9), "580.1", others=others, siblings=1)
    assert found == dataclasses.replace(expected, host_free_bytes=found.host_free_bytes)
    assert found.host_free_bytes is not None
    assert found.host_free_bytes % GIB == 0 <= found.host_free_bytes
    assert found.free_bytes == 21 * GIB


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        ("1", "NVIDIA GeForce RTX 3090"),
        ("1,0", "NVIDIA GeForce RTX 3090"),
        ("GPU-two-5678", "NVIDIA GeForce RTX 3090"),
        ("GPU-two", "NVIDIA GeForce RTX 3090"),
        ("0", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_visible_devices_choose_the_card(driver, monkeypatch, visible, name):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.look().name == name


@pytest.mark.parametrize("visible", ["", "-1", "7", "GPU-", "GPU-unknown", "MIG-unknown", "nonsense"])
def test_hidden_or_absent_cards_leave_the_processor(driver, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.look().kind == "cpu"


@pytest.mark.parametrize(
    ("visible", "siblings"),
    [(None, 1), ("0", 0), ("1,0", 1), ("0,-1,1", 0), ("0, 1", 1), ("GPU-two,GPU-one", 1)],
)
def test_other_visible_cards_are_counted_up_to_the_first_bad_entry(driver, monkeypatch, visible, siblings):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.look().siblings == siblings


def test_the_fastest_card_is_number_zero_as_in_cuda_unless_slots_are_asked_for(driver, monkeypatch):
    driver.cores = [2560, 10496]
    assert machine.look().name == "NVIDIA GeForce RTX 3090"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert machine.look().name == "NVIDIA GeForce RTX 4090"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert machine.look().name == "NVIDIA GeForce RTX 3090"


def test_cards_that_do_not_answer_are_not_numbered(driver):
    driver.broken.add("nvmlDeviceGetHandleByIndex")
    assert machine.look().kind == "cpu"


def test_a_mig_slice_is_found_by_its_identifier_and_has_its_own_memory(driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-slice")
    found = machine.look()
    assert (found.name, found.total_bytes, found.others_bytes) == ("NVIDIA GeForce RTX 4090 MIG 1g.5gb", 5 * GIB, GIB)
    assert (found.compute_capability, found.bf16, found.siblings) == ((8, 9), True, 0)
    assert machine.card_of(found) is None
    assert machine.sample(baseline_bytes=0).memory_total_bytes == 5 * GIB


@pytest.mark.parametrize("driver_says", ["NVIDIA A100", ""])
def test_a_mig_slice_says_so_even_where_the_driver_does_not(driver, monkeypatch, driver_says):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-slice")
    driver.names[10] = driver_says
    assert machine.look().name == f"{driver_says or 'NVIDIA GeForce RTX 4090'} MIG slice"


def test_of_a_card_cut_into_slices_the_first_is_used(driver):
    driver.sliced = True
    assert machine.look().total_bytes == 5 * GIB
    driver.slices = []
    assert machine.look().name == "NVIDIA GeForce RTX 3090"


def test_others_are_named_largest_first_and_add_up(driver, names, monkeypatch):
    monkeypatch.setattr(machine.os, "getpid", lambda: 42)
    names |= {7: "python", 8: "python", 9: "Xorg"}
    driver.pids = [process(7, 500 * MIB), process(8, 300 * MIB), process(42, GIB), process(11, 100 * MIB)]
    driver.drawing = [process(9, 200 * MIB), process(7, 500 * MIB)]
    driver.reserved = 400 * MIB
    found = machine.look()
    assert found.others_bytes == 2 * GIB
    assert found.others == (("python", 800 * MIB), ("the driver", 400 * MIB), ("Xorg", 200 * MIB), ("other programs", 648 * MIB))
    assert found.holders(most=2) == "python 800 MiB, the driver 400 MiB, other programs 848 MiB"


def test_names_of_others_cannot_write_on_the_screen(driver, names):
    names[7] = "evil\x1b]52;c;AAAA\x07\n" + "x" * 99
    driver.pids = [process(7, 3 * GIB)]
    ((name, size),) = machine.look().others
    assert name.isprintable()
    assert (len(name) < 80, size) == (True, 3 * GIB)


@pytest.mark.parametrize("figure", [None, 1 << 63, 0])
def test_without_a_believable_figure_others_have_no_name(driver, names, figure):
    names[7] = "Xorg"
    driver.drawing = [process(7, figure)]
    assert machine.look().others == (("other programs", 3 * GIB),)


def test_where_the_driver_lists_no_process_others_have_no_name(driver):
    driver.broken |= {"nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"}
    assert machine.look().others == (("other programs", 3 * GIB),)


def test_an_empty_card_has_no_holders(driver):
    driver.used[0] = 0
    assert (machine.look().others, machine.look().holders()) == ((), "")


def test_a_machine_made_by_hand_still_says_who_holds(driver):
    assert Machine("card", "cuda", 8 * GIB, 2 * GIB).holders() == "other programs 2.0 GiB"


def test_process_numbers_of_a_container_are_not_the_hosts(monkeypatch):
    monkeypatch.setattr(nvml, "_sees_the_hosts_processes", lambda: False)
    assert nvml.process_name(nvml.os.getpid()) == ""
    monkeypatch.setattr(nvml, "_sees_the_hosts_processes", lambda: True)
    assert nvml.process_name(nvml.os.getpid()) != ""
    assert nvml.process_name(2**22 + 1) == ""


def test_only_the_first_process_namespace_is_the_hosts(monkeypatch):
    monkeypatch.setattr(Path, "stat", lambda path: SimpleNamespace(st_ino=4026531836))
    assert nvml._sees_the_hosts_processes()
    monkeypatch.setattr(Path, "stat", lambda path: SimpleNamespace(st_ino=4026532281))
    assert not nvml._sees_the_hosts_processes()


def test_within_wsl_processes_are_not_even_asked_for_and_a_note_says_so(driver, monkeypatch):
    def asked(handle):
        raise AssertionError("asked")

    monkeypatch.setattr(nvml, "in_wsl", lambda: True)
    monkeypatch.setattr(nvml, "ask", lambda question: question())
    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetComputeRunningProcesses", asked)
    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetGraphicsRunningProcesses", asked)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = machine.look()
    assert found.others == (("other programs", GIB),)
    assert "WSL" in found.note


@pytest.mark.parametrize(
    ("release", "wsl"), [("5.15.153.1-microsoft-standard-WSL2", True), ("4.4.0-19041-Microsoft", True), ("6.8.0-generic", False)]
)
def test_wsl_is_told_by_its_kernel(monkeypatch, release, wsl):
    monkeypatch.setattr(nvml.platform, "release", lambda: release)
    assert nvml.in_wsl() is wsl


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "other programs"]), st.integers(0, 99))), st.integers(0, 200))
def test_named_holders_always_add_up(named, total):
    found = machine._adding_up(named, total)
    assert sum(size for _, size in found) == total
    sizes = [size for name, size in found if name != "other programs"]
    assert sizes == sorted(sizes, reverse=True)
    assert "other programs" not in [name for name, _ in found[:-1]]
    assert all(size > 0 for _, size in found)
    assert len({name for name, _ in found}) == len(found)


def test_an_old_card_computes_without_bfloat16(driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert not machine.look().bf16


def test_a_torch_without_cuda_hides_the_card(driver, monkeypatch):
    monkeypatch.setattr(nvml, "torch_is_cpu_only", lambda: True)
    assert machine.look().kind == "cpu"


def test_a_driver_that_does_not_start_is_no_gpu(driver):
    driver.broken.add("nvmlInit")
    nvml.module.cache_clear()
    assert machine.look().kind == "cpu"


def test_a_sample_tells_ours_from_others_by_process(driver, monkeypatch):
    monkeypatch.setattr(machine.os, "getpid", lambda: 42)
    driver.pids = [SimpleNamespace(pid=7, usedGpuMemory=GIB), SimpleNamespace(pid=42, usedGpuMemory=2 * GIB)]
    seen = machine.sample()
    assert seen == Device(2 * GIB, GIB, 24 * GIB, 98.0, 402.0, 450.0, 71.0, "power limit")


def test_where_processes_are_hidden_the_baseline_tells_ours(driver):
    assert machine.sample().memory_ours_bytes is None
    assert machine.sample(baseline_bytes=GIB).memory_ours_bytes == 2 * GIB
    assert machine.sample(baseline_bytes=GIB).memory_others_bytes == GIB


def test_a_hot_card_says_so(driver):
    driver.reasons = 64
    assert machine.sample().throttle == "too hot"
    driver.reasons = 1
    assert machine.sample().throttle == ""


def test_the_heat_of_the_card_in_use_is_told(driver, monkeypatch):
    assert machine.temperature() == 71.0
    driver.sliced = True
    assert machine.temperature() == 71.0  # of the card that the slice is a part of
    driver.broken.add("nvmlDeviceGetTemperature")
    assert machine.temperature() is None


def test_without_a_card_there_is_no_heat_to_tell(no_driver):
    assert machine.temperature() is None


def test_each_broken_sensor_is_none_and_leaves_the_others(driver):
    driver.broken |= {"nvmlDeviceGetPowerUsage", "nvmlDeviceGetTemperature", "nvmlDeviceGetCurrentClocksThrottleReasons"}
    seen = machine.sample()
    assert (seen.power_watts, seen.temperature_c, seen.throttle) == (None, None, "")
    assert (seen.utilization, seen.power_limit_watts) == (98.0, 450.0)


def test_the_sampler_writes_until_it_is_stopped_and_then_is_silent(driver):
    seen, twice = [], threading.Event()

    def write(event):
        seen.append(event)
        if len(seen) == 2:
            twice.set()

    sampler = machine.Sampler(write, interval=0.001)
    driver.used[0] = 5 * GIB
    sampler.start()
    assert twice.wait(10)
    sampler.stop()
    count = len(seen)
    sampler.stop()
    assert len(seen) == count
    assert seen[0].memory_ours_bytes == 2 * GIB


def test_a_sampler_that_never_started_stops(driver):
    machine.Sampler(lambda event: None).stop()


def test_a_limit_hides_memory_and_others_live_there_first():
    card = Machine("card", "cuda", 80 * GIB, 10 * GIB)
    assert limited(card, RunConfig(memory_limit_gib=24.0)).free_bytes == 24 * GIB
    assert limited(card, RunConfig(memory_limit_gib=75.0)).free_bytes == 70 * GIB
    assert limited(card, RunConfig(memory_limit_gib=100.0)) == card
    assert limited(card, RunConfig()) == card
    half = limited(dataclasses.replace(card, others=(("python", 6 * GIB), ("Xorg", 4 * GIB))), RunConfig(memory_limit_gib=73.0))
    assert half.others == (("python", 3 * GIB),)
    once = limited(card, RunConfig(memory_limit_gib=24.0))
    assert limited(once, RunConfig(memory_limit_gib=24.0)) == once


def test_a_containers_limit_counts_and_cached_files_do_not(monkeypatch, no_driver):
    files = {"/proc/meminfo": {"MemTotal": 64 << 20, "MemAvailable": 60 << 20}, "/sys/fs/cgroup/memory.stat": {"inactive_file": 3 * GIB}}
    numbers = {"/sys/fs/cgroup/memory.max": 8 * GIB, "/sys/fs/cgroup/memory.current": 5 * GIB}
    monkeypatch.setattr(machine, "_table", lambda path: files.get(path, {}))
    monkeypatch.setattr(machine, "_number", numbers.get)
    monkeypatch.setattr(machine, "resident_bytes", lambda: GIB)
    assert (machine.look().total_bytes, machine.look().others) == (8 * GIB, (("other programs", GIB),))


def test_every_question_exists_in_the_real_bindings():
    real = vars(pytest.importorskip("pynvml"))
    folder = Path(nvml.__file__).parent
    asked = {
        name
        for file in ("nvml.py", "machine.py")
        for name in re.findall(r"\.(nvml[A-Z_]\w+|NVML_\w+|nvmlMemory_v2)", (folder / file).read_text())
    }
    assert len(asked) > 20
    assert sorted(asked - set(real)) == []


def test_kernels_run_from_turing_on_and_where_triton_is_and_layers_are_fused_in_bfloat16(monkeypatch):
    asked, old = machine.find_card("RTX 4090"), machine.find_card("T4")
    older = dataclasses.replace(old, compute_capability=(7, 0))
    assert [card.kernels for card in (asked, old, older, machine.cpu_machine())] == [True, True, False, False]
    assert [card.fuses for card in (asked, old, older, machine.cpu_machine())] == [True, False, False, False]
    here = dataclasses.replace(asked, driver="580.65")
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert (asked.kernels, here.kernels) == (True, False)
