"""The form of a wizard page."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.containers import Vertical
from textual.content import Content

from qlora_tui.tui.panels import cells

if TYPE_CHECKING:
    from qlora_tui.tui.screens.wizard import WizardScreen


class Page(Vertical):
    """One step of the wizard. `enter` brings it up, `commit` says whether one may go on."""

    title: ClassVar[str] = ""
    place: ClassVar[str] = "field"
    """The place in the table of actions whose keys this page adds."""
    types: ClassVar[bool] = False
    """Whether one types on this page, so that letters are no keys."""

    def __init__(self, wizard: WizardScreen) -> None:
        """Belong to `wizard`, which holds the run that all pages change."""
        super().__init__(id=f"page-{self.title}", classes="page")
        self.wizard = wizard

    def enter(self) -> None:
        """Show the run as it is now and take the focus."""

    def commit(self) -> bool:
        """Say whether the wizard may go on; a page that cannot go on shows why, or asks its next question."""
        return True

    @property
    def inside(self) -> bool:
        """Whether there is a step back within the page."""
        return False

    def back(self) -> bool:
        """Go a step back within the page; False where there is none."""
        return False

    @property
    def half_typed(self) -> bool:
        """Whether something stands on the page that is no value."""
        return False

    def drop_typing(self) -> None:
        """Show the values again in place of what is none."""

    def refresh_run(self, *, anew: bool = False) -> None:
        """Show the wizard's run again, which was changed elsewhere; `anew`: over what is being typed too."""

    def text(self, content: Content) -> Content:
        """Return `content` as this terminal can show it."""
        return cells.plain_ascii(content) if self.wizard.ascii_only else content
