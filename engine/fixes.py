"""What to change so that a run fits, and what to change where there is room: one setting at a time, ranked.

Every change is weighed by estimating the run with it, so what it saves is what it saves, and told with what it
costs: time, and quality in a few words. Lower accumulation is never among them. It saves next to nothing and
changes what a step learns; where rows at once fall, accumulation rises, so that a step sees the same rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_tui.engine import measured
from qlora_tui.engine.budget import estimate
from qlora_tui.engine.changes import Asked, Change, roomier, smaller
from qlora_tui.engine.errors import WontFit
from qlora_tui.engine.machine import Machine, limited
from qlora_tui.engine.measured import Correction
from qlora_tui.engine.models import ModelSpec, entries, find_entry
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import billions, gib
from qlora_tui.engine.values import Value

MOST = 5
"""More advice than this nobody reads."""

_SHOWN = 3
_TOO_LOW = 0.05  # of the device: what an estimate is taken to be short by where memory ran out and nothing was measured
_MUCH_FASTER = 0.97  # a change that saves less time than this is not told as faster


@dataclass(frozen=True, slots=True)
class Fix:
    """A change of settings: what it saves, and what it costs in time and in quality. `enough`: with it alone the run fits.

    As a tip for a run that has room, `saves_bytes` is negative and `quality` may be a gain.
    """

    values: Mapping[str, Value]
    saves_bytes: int
    time_factor: float
    text: str
    enough: bool = False
    quality: str = ""

    @property
    def set(self) -> str:
        """The change as the command line takes it, without `--set`."""
        return " ".join(f"{name}={_typed(value)}" for name, value in self.values.items())

    @property
    def options(self) -> str:
        """The change as options of the command line: each key needs a `--set` of its own."""
        return " ".join(f"--set {name}={_typed(value)}" for name, value in self.values.items())

    def to_json(self) -> dict[str, Any]:
        """Return the promised keys of a fix."""
        return {
            "set": self.set,
            "saves_bytes": self.saves_bytes,
            "time_factor": round(self.time_factor, 2),
            "quality": self.quality,
            "text": self.text,
            "enough": self.enough,
        }


@dataclass(frozen=True, slots=True)
class _Weighed:
    change: Change
    fix: Fix


def fixes(
    model: ModelSpec,
    run: RunConfig,
    machine: Machine,
    *,
    longest: int | None = None,
    lengths: Sequence[int] = (),
    correction: Correction | None = None,
) -> list[Fix]:
    """Return at most five changes that save memory: what is enough first, then the least harm, then the least time.

    When no single one is enough, the smallest bundle of them that is, and a smaller model of the same kind, come first.

    Args:
        model: the base's shape.
        run: the settings.
        machine: the device.
        longest: tokens of the longest row, where every row was counted.
        lengths: tokens of the rows, where they are known: they say what a shorter `max_length` drops.
        correction: how measured peaks compared with predicted ones on this device.

    Raises:
        ConfigError: `lora_target_modules` names a layer that the model does not have.
    """
    asked = Asked(model, run, machine, longest, tuple(sorted(lengths)), correction)
    found = [weighed for change in smaller(asked) if (weighed := _weigh(asked, change)) is not None]
    ranked = sorted(found, key=lambda one: (asked.short and not one.fix.enough, one.change.harm, one.fix.time_factor, -one.fix.saves_bytes))
    single = [one.fix for one in ranked]
    if asked.short and not any(fix.enough for fix in single):
        single = [*_stronger(asked, ranked), *single]
    return single[:MOST]


def tips(
    model: ModelSpec,
    run: RunConfig,
    machine: Machine,
    *,
    longest: int | None = None,
    lengths: Sequence[int] = (),
    correction: Correction | None = None,
) -> list[Fix]:
    """Return at most five changes that spend the memory left over and still fit with the margin: faster ones first.

    Then what makes the result better: a base in 16 bits, and longer rows where some are too long now.

    Raises:
        ConfigError: `lora_target_modules` names a layer that the model does not have.
    """
    asked = Asked(model, run, machine, longest, tuple(sorted(lengths)), correction)
    if asked.short:
        return []
    found = [tip for changes in roomier(asked) if (tip := _spend(asked, changes)) is not None]
    useful = [tip for tip in found if tip.time_factor < _MUCH_FASTER or tip.quality]
    return sorted(useful, key=lambda tip: (tip.time_factor >= _MUCH_FASTER, tip.time_factor))[:MOST]


def refusal(
    model: ModelSpec,
    run: RunConfig,
    machine: Machine,
    said: str,
    *,
    longest: int | None = None,
    lengths: Sequence[int] = (),
    lacking: int = 0,
) -> WontFit:
    """Return the error for a run that the device proved too small for, with the changes that should help, cheapest first.

    The fixes are weighed against a device that is smaller by what the estimate was too low, else the estimate that
    let the run begin would call each of them enough. Where nothing was measured it is taken to lie 5 % beyond what is
    free, unless it said so itself.
    """
    correction = measured.correction_now(machine.name)
    device = limited(machine, run)
    needed = estimate(model, run, machine, longest=longest, correction=correction)
    spare = device.free_bytes - needed.total_bytes
    lack = lacking or (spare + int(_TOO_LOW * device.free_bytes) if spare >= 0 else 0)
    short = dataclasses.replace(device, others_bytes=min(device.others_bytes + lack, device.total_bytes))
    known = fixes(model, run, short, longest=longest, lengths=lengths, correction=correction)
    enough = [fix for fix in known if fix.enough]
    shown = "; or ".join(f"{fix.options} ({fix.text})" for fix in (enough or known)[:_SHOWN])
    told = f"{said}; {gib(device.free_bytes)} of {one_line(machine.name)} may be used"
    if enough:
        return WontFit(told, hint=f"try {shown}", where="memory")
    alone = "no single change is enough: close other programs, lower max_length, or take a smaller model"
    return WontFit(told, hint=f"{alone}; these save most: {shown}" if shown else alone, where="memory")


def _weigh(asked: Asked, change: Change) -> _Weighed | None:
    """Return what a change saves and costs, or None if it saves nothing."""
    after = asked.after(change.values)
    saved = asked.now.total_bytes - after.total_bytes
    if saved <= 0:
        return None
    factor = asked.factor(change.values)
    costs = [f"{factor:.1f}x the time"] if factor > 1.05 else []
    costs += [change.quality] if change.quality else []
    text = ", ".join([f"{change.text}: saves {gib(saved)}", *costs])
    return _Weighed(change, Fix(change.values, saved, factor, text, after.fits, change.quality))


def _spend(asked: Asked, changes: Iterable[Change]) -> Fix | None:
    """Return the first of `changes` that fits with the margin, as a tip."""
    for change in changes:
        if asked.enough(change.values):
            after, factor = asked.after(change.values), asked.factor(change.values)
            gains = [f"{1 / factor:.1f}x faster"] if factor < _MUCH_FASTER else []
            gains += [change.quality] if change.quality else []
            gains += [f"{factor:.1f}x the time"] if factor > 1.05 else []
            more = after.total_bytes - asked.now.total_bytes
            text = ", ".join([f"{change.text}: {'+' if more >= 0 else '-'}{gib(abs(more))}, {gib(after.total_bytes)} in all", *gains])
            return Fix(change.values, -more, factor, text, True, change.quality)
    return None


def _stronger(asked: Asked, ranked: Sequence[_Weighed]) -> list[Fix]:
    """Return the smallest bundle of single changes that is enough, mildest first, and the largest sister model that then fits."""
    found: list[Fix] = []
    harmless: dict[str, Value] = {}
    bundle: dict[str, Value] = {}
    for one in sorted(ranked, key=lambda one: (one.change.harm, one.fix.time_factor, -one.fix.saves_bytes)):
        bundle |= one.change.values
        harmless = dict(bundle) if one.change.harm == 0 else harmless
        if len(bundle) > len(one.change.values) and asked.after(bundle).fits:
            quality = ", ".join(other.change.quality for other in ranked if other.change.quality and _inside(other.change.values, bundle))
            words = "these together" if quality else "these together leave the result alone"
            weighed = _weigh(asked, Change(bundle, words, quality=quality))
            found += [weighed.fix] if weighed else []
            break
    return found + _smaller_model(asked, harmless)


def _smaller_model(asked: Asked, leaner: dict[str, Value]) -> list[Fix]:
    """Return the largest sister model that fits, as the run is or with what leaves the result alone; a list of one or none."""
    for sister in _sisters(asked.model):
        for extra in ({}, leaner):
            after = asked.after(extra, sister)
            if after.fits:
                text = f"a smaller model, {billions(sister.params)} weights: {gib(after.total_bytes)}, knows less"
                saved, factor = asked.now.total_bytes - after.total_bytes, asked.factor(extra, sister)
                return [Fix({"model_name_or_path": sister.name, **extra}, saved, factor, text, True, "knows less")]
    return []


def _sisters(model: ModelSpec) -> list[ModelSpec]:
    """Return smaller models of the same maker, family and vocabulary that need no other licence click, the largest first.

    The vocabulary tells generations apart: an older model of the same family is not what somebody wants who chose a new one.
    """
    known = find_entry(model.name)
    if known is None:
        return []
    maker = model.name.split("/")[0]
    near = [entry.spec for entry in entries() if entry.spec.name.split("/")[0] == maker and (known.gated or not entry.gated)]
    alike = [spec for spec in near if spec.family == model.family and abs(spec.vocab_size / model.vocab_size - 1) < 0.01]
    smaller = [spec for spec in alike if spec.params < model.params]
    return sorted(smaller, key=lambda spec: -spec.params)


def _inside(values: Mapping[str, Value], bundle: Mapping[str, Value]) -> bool:
    return all(bundle.get(name) == value for name, value in values.items())


def _typed(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else f"{value}"
