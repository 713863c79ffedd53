"""A run without a screen and without a model, as a process of its own: `headless_driver.py TRAINING RUNS_DIR [--json] [--hang]`."""

from __future__ import annotations

import sys
from dataclasses import replace

from fake_run import RUN, TRAININGS, checked

from qlora_tui.engine.runs import new_run_folder
from qlora_tui.engine.session import Session
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui.commands.run import Plan, headless
from qlora_tui.tui.printer import Streams
from qlora_tui.tui.reading import Reading


def begin(plan: Plan, run: RunConfig, reading: Reading) -> Session:
    """Begin the training that was named, in a new folder."""
    return Session(run, checked(run), folder=new_run_folder(run, plan.name), train=TRAININGS[sys.argv[1]])


if __name__ == "__main__":
    chosen = replace(RUN, runs_dir=sys.argv[2], end_if_hung=1.0 if "--hang" in sys.argv else 0.0)
    sys.exit(headless(Plan(chosen, sys.argv[1]), Streams(), as_json="--json" in sys.argv, begin=begin))
