"""What Textual needs from the table of actions: bindings, and a footer that shows only what fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rich.cells import cell_len
from textual import events
from textual.actions import parse
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.dom import DOMNode
from textual.keys import key_to_character
from textual.screen import Screen
from textual.widgets import Footer
from textual.widgets._footer import FooterKey  # Textual gives it no public name

from qlora_tui.tui.actions import PLACES, Action, help_lines, keys_of


def bindings(place: str) -> list[BindingType]:
    """Return the bindings of a place; their ids are what the user's own keys are told by."""
    return [_binding(place, action) for action in PLACES[place] if action.keys]


def _binding(place: str, action: Action) -> Binding:
    return Binding(
        action.keys,
        action.call,
        action.label,
        show=action.footer and bool(action.label),
        key_display=action.written or None,
        priority=action.first,
        tooltip=action.sentence,
        id=f"{place}.{action.name}",
    )


class KeyedScreen(Screen[None]):
    """A screen whose keys stand in the table of actions, under `place`."""

    place: ClassVar[str] = ""

    def places(self) -> list[tuple[str, DOMNode]]:
        """Return whose keys are heard here, as the table calls them, and what obeys them."""
        return [(self.place, self)]

    @property
    def typing(self) -> bool:
        """Say whether one types here, so that letters are only letters."""
        return False


class KeyLine(Footer):
    """The keys at the foot of a screen: as many as fit, and always those for help and for leaving."""

    def __init__(self) -> None:
        """Show keys of one width beside each other, without Textual's own palette."""
        super().__init__(show_command_palette=False, compact=True)
        self._width = 0

    def compose(self) -> ComposeResult:
        """Leave out what does not fit, from the end: a key that is cut in half helps nobody.

        There is one cell before the first key, and two after each that the last one does without.
        """
        found = [key for key in super().compose() if isinstance(key, FooterKey)]
        room = self.screen.size.width + 1
        kept = set()
        for key in sorted(found, key=lambda key: (key.action not in _ALWAYS, key.action in _LEAST)):
            room -= _width(key)
            if room >= 0 or key.action in _ALWAYS:
                kept.add(key)
        yield from (key for key in found if key in kept)

    def on_resize(self, event: events.Resize) -> None:
        """Choose anew for another width."""
        if event.size.width != self._width:
            self._width = event.size.width
            self.call_after_refresh(self.recompose)


_ALWAYS = {action.call for actions in PLACES.values() for action in actions if action.always}
_LEAST = {action.call for actions in PLACES.values() for action in actions if action.least}


def _width(key: FooterKey) -> int:
    return cell_len(f"{key.key_display} {key.description}  ")


def chosen_keys(node: DOMNode) -> Mapping[str, str]:
    """Return the keys that the person has chosen, by the name of the action."""
    from qlora_tui.tui.app import TunerApp  # it imports the screens

    return node.app.chosen_keys if isinstance(node.app, TunerApp) else {}


def offered(screen: KeyedScreen) -> list[tuple[Action, DOMNode]]:
    """Return what can be done on `screen` now, and what obeys it."""
    places = (*screen.places(), ("app", screen.app))
    return [(action, node) for place, node in places for action in PLACES[place] if _allows(node, action)]


def help_of(screen: KeyedScreen) -> list[tuple[str, str]]:
    """Return (keys, what they do) for all that can be done on `screen` now; where one types, letters are only letters."""
    chosen = chosen_keys(screen)
    heard = [action for action, _ in offered(screen) if not (screen.typing and _types(keys_of(action, chosen)))]
    return help_lines(heard, chosen)


_COMING = ("fixes", "undo")
"""What may come and go while one types: its letter is no text even while it does nothing."""


def means_something(screen: Screen[object], key: str) -> bool:
    """Say whether `key` is one of the letters with a meaning on `screen`, so that a field does not take it as typed."""
    chosen = chosen_keys(screen)
    found = [action for place in ("app", "wizard") for action in PLACES[place] if key in keys_of(action, chosen).split(",")]
    return any(action.name in _COMING or _allows(screen, action) for action in found)


def _allows(node: DOMNode, action: Action) -> bool:
    _, name, arguments = parse(action.call)
    return bool((node.app if action.call.startswith("app.") else node).check_action(name, arguments))


def _types(keys: str) -> bool:
    """Say whether every one of `keys` is a letter or a sign."""
    return all((key_to_character(key) or "\0").isprintable() for key in keys.split(","))
