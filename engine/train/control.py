"""What people ask of a run between two steps: each wish is obeyed or refused with one sentence, and answered by an event.

Everything here happens at the safe point between optimizer steps, in the thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING

from qlora_tui.engine.events import Command, Event, Finding, Wish
from qlora_tui.engine.rates import PLANNED, Change
from qlora_tui.engine.text import one_line
from qlora_tui.engine.train.pause import rest

if TYPE_CHECKING:
    from qlora_tui.engine.train.loop import Loop


def safe_point(loop: Loop, trained_seconds: Callable[[], float]) -> Generator[Event, None, str]:
    """Between steps: obey wishes, rest where that is wanted, look at the clock; returns why to stop, or "done" to go on.

    However short the time, every attempt takes one step, so that it ends with something saved.
    """
    measuring = loop.holdout.seconds + loop.samples.seconds + loop.checks.seconds(loop.holdout.seconds)

    def up() -> bool:
        return loop.limits.up(trained_seconds(), loop.timed, measuring)

    yield from obey(loop)
    yield from rest(loop, lambda: obey(loop), up)
    yield from _due(loop)
    return loop.wishes.urgent() or ("time" if loop.pause.unfit or up() else "done")


def obey(loop: Loop) -> Iterator[Event]:
    """Answer every wish that waits, and do what it asks."""
    for wish in loop.wishes.take():
        handle = _HANDLERS.get(wish.name)
        yield from handle(loop, wish) if handle else (_refused(wish, "that is not obeyed between steps"),)


def _save(loop: Loop, wish: Wish) -> Iterator[Event]:
    if not loop.step:
        yield _refused(wish, "there is nothing to save before the first step")
        return
    yield _obeyed(wish, "it was saved already" if loop.keeper.step == loop.step else "")
    with loop.pause.lent():
        yield from loop.save()


def _pause(loop: Loop, wish: Wish) -> Iterator[Event]:
    if loop.pause.asked:
        yield _refused(wish, "it is paused already")
        return
    loop.pause.asked = True
    yield _obeyed(wish)


def _resume(loop: Loop, wish: Wish) -> Iterator[Event]:
    if not loop.pause.asked:
        yield _refused(wish, loop.pause.why())
        return
    loop.pause.asked = False
    yield _obeyed(wish)


def _sample(loop: Loop, wish: Wish) -> Iterator[Event]:
    if loop.pause.asked or loop.pause.resting:
        yield _refused(wish, "the run is paused: go on first")
        return
    prompts, fault = loop.samples.wanted(wish.args.get("prompt"))
    if fault:
        yield _refused(wish, fault)
        return
    yield _obeyed(wish)
    yield from loop.samples.show(loop.step, prompts)


def _set(loop: Loop, wish: Wish) -> Iterator[Event]:
    """Multiply the learning rate from the next step on; `args` are `key`, which must be learning_rate, and `factor`."""
    if wish.args.get("key") != "learning_rate":
        yield _refused(wish, f"only learning_rate can be set while a run goes, not {one_line(wish.args.get('key'), limit=40)!r}")
        return
    try:
        factor = float(wish.args["factor"])
        fault = loop.rates.fault(factor)
    except (KeyError, TypeError, ValueError):
        fault = "it names no factor"
    if fault:
        yield _refused(wish, fault)
        return
    yield _changed(loop, Change(loop.step + 1, factor, wish.id))


def _due(loop: Loop) -> Iterator[Event]:
    """Let the changes count that the config plans for the next step, or that a resume finds in the journal."""
    for change in loop.rates.due(loop.step + 1):
        yield _changed(loop, change)


def _changed(loop: Loop, change: Change) -> Event:
    loop.rates.change(change)
    told = f"from step {change.step} on the learning rate is {loop.rates.factor:g} times the planned one"
    if change.id.startswith(PLANNED):
        numbers = {"step": change.step, "factor": change.factor}
        return Finding("learning_rate", "info", loop.step, f"{told}: learning_rate_changes", (), numbers)
    args = {"key": "learning_rate", "factor": change.factor}
    return Command(change.id, "set", obeyed=True, why=told, step=change.step, args=args)


def _obeyed(wish: Wish, why: str = "") -> Command:
    return Command(wish.id, wish.name, obeyed=True, why=why)


def _refused(wish: Wish, why: str) -> Command:
    return Command(wish.id, wish.name, obeyed=False, why=why)


_HANDLERS: Mapping[str, Callable[[Loop, Wish], Iterator[Event]]] = {
    "save": _save,
    "pause": _pause,
    "resume": _resume,
    "sample": _sample,
    "set": _set,
}
