"""What unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qlora_tui.engine import budget, planner, steptime
from qlora_tui.engine.machine import Machine


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Estimate as for layers, loss and 4-bit weights without kernels: what was measured before there were any, and older cards."""
    memories = (budget._estimate, planner._choose, steptime.micro_batch)
    monkeypatch.setattr(Machine, "kernels", False)
    for memory in memories:
        memory.cache_clear()
    yield
    for memory in memories:
        memory.cache_clear()
