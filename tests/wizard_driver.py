"""The wizard, then a run without a model, as a process of its own: `wizard_driver.py TRAINING RUNS_DIR [attach RUN]`.

The demo's draft, so that Enter alone walks through; with `attach`, the product's own command.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import sys
import termios
from dataclasses import replace

from canned_run import QuietDesk
from fake_run import TRAININGS, checked

from qlora_tui.engine import preset
from qlora_tui.engine.runs import new_run_folder
from qlora_tui.engine.session import Session
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui import app, cli
from qlora_tui.tui.commands import run as room
from qlora_tui.tui.printer import Streams
from qlora_tui.tui.reading import Reading


def begin(plan: room.Plan, run: RunConfig, reading: Reading) -> Session:
    """Begin the training that was named, in a new folder."""
    return Session(run, checked(run), folder=new_run_folder(run, plan.name), train=TRAININGS[sys.argv[1]])


if __name__ == "__main__":
    with contextlib.suppress(OSError):  # a session of its own that has its terminal already
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    if "attach" in sys.argv:
        cli.leave(code := cli.main(sys.argv[sys.argv.index("attach") :]))
        sys.exit(code)
    app.Desk = QuietDesk
    room.warm = lambda: None
    chosen = replace(preset.resolve(preset="demo", config=None, flags={}), runs_dir=sys.argv[2])
    options = argparse.Namespace(no_mouse=False, ascii=False)
    cli.leave(room.on_screen(options, room.Plan(chosen, "test", demo=True), Streams(), begin=begin))
