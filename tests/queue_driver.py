"""The queue with runs that have no model: `queue_driver.py WORDS` is `qlora-tui WORDS`; `queue_driver.py _run FOLDER` one such run.

What a run does is told by its `revision`: the name of one of `fake_run.TRAININGS`, or `dies`, which ends its process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from fake_run import TRAININGS, checked, step

from qlora_tui.engine import preset
from qlora_tui.engine.errors import EngineError
from qlora_tui.engine.events import Event
from qlora_tui.engine.journal import EVENTS
from qlora_tui.engine.session import Session
from qlora_tui.engine.spec import RunConfig, from_values
from qlora_tui.tui import cli
from qlora_tui.tui.commands import run as command
from qlora_tui.tui.printer import Streams
from qlora_tui.tui.reading import Reading


def dies(**_job: Any) -> Generator[Event, None, Any]:
    """Take a step and end the process as the system does when memory is short."""
    yield step(1)
    os.kill(os.getpid(), signal.SIGKILL)


def resumed(wishes: Any, **job: Any) -> Generator[Event, None, Any]:
    """Run until asked the first time, and three steps when gone on with."""
    return TRAININGS["three_steps" if job["resume"] else "until_asked"](wishes=wishes, **job)


ALL = {**TRAININGS, "dies": dies, "resumed": resumed}


def begin(plan: command.Plan, run: RunConfig, reading: Reading) -> Session:
    """Begin the training that the run names, in the folder that the queue made."""
    assert plan.folder is not None
    if run.revision == "refused":
        raise EngineError("its data are gone")
    again = (plan.folder / EVENTS).exists()
    return Session(run, checked(run), folder=plan.folder, resume=again, train=ALL[run.revision])


def spawn(folder: Path) -> subprocess.Popen[bytes]:
    """Start this very file as the run's process."""
    with (folder / "log.txt").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, __file__, "_run", str(folder)], stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )


def run_one(folder: Path) -> int:
    """Run what a folder's run.toml describes."""
    plan = command.Plan(from_values(preset.read_file(folder / "run.toml")), folder.name, folder)
    try:
        return command.headless(plan, Streams(), as_json=False, begin=begin)
    except EngineError as error:
        command._not_begun(plan.run, folder, error)
        return int(error.exit_code)


if __name__ == "__main__":
    if sys.argv[1] == "_run":
        sys.exit(run_one(Path(sys.argv[2])))
    command.spawn = spawn
    sys.exit(cli.main(sys.argv[1:]))
