"""What the wizard knows of the data: what was read, and tokens counted by the model's own tokenizer once that is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui.datalook import DataLook

if TYPE_CHECKING:
    from qlora_tui.tui.screens.wizard import WizardScreen

_Key = tuple[str, ...]


class Counting:
    """The data of the wizard's run, with rows counted on a thread: once for each model and data."""

    def __init__(self, wizard: WizardScreen) -> None:
        """Begin without data."""
        self._wizard = wizard
        self._look: DataLook | None = None
        self._counted: dict[_Key, DataLook | None] = {}

    def use(self, look: DataLook) -> None:
        """Take what was read; what was counted of other data is forgotten."""
        self._look, self._counted = look, {}

    def of(self, run: RunConfig) -> DataLook | None:
        """Return what the data of `run` hold; None until they have been read."""
        look = self._look
        if look is None or look.names != run.data:
            return None
        return self._counted.get(_counted_by(run)) or look

    def begin(self) -> None:
        """Count tokens on a thread where that is still to do; `None` stands for what is at work or cannot be."""
        wizard, look, run = self._wizard, self._look, self._wizard.run
        key = _counted_by(run)
        if look is None or look.problem or look.names != run.data or key in self._counted or wizard.outlook is None:
            return
        self._counted = {known: found for known, found in self._counted.items() if found} | {key: None}
        wizard.run_worker(lambda: self._work(key, run, look), thread=True, group="measure", exclusive=True, exit_on_error=False)

    def stop(self) -> None:
        """Give up counting: other data are named."""
        self._wizard.workers.cancel_group(self._wizard, "measure")

    def _work(self, key: _Key, run: RunConfig, look: DataLook) -> None:
        try:
            found = self._wizard.desk.measure(run, look)
        except Exception:  # noqa: BLE001  the guess stays; what is wrong with the tokenizer is told at the start
            found = None
        self._wizard.app.call_from_thread(self._have, key, found)

    def _have(self, key: _Key, found: DataLook | None) -> None:
        if found is not None and key in self._counted:
            self._counted[key] = found
            self._wizard.refresh_all()


def _counted_by(run: RunConfig) -> _Key:
    """Return what decides the count: two runs in which it is the same have the same."""
    return (run.model_name_or_path, run.revision, run.chat_template, str(run.mask_history), *run.data)
