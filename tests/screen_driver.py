"""A run with the run screen and without a model, as a process of its own: `screen_driver.py TRAINING RUNS_DIR`."""

from __future__ import annotations

import argparse
import fcntl
import sys
import termios
from dataclasses import replace

from fake_run import RUN, TRAININGS, checked

from qlora_tui.engine.runs import new_run_folder
from qlora_tui.engine.session import Session
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui import cli
from qlora_tui.tui.commands import run as room
from qlora_tui.tui.printer import Streams
from qlora_tui.tui.reading import Reading


def begin(plan: room.Plan, run: RunConfig, reading: Reading) -> Session:
    """Begin the training that was named, in the folder of the plan."""
    assert plan.folder is not None
    return Session(run, checked(run), folder=plan.folder, train=TRAININGS[sys.argv[1]])


if __name__ == "__main__":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # a shell does this: the terminal's end then reaches us as SIGHUP
    chosen = replace(RUN, runs_dir=sys.argv[2], end_if_hung=1.0 if "--hang" in sys.argv else 0.0)
    plan = room.Plan(chosen, "test", new_run_folder(chosen, "test"))
    options = argparse.Namespace(no_mouse=False, ascii=False)
    cli.leave(room.on_screen(options, plan, Streams(), begin=begin))
