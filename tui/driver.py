"""Textual's driver for terminals, except that a byte which is no UTF-8 is only a lost key.

As it comes, one such byte (a terminal set to Latin-1, line noise, an old mouse report) ends the thread that reads keys,
and with it the screen.
"""

from __future__ import annotations

from textual.drivers.linux_driver import LinuxDriver


class PatientDriver(LinuxDriver):
    """Reads keys until it is told to stop, whatever comes in."""

    def run_input_thread(self) -> None:
        """Read on after what cannot be decoded: what came with it in one read is lost, the next key is not."""
        while not self.exit_event.is_set():
            try:
                super().run_input_thread()
                return
            except UnicodeDecodeError:
                continue
