"""Descriptors 0 to 2, before anything else opens a file; imports nothing but os, since every command begins here."""

from __future__ import annotations

import os


def hold_descriptors() -> None:
    """Keep descriptors 0 to 2 taken when they were closed from outside, or the journal would become one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
