"""A pause between two steps, whatever it is for: somebody asked, or the device is too hot.

One that was asked for saves a checkpoint and frees the device's memory, since it may last for days; one for heat leaves
everything where it is. Either is one phase, in which wishes are obeyed, and after it the run goes on to the bit as if nothing
had been. Clocks go on: `max_time` and `until` count a pause, tokens a second and forecasts do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_tui.engine.errors import SpaceError
from qlora_tui.engine.events import Event, Finding, Phase
from qlora_tui.engine.train.parking import FOLDER, Parked, device_free_bytes
from qlora_tui.engine.units import gib

if TYPE_CHECKING:
    from qlora_tui.engine.train.loop import Loop

_LOOK_SECONDS, _HEAT_SECONDS = 0.25, 1.0
_DETECTOR = "pause"


@dataclass(slots=True)
class Pause:
    """Whether the run is to rest, and where its tensors are meanwhile.

    `asked` is what people want, `resting` that the loop stands in a pause. `unfit` says that the run ends without its tensors
    on the device: it can be saved and no longer measured.
    """

    asked: bool = False
    resting: bool = False
    parked: Parked | None = None
    unfit: bool = False

    def why(self) -> str:
        """Say why a wish to go on can do nothing: nobody asked for this pause, or it was taken back already."""
        if not self.resting:
            return "it is not paused"
        return "it goes on as soon as the device has room" if self.parked else "it waits for the device to cool down"

    def lent(self) -> AbstractContextManager[None]:
        """Make adapter and optimizer readable for a save in a pause."""
        return nullcontext() if self.parked is None else self.parked.lent()


def rest(loop: Loop, between: Callable[[], Iterator[Event]], up: Callable[[], bool]) -> Iterator[Event]:
    """Wait while somebody wants a pause or the device is too hot; and tell of a clock that was set, where it matters.

    Args:
        loop: the run, between two steps.
        between: called some times a second; obeys what may be obeyed meanwhile.
        up: true when the run's time is over, which ends a pause as well.
    """
    yield from loop.limits.clock(loop.step)
    hot = loop.limits.heat()
    if hot is None and not loop.pause.asked:
        return
    began, now = time.monotonic(), hot
    loop.pause.resting = True
    yield Phase("pause", "begin", note="as asked" if hot is None else f"the device has {hot:.0f} °C")
    if hot is not None:
        yield loop.limits.too_hot(loop.step, hot)
    told = False
    while not (loop.wishes.urgent() or up()):
        if loop.pause.asked and loop.pause.parked is None:
            yield from _put_away(loop)
        if not loop.pause.asked and (hot is None or loop.limits.cooled(now)):
            if _fetch(loop):
                break
            yield from () if told else (_taken(loop),)
            told = True
        yield from between()
        loop.limits.wait(_LOOK_SECONDS if hot is None else _HEAT_SECONDS)
        now = now if hot is None else loop.limits.temperature()
    yield from _end(loop)
    seconds = time.monotonic() - began
    loop.pause.asked = loop.pause.resting = False
    yield Phase("pause", "end", seconds=seconds)
    if hot is not None:
        yield loop.limits.cool(loop.step, now, seconds)


def _put_away(loop: Loop) -> Iterator[Event]:
    """Save, then free the device; where there is no room for that, pause all the same and say so."""
    yield from loop.save()
    on = "p on the run screen goes on" + ("" if loop.step else "; nothing is saved before the first step")
    try:
        loop.pause.parked = parked = Parked(loop.loaded, loop.optimizer, loop.fence, loop.holdout.folder)
    except SpaceError as error:
        loop.pause.parked = Parked(loop.loaded, loop.optimizer, loop.fence, loop.holdout.folder, free=False)
        told = f"paused, and the device's memory is not free: {error}; {on}"
        yield Finding(_DETECTOR, "warn", loop.step, told, ("make room in RAM or on this disk",), {"freed_bytes": 0})
        return
    where = f"on the disk, in {FOLDER}/" if parked.on_disk else "in RAM"
    free = f"{gib(parked.freed_bytes)} of the device are free for other programs, and the run waits {where}"
    told = free if parked.bytes else "on a CPU the model stays in RAM"
    yield Finding(_DETECTOR, "info", loop.step, f"paused: {told}; {on}", (), {"freed_bytes": parked.freed_bytes})


def _fetch(loop: Loop) -> bool:
    """Bring the tensors back; False while the device has no room for them."""
    if loop.pause.parked is not None and not loop.pause.parked.back():
        return False
    loop.pause.parked = None
    return True


def _taken(loop: Loop) -> Finding:
    lacking = loop.pause.parked.lacking() if loop.pause.parked else 0
    free = device_free_bytes(loop.loaded.device)
    held = f"other programs hold the memory that this run had ({gib(lacking)} lack, {gib(free)} are free)"
    told = f"still paused: {held}; it goes on once there is room"
    advice = ("nvidia-smi says who holds it", "stop and save keeps everything: --resume goes on later")
    return Finding(_DETECTOR, "warn", loop.step, told, advice, {"lacking_bytes": lacking, "free_bytes": free})


def _end(loop: Loop) -> Iterator[Event]:
    """Leave a pause that ends with the run: what is still to be saved is in RAM then, and the device may belong to others."""
    parked, urgent = loop.pause.parked, loop.wishes.urgent()
    if parked is None or (not urgent and _fetch(loop)):
        return
    if not urgent:
        told = "time is up in a pause, and other programs hold this run's memory: it ends saved, without a last measurement"
        yield Finding(_DETECTOR, "warn", loop.step, told, (f"qlora-tui --resume {loop.holdout.folder.name} goes on",))
    if urgent != "abort":
        parked.rescue()
    parked.drop()
    loop.pause.parked, loop.pause.unfit = None, True
