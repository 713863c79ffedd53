"""The terminal: command line, screens and panels. It reads events and leaves wishes; it never touches a model."""

import os

# Textual paints at most so often: at its usual 60 a second a key shows after up to 17 ms more. Nothing is painted while
# nothing changes, so a higher limit costs nothing. Read when textual is first imported, hence here.
os.environ.setdefault("TEXTUAL_FPS", "240")
