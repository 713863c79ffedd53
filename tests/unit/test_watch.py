"""Detectors: a trace that must fire, one that must not, and memory that survives a checkpoint."""

from __future__ import annotations

import json
import math
import random

import pytest

from qlora_tui.engine.events import Finding, Stepped
from qlora_tui.engine.watch import Watch


def step(number: int, loss: float, norm: float = 1.0) -> Stepped:
    finite = math.isfinite(loss) and math.isfinite(norm)
    return Stepped(number, 1000, 0.1, loss, norm, False, not finite, 1e-4, 100, 50, 1.0, 0.0, (number,))


def findings(watch: Watch, losses: list[float], start: int = 1) -> list[Finding]:
    return [finding for number, loss in enumerate(losses, start) for finding in watch.see(step(number, loss))]


def healthy(seed: int, steps: int = 400) -> list[float]:
    """Loss 1.8 falling to 1.1 with the noise of a step of sixteen rows."""
    noise = random.Random(seed)
    return [1.1 + 0.7 * math.exp(-number / 80) + noise.gauss(0, 0.15) for number in range(steps)]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_left_alone(seed: int) -> None:
    assert findings(Watch(400, 20), healthy(seed)) == []


def test_two_nats_over_the_baseline_warns_once_an_episode() -> None:
    losses = healthy(0, 100) + [4.5] * 5 + healthy(1, 30) + [4.5]
    found = findings(Watch(400, 20), losses)
    assert [finding.step for finding in found] == [101, 136]
    assert found[0].severity == "warn"
    assert found[0].numbers["rows"] == [101]
    assert "learning rate" in found[0].advice[0]


def test_warm_up_is_not_judged() -> None:
    losses = [9.0, *healthy(0, 60)]
    assert findings(Watch(400, 20), losses) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_three_non_finite_losses_in_a_row_end_the_run(value: float) -> None:
    found = findings(Watch(400, 0), [1.0, value, value, value])
    assert [finding.severity for finding in found] == ["warn", "warn", "stop"]


def test_a_non_finite_gradient_counts_like_a_loss() -> None:
    (finding,) = Watch(400, 0).see(step(1, 1.0, math.nan))
    assert (finding.detector, finding.severity) == ("non_finite", "warn")
    assert "gradient" in finding.message


def test_good_steps_between_bad_ones_do_not_end_the_run() -> None:
    found = findings(Watch(400, 0), [math.nan, 1.0, math.nan, 1.0])
    assert [finding.severity for finding in found] == ["warn", "warn"]


def test_bad_steps_that_keep_coming_end_the_run() -> None:
    found = findings(Watch(400, 0), [math.nan, 1.0] * 4)
    assert found[-1].severity == "stop"


def test_a_resumed_watch_judges_like_an_uninterrupted_one() -> None:
    losses = [*healthy(3, 90), 4.4, 4.4, *healthy(4, 10), math.nan, math.nan, math.nan]
    whole = findings(Watch(400, 20), losses)
    for cut in (10, 50, 91, 103):
        first, second = Watch(400, 20), Watch(400, 20)
        early = findings(first, losses[:cut])
        second.restore(json.loads(json.dumps(first.state())))
        assert told(early + findings(second, losses[cut:], cut + 1)) == told(whole)


def told(found: list[Finding]) -> list[tuple[str, int, str, str]]:
    return [(finding.detector, finding.step, finding.severity, finding.message) for finding in found]
