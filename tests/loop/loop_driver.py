"""A job over the tiny model, driven the way the session drives it but without thread, signals or journal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tui.engine.data import load as load_data
from qlora_tui.engine.data import load_eval
from qlora_tui.engine.events import Event, Stepped, Wish
from qlora_tui.engine.hub import ModelFiles
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import from_folder
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import Job, Result, train

CPU = Machine(name="CPU", kind="cpu", total_bytes=8 << 30, others_bytes=0, bf16=False)


@dataclass
class Asked:
    """Wishes that a test scripts: `at_step` maps a number of steps done to what is asked then."""

    at_step: dict[int, str] = field(default_factory=dict)
    steps: int = 0
    wishes: dict[int, list[Wish]] = field(default_factory=dict)  # handed over at the safe point after so many steps

    def urgent(self) -> str | None:
        due = [name for step, name in self.at_step.items() if step <= self.steps and name in ("stop", "abort")]
        return due[-1] if due else None

    def take(self) -> list[Wish]:
        due = [step for step, name in self.at_step.items() if step <= self.steps and name == "save"]
        found = [Wish(str(step), 0.0, 1, self.at_step.pop(step)) for step in due]
        return found + [wish for step in sorted(self.wishes) if step <= self.steps for wish in self.wishes.pop(step)]


@dataclass
class Ran:
    """What a run said and how it ended."""

    events: list[Event]
    result: Result | None
    error: Exception | None
    folder: Path

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.of(Stepped)]


def drive(
    run: RunConfig,
    folder: Path,
    asked: Asked | None = None,
    *,
    resume: bool = False,
    rehearse: bool = False,
    on_step: Callable[[Stepped], None] = lambda _: None,
    on_event: Callable[[Event], None] = lambda _: None,
    machine: Machine = CPU,
) -> Ran:
    """Run to the end and collect what happened."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = asked or Asked()
    events: list[Event] = []
    job = Job(
        run=run,
        folder=folder,
        model_files=ModelFiles(Path(run.model_name_or_path)),
        model_spec=from_folder(Path(run.model_name_or_path)),
        dataset=load_data(run),
        eval_dataset=load_eval(run),
        machine=machine,
        wishes=asked,
        say=events.append,
        resume=resume,
        rehearse_on_cpu=rehearse,
    )
    work = train(job)
    try:
        while True:
            event = next(work)
            events.append(event)
            on_event(event)
            if isinstance(event, Stepped):
                asked.steps = event.step
                on_step(event)
    except StopIteration as end:
        return Ran(events, end.value, None, folder)
    except Exception as error:  # noqa: BLE001  the test looks at it
        return Ran(events, None, error, folder)
