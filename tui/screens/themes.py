"""Colours: dark, light, and both again for terminals that have sixteen.

In the order of Okabe and Ito, which the colour-blind can tell apart; no state is told by colour alone. A test holds the
contrast of WCAG 2.1: 4.5 for text, 3 for what only has to be seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from textual.theme import Theme

Choice = Literal["auto", "dark", "light"]


def _theme(name: str, colours: Mapping[str, str], *, dark: bool) -> Theme:
    """Return a theme of Textual's from our few colours; what it would derive by mixing is named where sixteen colours could not show it."""
    own = ("primary", "secondary", "accent", "success", "warning", "error", "foreground", "background", "surface", "panel")
    return Theme(
        name=name,
        dark=dark,
        variables={
            **{key: value for key, value in colours.items() if key not in own},
            "frame-chosen": colours["primary"],
            "footer-background": colours["surface"],
            "footer-key-foreground": colours["primary"],
            "footer-description-foreground": colours["text-muted"],
            "input-cursor-background": colours["primary"],
            "input-cursor-foreground": colours["background"],
            "input-selection-background": colours["chosen"],
            "block-cursor-background": colours["primary"],
            "block-cursor-foreground": colours["background"],
            "scrollbar": colours["frame"],
            "scrollbar-background": colours["background"],
        },
        primary=colours["primary"],
        secondary=colours["text-muted"],
        accent=colours["plot-eval"],
        success=colours["success"],
        warning=colours["warning"],
        error=colours["error"],
        foreground=colours["foreground"],
        background=colours["background"],
        surface=colours["surface"],
        panel=colours["panel"],
    )


DARK = _theme(
    "qlora",
    {
        "background": "#0f131a",
        "surface": "#161c26",
        "panel": "#1d2532",
        "chosen": "#1b3043",
        "foreground": "#d7dde6",
        "text-muted": "#97a4b6",
        "primary": "#56b4e9",
        "success": "#2fb992",
        "warning": "#e6a23c",
        "error": "#f3836a",
        "frame": "#3a4657",
        "plot-raw": "#5c6b80",
        "plot-line": "#56b4e9",
        "plot-eval": "#e69f00",
        "plot-bad": "#ee7733",
        "plot-axis": "#8e9bad",
        "part-activations": "#d083b0",
        "part-loss": "#f0e442",
        "part-rest": "#9aa5b5",
    },
    dark=True,
)
LIGHT = _theme(
    "qlora-light",
    {
        "background": "#fbfaf7",
        "surface": "#f1f0ec",
        "panel": "#e6e8ee",
        "chosen": "#cfe3f2",
        "foreground": "#1d2530",
        "text-muted": "#505c6c",
        "primary": "#00588f",
        "success": "#006650",
        "warning": "#7a4c00",
        "error": "#a8321b",
        "frame": "#8a94a3",
        "plot-raw": "#7f8b9b",
        "plot-line": "#00588f",
        "plot-eval": "#8f5200",
        "plot-bad": "#a8321b",
        "plot-axis": "#505c6c",
        "part-activations": "#8f3f70",
        "part-loss": "#6b5f00",
        "part-rest": "#566270",
    },
    dark=False,
)
DARK_16 = _theme(
    "qlora-16",
    {
        "background": "#000000",
        "surface": "#000000",
        "panel": "#0000aa",
        "chosen": "#0000aa",
        "foreground": "#ffffff",
        "text-muted": "#aaaaaa",
        "primary": "#55ffff",
        "success": "#55ff55",
        "warning": "#ffff55",
        "error": "#ff5555",
        "frame": "#aaaaaa",
        "plot-raw": "#aaaaaa",
        "plot-line": "#55ffff",
        "plot-eval": "#ffff55",
        "plot-bad": "#ff5555",
        "plot-axis": "#aaaaaa",
        "part-activations": "#ff55ff",
        "part-loss": "#ffffff",
        "part-rest": "#aaaaaa",
    },
    dark=True,
)
LIGHT_16 = _theme(
    "qlora-light-16",
    {
        "background": "#ffffff",
        "surface": "#ffffff",
        "panel": "#aaaaaa",
        "chosen": "#aaaaaa",
        "foreground": "#000000",
        "text-muted": "#000000",
        "primary": "#0000aa",
        "success": "#000000",
        "warning": "#aa0000",
        "error": "#aa0000",
        "frame": "#555555",
        "plot-raw": "#555555",
        "plot-line": "#0000aa",
        "plot-eval": "#aa0000",
        "plot-bad": "#aa0000",
        "plot-axis": "#000000",
        "part-activations": "#aa00aa",
        "part-loss": "#000000",
        "part-rest": "#555555",
    },
    dark=False,
)
"""Black on white says less by colour: there, glyphs and words say it all."""

THEMES = (DARK, LIGHT, DARK_16, LIGHT_16)


def chosen(choice: str, environment: Mapping[str, str], *, few_colours: bool) -> str:
    """Return the name of the theme for a choice on this terminal.

    `auto` asks COLORFGBG, which rxvt, Konsole and iTerm2 set; where it is missing it is dark: to ask the terminal itself
    would cost a round trip before the first paint, and some never answer.
    """
    light = choice == "light" or (choice == "auto" and _light_behind(environment))
    if few_colours:
        return (LIGHT_16 if light else DARK_16).name
    return (LIGHT if light else DARK).name


def other(name: str) -> tuple[Choice, str]:
    """Return the choice that is not in use, and its theme for the same number of colours."""
    swapped = {DARK.name: LIGHT.name, LIGHT.name: DARK.name, DARK_16.name: LIGHT_16.name, LIGHT_16.name: DARK_16.name}[name]
    return ("light" if "light" in swapped else "dark"), swapped


def _light_behind(environment: Mapping[str, str]) -> bool:
    """Read the last number of COLORFGBG: 7 and 9 to 15 are light backgrounds."""
    last = environment.get("COLORFGBG", "").rpartition(";")[2]
    return last.isdecimal() and (int(last) == 7 or 9 <= int(last) <= 15)
