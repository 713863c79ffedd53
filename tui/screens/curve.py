"""The keys of the run screen that only change what is seen: the curve's axes, crosshair and zoom, the log's search, the samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from textual import on
from textual.widgets import Input

from qlora_tui.engine.journal import EVENTS
from qlora_tui.tui.follow import Follower
from qlora_tui.tui.history import Bucket
from qlora_tui.tui.panels.base import Panel, View
from qlora_tui.tui.panels.log import LogPanel, chosen, matching
from qlora_tui.tui.panels.loss import LossPanel, buckets_of, edges
from qlora_tui.tui.screens.keys import KeyedScreen
from qlora_tui.tui.sight import Sight
from qlora_tui.tui.state import RunState

PANELS = ("loss", "memory", "device", "findings", "log", "samples")
_MARGIN = 7  # what the y axis takes of the plot's cells, about


class LookingScreen(KeyedScreen):
    """What a person can look at; a subclass composes the panels, reads and leaves wishes."""

    def __init__(self, folder: Path, view: View) -> None:
        """Look at the run in `folder` as `view` says."""
        super().__init__()
        self.folder, self.view = folder, view
        self.follower = Follower(folder / EVENTS, folder.name)
        self._selected = 0

    @property
    def state(self) -> RunState:
        """Return the run as far as it was read."""
        return self.follower.state

    @property
    def behind(self) -> bool:
        """Say whether there is more in the file than was read so far."""
        return self.follower.behind

    def draw(self) -> None:
        """Let every panel draw the state as it is."""
        raise NotImplementedError

    def leave(self) -> None:
        """Go out of the screen, where nothing runs any more."""
        raise NotImplementedError

    def action_log_y(self) -> None:
        """Switch the loss axis between linear and logarithmic."""
        self.view = replace(self.view, log_y=not self.view.log_y)
        self.draw()

    def action_counts(self) -> None:
        """Let the x axis count the next thing."""
        self._look_at(self.view.sight.next_counts())

    def action_weight(self) -> None:
        """Smooth the loss with the next weight."""
        self._look_at(self.view.sight.next_weight())

    def action_everything(self) -> None:
        """Show every value, or only the usual range."""
        self._look_at(replace(self.view.sight, everything=not self.view.sight.everything))

    def action_cross(self, by: int) -> None:
        """Move the crosshair, or bring it up; it is of use only where the curve is seen."""
        panel, buckets = self.query_one("#loss", LossPanel), buckets_of(self.state, self.view)
        if not buckets or not panel.display:
            return
        ends = self.view.sight.edges(*edges(self.state, self.view))
        self._look_at(self.view.sight.moved(by, buckets, ends, max(1, panel.content_size.width - _MARGIN)))

    def action_nearer(self, factor: float) -> None:
        """Show `factor` times as many steps; all of them for 0."""
        sight = self.view.sight
        self._look_at(sight.zoomed(factor, *edges(self.state, self.view)) if factor else sight.whole())

    def action_zoom(self) -> None:
        """Make the chosen panel fill the screen, or go back."""
        self._zoom("" if self.view.zoomed else PANELS[self._selected])

    def action_panel(self, index: int) -> None:
        """Show panel `index` alone; the same key again goes back."""
        again = self._selected == index and self.view.zoomed == PANELS[index]
        self._choose_panel(index)
        self._zoom("" if again else PANELS[index])

    def action_back(self) -> None:
        """Go one level back: the search first, then the crosshair, the closer look, the zoom, then out of a finished run."""
        sight = self.view.sight
        if self.view.needle or self.query_one("#find", Input).display:
            self._search("")
        elif sight.cross is not None:
            self._look_at(sight.without_cross())
        elif sight.span:
            self._look_at(sight.whole())
        elif self.view.zoomed:
            self._zoom("")
        else:
            self.leave()

    def action_find(self) -> None:
        """Ask for words, and go to the newest line of the log that holds them."""
        box = self.query_one("#find", Input)
        box.display = True
        box.focus()
        self.action_panel(PANELS.index("log")) if self.view.zoomed != "log" else None

    def action_match(self, by: int) -> None:
        """Go to the match `by` further back in the log, round its ends."""
        found = matching(self.state, self.view.needle)
        if found:
            self.view = replace(self.view, picked=(self.view.picked + by) % len(found))
            self._show_match()

    def action_scroll(self, lines: int) -> None:
        """Scroll the zoomed panel: up is back in time, and among samples the one before."""
        if self.view.zoomed == "samples" and abs(lines) == 1:
            most = max(0, len(self.state.samples) - 1)
            self.view = replace(self.view, picked=max(0, min(most, self.view.picked + lines)), scroll=0)
        else:
            down = self.view.zoomed in ("findings", "samples")
            most = {"findings": 5 * len(self.state.findings), "samples": 500}.get(self.view.zoomed, len(self.state.log))
            self.view = replace(self.view, scroll=max(0, min(most, self.view.scroll + (-lines if down else lines))))
        self.draw()

    @on(Input.Changed, "#find")
    def _search_changed(self, event: Input.Changed) -> None:
        self.view = replace(self.view, needle=event.value, scroll=0, picked=0)
        self._show_match()

    @on(Input.Submitted, "#find")
    def _search_entered(self) -> None:
        self.query_one("#find", Input).display = False
        self.set_focus(None)

    def _show_match(self) -> None:
        at = chosen(self.state, self.view)
        if at is not None:
            height = self.query_one("#log", LogPanel).content_size.height
            self.view = replace(self.view, scroll=max(0, len(self.state.log) - at - max(1, height // 2)))
        self.draw()

    def _search(self, needle: str) -> None:
        box = self.query_one("#find", Input)
        box.value, box.display = needle, False
        self.set_focus(None)
        self.view = replace(self.view, needle=needle, scroll=0, picked=0)
        self.draw()

    def _look_at(self, sight: Sight) -> None:
        self.view = replace(self.view, sight=sight, close=self._close_look(sight))
        self.draw()

    def _close_look(self, sight: Sight) -> tuple[Bucket, ...] | None:
        """Return the steps in sight as fine as the file has them."""
        if not sight.span:
            return None
        return self.follower.close_look(*sight.edges(*edges(self.state, self.view)))

    def _choose_panel(self, index: int) -> None:
        self._selected = index
        for at, name in enumerate(PANELS):
            self.query_one(f"#{name}", Panel).set_class(at == index, "-chosen")

    def _zoom(self, name: str) -> None:
        self.view = replace(self.view, zoomed=name, scroll=0, picked=0)
        self.set_class(bool(name), "-zoomed")
        for panel in PANELS:
            self.query_one(f"#{panel}", Panel).set_class(panel == name, "-only")
        self.query_one("#meters").set_class(name in ("memory", "device"), "-only")
        self.call_after_refresh(self.draw)
