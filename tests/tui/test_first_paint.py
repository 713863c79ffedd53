"""The screens come up, and the wizard is walked, without torch: checked where imports cannot hide, in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys

WALK = """
import asyncio, sys, time
import qlora_tui.tui.app as app_module
heavy = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
assert not [name for name in heavy if name in sys.modules], "at import"
from qlora_tui.engine import preset
from qlora_tui.tui.screens.wizard import WizardScreen

async def walk():
    run = preset.resolve(preset="demo", config=None, flags={})
    app = app_module.TunerApp(start=None, draft=run, follow=None, demo=True)
    async with app.run_test(size=(80, 24)) as pilot:
        print("painted", [name for name in heavy if name in sys.modules])
        wizard = next(screen for screen in app.screen_stack if isinstance(screen, WizardScreen))
        for page in ("model", "data", "numbers", "go"):
            await pilot.press("enter")
            deadline = time.monotonic() + 60
            while wizard.page.title != page:
                assert time.monotonic() < deadline, page
                await pilot.pause(0.05)
        print("walked", [name for name in heavy if name in sys.modules])

asyncio.run(walk())
"""


def test_the_wizard_is_walked_to_its_end_without_torch(home):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "QLORA_TUI_HOME": str(home)}
    ran = subprocess.run([sys.executable, "-c", WALK], capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines() == ["painted []", "walked []"]
