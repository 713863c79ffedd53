"""What the person prefers of the screens: `screen.toml` in the config folder, and the theme chosen last.

    theme = "light"          # dark, light or auto
    [keys]
    stop = "x"               # by the name of the action; several keys with commas

It is no part of a run, so it is not in config.toml: the same run looks different to two people and is the same.
"""

from __future__ import annotations

import contextlib
import tomllib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.places import place, replace_file
from qlora_tui.engine.spec import nearest
from qlora_tui.engine.text import one_line
from qlora_tui.tui.actions import PLACES, clash, keys_of, names

THEMES = ("auto", "dark", "light")
_FIXED = ("interrupt",)  # ctrl+c ends a run safely: whoever sits down here has to be able to rely on it
_NAMED = {"esc": "escape", "return": "enter", "pgup": "pageup", "pgdn": "pagedown"}
_KEYS = {
    *("escape", "enter", "tab", "shift+tab", "space", "backspace", "delete", "insert", "home", "end", "pageup", "pagedown"),
    *("up", "down", "left", "right"),
    *(f"f{number}" for number in range(1, 13)),
    *(f"ctrl+{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
}


@dataclass(frozen=True, slots=True)
class Preferences:
    """How the screens should look and which keys they obey; `keys` by the name of the action."""

    theme: str = "auto"
    keys: Mapping[str, str] = field(default_factory=dict)


def read(theme: str = "") -> Preferences:
    """Return what is preferred; `theme`, if given, wins over the file, and the file over what was chosen last.

    Raises:
        ConfigError: the file is not TOML, or names a theme, an action or a key that there is not, or one key twice.
    """
    path = place("config") / "screen.toml"
    table = _table(path)
    where = str(path)
    unknown = [name for name in table if name not in ("theme", "keys")]
    if unknown:
        raise ConfigError(f"no setting {one_line(unknown[0])!r} of the screens", hint="there are theme and [keys]", where=where)
    wanted = table.get("theme", "")
    if wanted not in ("", *THEMES):
        raise ConfigError(f"no theme {one_line(str(wanted))!r}", hint=f"there are {', '.join(THEMES)}", where=where)
    return Preferences(theme or str(wanted) or _last_theme(), _keys(table.get("keys", {}), where))


def remember_theme(theme: str) -> None:
    """Keep the theme for the next time; a home that cannot be written costs only that."""
    with contextlib.suppress(OSError):
        replace_file(_theme_file(), theme + "\n")


def _theme_file() -> Path:
    return place("state") / "theme.txt"


def _last_theme() -> str:
    try:
        kept = _theme_file().read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "auto"
    return kept if kept in THEMES else "auto"


def _table(path: Path) -> Mapping[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {one_line(error)}", where=str(path)) from None


def _keys(table: object, where: str) -> Mapping[str, str]:
    """Return the keys by action, checked one by one and then together."""
    if not isinstance(table, Mapping):
        raise ConfigError("keys is no table", hint='write [keys], then lines such as stop = "x"', where=where)
    found = {}
    for name, text in table.items():
        if name in _FIXED or name not in names():
            hint = nearest(str(name), [known for known in names() if known not in _FIXED]) or "README.md lists them"
            raise ConfigError(f"no action {one_line(name)!r} whose key can be changed", hint=hint, where=where)
        found[name] = _read_keys(name, text, where)
    if twice := clash(found):
        key, first, second = twice
        raise ConfigError(f"key {key!r} would be both {first} and {second}", hint="give one of them another key", where=where)
    return found


def _read_keys(name: str, text: object, where: str) -> str:
    keys = [_key(part.strip()) for part in text.split(",")] if isinstance(text, str) and text.strip(", ") else [None]
    if None in keys:
        told = "one letter, or a name such as f5, ctrl+t, space, pageup; several with commas"
        raise ConfigError(f"{name} = {one_line(str(text))!r} names no key", hint=told, where=where)
    fields = any(action.name == name for action in PLACES["wizard"])
    digit = next((key for key in keys if key and fields and key.isdecimal()), None)
    if digit:
        raise ConfigError(f"{name} cannot be on {digit!r}", hint="numbers are typed in the wizard", where=where)
    return ",".join(key for key in keys if key)


def _key(text: str) -> str | None:
    """Return Textual's name of a key: letters and digits as they are, signs by their Unicode name.

    >>> _key("x"), _key("?"), _key("Esc"), _key("ctrl+T"), _key("two words")
    ('x', 'question_mark', 'escape', 'ctrl+t', None)
    """
    if len(text) == 1 and text.isprintable():
        return text if text.isalnum() else unicodedata.name(text).lower().replace("-", "_").replace(" ", "_")
    name = _NAMED.get(text.lower(), text.lower())
    return name if name in _KEYS else None


def textual_keymap(chosen: Mapping[str, str]) -> dict[str, str]:
    """Return the chosen keys by the ids that the bindings carry: place and name."""
    return {
        f"{where}.{action.name}": keys_of(action, chosen) for where, table in PLACES.items() for action in table if action.name in chosen
    }
