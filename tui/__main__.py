"""`python -m qlora_tui.tui`: the same as the command `qlora-tui`."""

import sys

from qlora_tui.tui.cli import main

sys.exit(main())
