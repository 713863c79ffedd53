from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest

from qlora_tui.engine import machine
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.events import Device
from qlora_tui.engine.machine import Machine, card_of, find_card, limited
from qlora_tui.engine.spec import RunConfig

GIB = 1 << 30


class FakeDriver:
    """The parts of pynvml that are used; two cards, and sensors that can be broken by name."""

    NVML_TEMPERATURE_GPU = 0
    nvmlClocksThrottleReasonSwPowerCap = 4  # noqa: N815
    nvmlClocksThrottleReasonHwThermalSlowdown = 64  # noqa: N815

    def __init__(self):
        self.broken = set()
        self.used = [3 * GIB, 1 * GIB]
        self.pids = []
        self.reasons = 4
        self.asked = []

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

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        self.asked.append(index)
        if index > 1:
            raise RuntimeError("no such card")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        return {"GPU-two": 1}[uuid]

    def nvmlDeviceGetMemoryInfo(self, index):  # noqa: N802
        return SimpleNamespace(total=24 * GIB, used=self.used[index])

    def nvmlDeviceGetName(self, index):  # noqa: N802
        return [b"NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3090"][index]

    def nvmlDeviceGetCudaComputeCapability(self, index):  # noqa: N802
        return [(8, 9), (7, 5)][index]

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        return "580.1"

    def nvmlDeviceGetComputeRunningProcesses(self, index):  # noqa: N802
        return self.pids

    def nvmlDeviceGetUtilizationRates(self, index):  # noqa: N802
        return SimpleNamespace(gpu=98)

    def nvmlDeviceGetPowerUsage(self, index):  # noqa: N802
        return 402_000

    def nvmlDeviceGetEnforcedPowerLimit(self, index):  # noqa: N802
        return 450_000

    def nvmlDeviceGetTemperature(self, index, sensor):  # noqa: N802
        return 71

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, index):  # noqa: N802
        return self.reasons


@pytest.fixture
def driver(monkeypatch):
    fake = FakeDriver()
    monkeypatch.setitem(sys.modules, "pynvml", fake.module())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_torch_is_cpu_only", lambda: False)
    machine._nvml.cache_clear()
    yield fake
    machine._nvml.cache_clear()


@pytest.fixture
def no_driver(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    machine._nvml.cache_clear()
    yield
    machine._nvml.cache_clear()


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
    assert found == Machine("NVIDIA GeForce RTX 4090", "cuda", 24 * GIB, 3 * GIB, True, (8, 9), "580.1")
    assert found.free_bytes == 21 * GIB


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        ("1", "NVIDIA GeForce RTX 3090"),
        ("1,0", "NVIDIA GeForce RTX 3090"),
        ("GPU-two", "NVIDIA GeForce RTX 3090"),
        ("0", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_visible_devices_choose_the_card(driver, monkeypatch, visible, name):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.look().name == name


@pytest.mark.parametrize("visible", ["", "-1", "7", "GPU-unknown", "nonsense"])
def test_hidden_or_absent_cards_leave_the_processor(driver, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.look().kind == "cpu"


def test_an_old_card_computes_without_bfloat16(driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert not machine.look().bf16


def test_a_torch_without_cuda_hides_the_card(driver, monkeypatch):
    monkeypatch.setattr(machine, "_torch_is_cpu_only", lambda: True)
    assert machine.look().kind == "cpu"


def test_a_driver_that_does_not_start_is_no_gpu(driver):
    driver.broken.add("nvmlInit")
    machine._nvml.cache_clear()
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


@pytest.mark.parametrize(
    ("name", "memory", "card"),
    [
        ("NVIDIA GeForce RTX 4090", 24, "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", 80, "H100 80GB"),
        ("NVIDIA A100-SXM4-40GB", 40, "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", 80, "A100 80GB"),
        ("NVIDIA A10G", 22, "A10G"),
        ("NVIDIA L40S", 45, "L40S"),
        ("NVIDIA L40", 45, None),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16, "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 3080 Ti", 12, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5, None),
        ("", 8, None),
    ],
)
def test_a_drivers_name_means_one_card_or_none(name, memory, card):
    found = card_of(Machine(name, "cuda", memory * GIB))
    assert (found.name if found else None) == card


def test_every_card_is_found_by_its_own_name():
    for card in machine.cards():
        found = find_card(card.name.lower())
        assert (found.total_bytes, card_of(found)) == (card.memory_bytes, card)


def test_cards_are_found_by_short_names():
    assert find_card("4090") == find_card("NVIDIA GeForce RTX 4090")
    assert find_card("h100").name == "H100 80GB"


@pytest.mark.parametrize(
    ("name", "said"), [("RTX 409", "did you mean RTX 4090"), ("a100", "A100 40GB or A100 80GB"), ("", "known"), ("Voodoo", "known")]
)
def test_a_card_that_is_not_known_is_refused_with_help(name, said):
    with pytest.raises(ConfigError, match=said):
        find_card(name)


def test_a_limit_hides_memory_and_others_live_there_first():
    card = Machine("card", "cuda", 80 * GIB, 10 * GIB)
    assert limited(card, RunConfig(memory_limit_gib=24.0)).free_bytes == 24 * GIB
    assert limited(card, RunConfig(memory_limit_gib=75.0)).free_bytes == 70 * GIB
    assert limited(card, RunConfig(memory_limit_gib=100.0)) == card
    assert limited(card, RunConfig()) == card
    once = limited(card, RunConfig(memory_limit_gib=24.0))
    assert limited(once, RunConfig(memory_limit_gib=24.0)) == once


def test_a_containers_limit_counts_and_cached_files_do_not(monkeypatch, no_driver):
    files = {"/proc/meminfo": {"MemTotal": 64 << 20, "MemAvailable": 60 << 20}, "/sys/fs/cgroup/memory.stat": {"inactive_file": 3 * GIB}}
    numbers = {"/sys/fs/cgroup/memory.max": 8 * GIB, "/sys/fs/cgroup/memory.current": 5 * GIB}
    monkeypatch.setattr(machine, "_table", lambda path: files.get(path, {}))
    monkeypatch.setattr(machine, "_number", numbers.get)
    monkeypatch.setattr(machine, "resident_bytes", lambda: GIB)
    assert (machine.look().total_bytes, machine.look().others_bytes) == (8 * GIB, GIB)
