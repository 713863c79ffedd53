"""`python -m qlora_tui.tui.web.tab OPTIONS`: the command line, on the terminal that stands behind one browser tab.

It takes that terminal as its controlling one, as a shell does, so that the end of the tab reaches it as a hang-up.
A process of its own does this because the server has threads, and code between fork and exec must not meet them.
"""

import fcntl
import sys
import termios

from qlora_tui.tui.cli import main

if __name__ == "__main__":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.exit(main())
