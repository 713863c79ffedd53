"""Every race that was measured, seeded back in: refused or caught each time, and the run's bits stay what they are without it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from loop_driver import Ran, drive
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from qlora_tui.engine import checkpoint, evaluate
from qlora_tui.engine.data import Tokenizer, load_tokenizer
from qlora_tui.engine.errors import FenceError
from qlora_tui.engine.events import Finding, Stepped
from qlora_tui.engine.meter import RandomState
from qlora_tui.engine.sample import greedy
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import fence as fence_room
from qlora_tui.engine.train import job as job_room
from qlora_tui.engine.train import loop, parking, pause, step
from qlora_tui.engine.train.fence import Fence
from qlora_tui.engine.train.lent import Lent

Make = Callable[..., RunConfig]
Race = Callable[[loop.Loop], object]
SETTINGS = {"max_steps": 5, "lora_dropout": 0.1, "eval_steps": 2, "save_steps": 2}
ON_STEP = 2
"""Races strike in this step, or right before or after it."""


def tensors(ran: Ran) -> dict[str, torch.Tensor]:
    """Return everything a run leaves: the adapter, and optimizer and random numbers of its last checkpoint."""
    last = ran.folder / "checkpoints/step-000005"
    found = {"adapter": ran.folder / "adapter/adapter_model.safetensors", "optimizer": last / "optimizer.safetensors"}
    found["random"] = last / "random.safetensors"
    return {f"{part}.{name}": tensor for part, path in found.items() for name, tensor in load_file(path).items()}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def quiet(run_of: Make, tmp_path: Path) -> dict[str, torch.Tensor]:
    """What the same run leaves when nobody disturbs it."""
    ran = drive(run_of(**SETTINGS), tmp_path / "quiet")
    assert ran.error is None
    return tensors(ran)


def intruder(action: Callable[[], object]) -> BaseException | None:
    """Run `action` on a thread of its own, to its end, and return what it met."""
    caught: list[BaseException] = []

    def body() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001  the test looks at it
            caught.append(error)

    thread = threading.Thread(target=body, name="intruder")
    thread.start()
    thread.join()
    return caught[0] if caught else None


class Strike:
    """Calls a race once, at a moment of step 2 of a real run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, moment: str, race: Callable[[loop.Loop], object]) -> None:
        self.race, self.struck = race, 0
        self._loop: loop.Loop | None = None
        self._patch = monkeypatch
        real = loop.Loop.train

        def train(it: loop.Loop) -> Any:
            self._loop = it
            return real(it)

        monkeypatch.setattr(loop.Loop, "train", train)
        {"before": self._before, "forward": self._forward, "backward": self._backward, "evaluation": self._evaluation}[moment]()

    def strike(self) -> None:
        if self._loop is not None and not self.struck:
            self.struck += 1
            self.race(self._loop)

    def _before(self) -> None:
        """Between two steps."""
        real = loop.Loop._safe_point

        def raced(it: loop.Loop, seconds: float) -> Any:
            if it.step == ON_STEP - 1:
                self.strike()
            return real(it, seconds)

        self._patch.setattr(loop.Loop, "_safe_point", raced)

    def _forward(self) -> None:
        """Between forward and backward."""
        real = step.token_losses

        def raced(*args: Any) -> torch.Tensor:
            found = real(*args)
            if self._loop is not None and self._loop.step == ON_STEP - 1:
                self.strike()
            return found

        self._patch.setattr(step, "token_losses", raced)

    def _backward(self) -> None:
        """Between backward and update."""
        real = loop.Loop._backward

        def raced(it: loop.Loop, rows: list[Any], supervised: int) -> tuple[torch.Tensor, float]:
            found = real(it, rows, supervised)
            if it.step == ON_STEP - 1:
                self.strike()
            return found

        self._patch.setattr(loop.Loop, "_backward", raced)

    def _evaluation(self) -> None:
        """While the hold-out is measured."""
        real = evaluate._measure_batch

        def raced(*args: Any) -> Any:
            found = real(*args)
            self.strike()
            return found

        self._patch.setattr(evaluate, "_measure_batch", raced)


def first_layer(it: loop.Loop) -> Any:
    return it.fence._layers[0]


def base_against_tuned(it: loop.Loop) -> None:
    with it.loaded.model.disable_adapter():
        it.loaded.model(input_ids=torch.ones(1, 4, dtype=torch.long))


IDS = torch.ones(1, 4, dtype=torch.long)
BY_THE_DOOR: dict[str, Race] = {
    "1 adapter off": lambda it: it.loaded.model.base_model.disable_adapter_layers(),
    "1 adapter off, past the tuner's own method": lambda it: type(it.loaded.model.base_model).disable_adapter_layers(
        it.loaded.model.base_model
    ),
    "1 base against tuned": base_against_tuned,
    "1 merged": lambda it: it.loaded.model.merge_adapter(),
    "1 one layer merged": lambda it: first_layer(it).merge(),
    "1 another adapter": lambda it: it.loaded.model.set_adapter("default"),
    "2 eval": lambda it: it.loaded.model.eval(),
    "2 eval of the decoder": lambda it: it.loaded.decoder.eval(),
    "2 eval of one layer": lambda it: first_layer(it).eval(),
    "2 train": lambda it: it.loaded.model.train(),
    "4 snapshot": lambda it: get_peft_model_state_dict(it.loaded.model),
    "4 save": lambda it: checkpoint.save(it.holdout.folder, 99, it.loaded.model, it.optimizer, {}),
    "4 save of the model": lambda it: it.loaded.model.save_pretrained(it.holdout.folder / "racy"),
    "5 forward": lambda it: it.loaded.model(input_ids=IDS),
    "5 sample": lambda it: it.loaded.model.generate(input_ids=IDS, do_sample=True, max_new_tokens=2),
    "5 sample now": lambda it: [*it.samples.show(it.step, it.samples.wanted(None)[0])],
    "5 sample of a prompt": lambda it: it.samples.wanted("say 3"),
    "pause": lambda it: [*pause._put_away(it)],
    "pause, past its save": lambda it: parking.Parked(it.loaded, it.optimizer, it.fence, it.holdout.folder),
    "update": lambda it: it.optimizer.step(),
}


@pytest.fixture(autouse=True)
def pauses_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause that comes at the wrong moment shall be able to do harm, as on a card."""
    monkeypatch.setattr(parking, "PARKED_FROM", ("cpu",))


@pytest.mark.parametrize("moment", ["before", "forward", "backward", "evaluation"])
@pytest.mark.parametrize("race", BY_THE_DOOR)
def test_a_second_thread_is_refused_and_the_run_stays_bitwise_the_same(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: dict[str, torch.Tensor], race: str, moment: str
) -> None:
    met: list[BaseException | None] = []
    strike = Strike(monkeypatch, moment, lambda it: met.append(intruder(lambda: BY_THE_DOOR[race](it))))
    ran = drive(run_of(**SETTINGS), tmp_path / "raced")
    assert strike.struck == 1
    assert isinstance(met[0], FenceError)
    assert all(words in str(met[0]) for words in ("'intruder'", "'MainThread'", "during"))
    assert ran.error is None
    assert same_bits(tensors(ran), quiet)
    (told,) = [finding for finding in ran.of(Finding) if finding.detector == "fence"]
    assert "'intruder'" in told.message


@pytest.mark.parametrize("moment", ["forward", "backward"])
@pytest.mark.parametrize("race", [race for race in BY_THE_DOOR if race != "5 forward"])
def test_the_owner_itself_is_refused_inside_a_step_and_the_step_is_not_applied(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, race: str, moment: str
) -> None:
    Strike(monkeypatch, moment, BY_THE_DOOR[race])
    ran = drive(run_of(**SETTINGS), tmp_path / "raced")
    assert isinstance(ran.error, FenceError)
    assert [one.step for one in ran.of(Stepped)] == list(range(1, ON_STEP))


def merge_by_hand(it: loop.Loop) -> None:
    layer = first_layer(it)
    layer.merged_adapters.append("default")


def off_by_hand(it: loop.Loop) -> None:
    first_layer(it)._disable_adapters = True


def eval_by_hand(it: loop.Loop) -> None:
    first_layer(it).training = False


def rate_by_hand(it: loop.Loop) -> None:
    it.optimizer.param_groups[0]["lr"] *= 2


def elsewhere(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data.clone()


def gradient_elsewhere(it: loop.Loop) -> None:
    it.fence.trained[0].grad = torch.zeros_like(it.fence.trained[0])


AROUND_THE_DOORS: dict[str, tuple[Race, str]] = {
    "1 switched off": (off_by_hand, "switched off"),
    "1 merged": (merge_by_hand, "merged"),
    "1 frozen": (lambda it: it.fence.trained[0].requires_grad_(False), "no longer asks for gradients"),
    "1 gradients dropped": (lambda it: it.optimizer.zero_grad(set_to_none=True), "have no gradient"),
    "1 gradients of one tensor dropped": (lambda it: setattr(it.fence.trained[0], "grad", None), "have no gradient"),
    "1 gradients elsewhere": (gradient_elsewhere, "1 trained tensors or their gradients lie where no step reaches them"),
    "1 values elsewhere": (lambda it: elsewhere(it.fence.trained[0]), "1 trained tensors or their gradients lie where"),
    "1 the optimizer's values elsewhere": (
        lambda it: elsewhere(it.optimizer.param_groups[0]["params"][0]),
        "lie where no step reaches them",
    ),
    "1 base thawed": (lambda it: it.fence._frozen[0].requires_grad_(True), "frozen tensor"),
    "1 adapter added": (lambda it: first_layer(it).lora_A.add_module("other", torch.nn.Identity()), "added or taken away"),
    "2 eval left on": (eval_by_hand, "not in training mode"),
    "learning rate overwritten": (rate_by_hand, "the schedule says"),
    "switch of torch": (lambda it: torch.backends.cuda.enable_flash_sdp(False), "whole process"),
}


@pytest.fixture
def switches_kept() -> Any:
    before = torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_flash_sdp(before)


@pytest.mark.usefixtures("switches_kept")
@pytest.mark.parametrize("race", AROUND_THE_DOORS)
def test_what_goes_around_the_doors_is_caught_before_the_step_is_applied(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, race: str
) -> None:
    action, words = AROUND_THE_DOORS[race]
    Strike(monkeypatch, "backward", lambda it: intruder(lambda: action(it)))
    ran = drive(run_of(**SETTINGS), tmp_path / "raced")
    assert isinstance(ran.error, FenceError)
    assert words in str(ran.error)
    assert len(ran.of(Stepped)) == ON_STEP - 1


def test_modes_changed_and_changed_back_around_one_forward_are_caught(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What 53 % of steps met with a second thread that samples: in eval mode during their forward, and back afterwards."""

    def toggle(it: loop.Loop) -> None:
        eval_by_hand(it)
        it.loaded.decoder.register_forward_hook(lambda *_: setattr(first_layer(it), "training", True))  # after the fence's own

    Strike(monkeypatch, "forward", toggle)
    ran = drive(run_of(**SETTINGS), tmp_path / "raced")
    assert isinstance(ran.error, FenceError)
    assert "in a forward pass: the model is not in training mode" in str(ran.error)


def test_gradients_of_something_else_are_not_added_to_a_step(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(it: loop.Loop) -> None:
        it.fence.trained[0].grad = torch.ones_like(it.fence.trained[0])

    Strike(monkeypatch, "before", leave)
    ran = drive(run_of(**SETTINGS), tmp_path / "raced")
    assert "gradients were left" in str(ran.error)


@pytest.mark.parametrize("check", ["after_backward", "before_step"])
def test_an_update_without_its_checks_is_refused(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    monkeypatch.setattr(Fence, check, lambda *_: None)
    ran = drive(run_of(**SETTINGS), tmp_path / "raced")
    assert "without the check" in str(ran.error)
    assert not ran.of(Stepped)


def test_what_is_changed_after_the_gradient_is_made_leaves_its_update_alone_and_is_caught_in_the_next_step(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is looked at while the device works on the gradient; what is changed then can reach no gradient before the next."""
    quiet, real = drive(run_of(**SETTINGS), tmp_path / "quiet"), step.Gradient.prepare

    def struck(self: step.Gradient, rows: Any, number: int) -> float:
        if number == ON_STEP + 1:
            next(part for part in self.loaded.model.modules() if isinstance(part, LoraLayer))._disable_adapters = True
        return real(self, rows, number)

    monkeypatch.setattr(step.Gradient, "prepare", struck)
    ran = drive(run_of(**SETTINGS), tmp_path / "raced")
    assert "switched off" in str(ran.error)
    assert [(one.loss, one.grad_norm) for one in ran.of(Stepped)] == [(one.loss, one.grad_norm) for one in quiet.of(Stepped)][:ON_STEP]


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_random_numbers_drawn_in_a_step_that_needs_none_are_put_back_and_told(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    settings = SETTINGS | {"lora_dropout": 0.0}
    whole = drive(run_of(**settings), tmp_path / "whole")
    Strike(monkeypatch, moment, lambda it: intruder(lambda: torch.rand(3)))
    ran = drive(run_of(**settings), tmp_path / "raced")
    assert ran.error is None
    assert same_bits(tensors(ran), tensors(whole))
    assert ["in a step that draws none" in told.message for told in ran.of(Finding) if told.detector == "fence"] == [True]


@pytest.mark.parametrize("who", ["owner", "intruder"])
def test_random_numbers_drawn_between_steps_are_put_back_and_told(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: dict[str, torch.Tensor], who: str
) -> None:
    Strike(monkeypatch, "before", lambda it: intruder(lambda: torch.rand(3)) if who == "intruder" else torch.rand(3))
    ran = drive(run_of(**SETTINGS), tmp_path / "raced")
    assert ran.error is None
    assert same_bits(tensors(ran), quiet)
    assert ["random numbers were drawn" in told.message for told in ran.of(Finding) if told.detector == "fence"] == [True]


def draw_everywhere(it: loop.Loop) -> None:
    torch.rand(3)
    numpy.random.rand(3)
    random.random()


BORROWING: dict[str, Race] = {
    "random numbers": draw_everywhere,
    "modes": lambda it: first_layer(it).train(),
    "adapter": lambda it: it.loaded.model.base_model.disable_adapter_layers(),
    "trained set": lambda it: it.fence.trained[0].requires_grad_(False),
    "cache": lambda it: setattr(it.loaded.model.get_base_model().config, "use_cache", True),
    "recomputation": lambda it: setattr(it.loaded.decoder.layers[0], "forward", it.loaded.decoder.layers[0].forward.inner),
}


@pytest.mark.parametrize("part", BORROWING)
def test_an_evaluation_may_change_this_and_all_of_it_is_put_back(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    settings = SETTINGS | {"gradient_checkpointing": "true"}
    whole = drive(run_of(**settings), tmp_path / "quiet")
    strike = Strike(monkeypatch, "evaluation", BORROWING[part])
    ran = drive(run_of(**settings), tmp_path / "raced")
    assert (strike.struck, ran.error) == (1, None)
    assert same_bits(tensors(ran), tensors(whole))


@pytest.mark.parametrize("part", BORROWING)
def test_an_evaluation_that_puts_nothing_back_ends_the_run_by_name(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The mutant: whatever is put back in the product is not."""
    monkeypatch.setattr(Lent, "restore", lambda *_: None)
    monkeypatch.setattr(RandomState, "restore", lambda *_: None)
    Strike(monkeypatch, "evaluation", BORROWING[part])
    ran = drive(run_of(gradient_checkpointing="true", **SETTINGS), tmp_path / "raced")
    assert isinstance(ran.error, FenceError)
    assert "left training modes" in str(ran.error)
    assert not ran.of(Stepped)


UNDOABLE: dict[str, tuple[Race, str]] = {
    "merged": (merge_by_hand, "merged adapters"),
    "gradients": (lambda it: setattr(it.fence.trained[0], "grad", torch.ones_like(it.fence.trained[0])), "gradients"),
    "switches": (lambda it: torch.backends.cuda.enable_flash_sdp(False), "switches"),
}


@pytest.mark.usefixtures("switches_kept")
@pytest.mark.parametrize("part", UNDOABLE)
def test_what_an_evaluation_cannot_put_back_ends_the_run_by_name(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    action, words = UNDOABLE[part]
    Strike(monkeypatch, "evaluation", action)
    ran = drive(run_of(**SETTINGS), tmp_path / "raced")
    assert isinstance(ran.error, FenceError)
    assert f"an evaluation left {words} changed" in str(ran.error)


def test_random_numbers_that_stay_drawn_after_an_evaluation_end_the_run(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RandomState, "restore", lambda *_: None)
    Strike(monkeypatch, "evaluation", draw_everywhere)
    assert "random numbers could not be put back" in str(drive(run_of(**SETTINGS), tmp_path / "raced").error)


# 3: the tokenizer


def shared(monkeypatch: pytest.MonkeyPatch) -> list[Tokenizer]:
    """The mutant: screens and training read rows with one and the same tokenizer."""
    made: list[Tokenizer] = []

    def load(folder: Path, template: str) -> Tokenizer:
        made.append(load_tokenizer(folder, template))
        return made[0]

    monkeypatch.setattr(job_room, "load_tokenizer", load)
    return made


def test_a_shared_tokenizer_refuses_the_second_thread(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: dict[str, torch.Tensor]
) -> None:
    made = shared(monkeypatch)
    met: list[BaseException | None] = []
    monkeypatch.setenv("QLORA_TUI_HOME", str(tmp_path / "another home"))  # where no tokens of an earlier run are kept
    real = Tokenizer.encode_many

    def raced(self: Tokenizer, texts: Sequence[str]) -> Any:
        if not met:
            met.append(intruder(lambda: made[0].encode("what a screen shows")))
        return real(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_many", raced)
    ran = drive(run_of(**SETTINGS), tmp_path / "raced")
    assert "'intruder' used the tokenizer that 'MainThread' owns" in str(met[0])
    assert same_bits(tensors(ran), quiet)


@pytest.mark.parametrize("setting", ["enable_truncation", "enable_padding"])
@pytest.mark.parametrize("way", ["encode", "encode_many"])
def test_a_tokenizer_that_was_made_to_cut_or_pad_ends_the_run_before_anything_is_trained(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, way: str
) -> None:
    made = shared(monkeypatch)
    monkeypatch.setenv("QLORA_TUI_HOME", str(tmp_path / "another home"))
    real, changed = {"encode": Tokenizer.encode, "encode_many": Tokenizer.encode_many}, []

    def raced(self: Tokenizer, texts: Any) -> Any:
        if not changed:
            change = getattr(made[0]._backend, setting)  # one of the two names above
            intruder(lambda: change(4) if setting == "enable_truncation" else change(length=64))
            changed.append(setting)
        return real[way](self, texts)

    if way == "encode":  # rows go one by one where many at once are refused
        monkeypatch.setattr(Tokenizer, "encode_many", refused)
    monkeypatch.setattr(Tokenizer, way, raced)
    ran = drive(run_of(**SETTINGS), tmp_path / "raced")
    assert isinstance(ran.error, FenceError)
    assert "cut or pad" in str(ran.error)
    assert changed
    assert not ran.of(Stepped)


def refused(*_: Any) -> Any:
    raise ValueError("one of these texts")


# 6: streams; there is no CUDA here, so the two questions to it are answered by hand


@pytest.mark.parametrize(("current", "caught"), [("default", False), ("side", True)])
def test_work_on_a_side_stream_is_caught(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, current: str, caught: bool) -> None:
    def pretend(it: loop.Loop) -> None:
        it.fence._device = torch.device("cuda", 0)
        monkeypatch.setattr(fence_room.torch.cuda, "current_stream", lambda: current)
        monkeypatch.setattr(fence_room.torch.cuda, "default_stream", lambda: "default")

    Strike(monkeypatch, "backward", pretend)
    ran = drive(run_of(**SETTINGS), tmp_path / "raced")
    assert ("another CUDA stream" in str(ran.error)) is caught


# The same races without a fence: they must do harm, or the tests above show nothing


def without_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fence, "_close", lambda *_: None)
    monkeypatch.setattr(Fence, "_before_update", lambda *_: None)
    monkeypatch.setattr(Fence, "_faults", lambda *_: iter(()))
    monkeypatch.setattr(Fence, "_gradient_faults", lambda *_: iter(()))
    monkeypatch.setattr(Fence, "_undo_draws", lambda *_: None)


def merged_and_back(it: loop.Loop) -> None:
    it.loaded.model.merge_adapter()


HARMFUL: dict[str, tuple[str, Race]] = {
    "1 adapter of a layer off between forward and backward": ("forward", lambda it: first_layer(it).enable_adapters(False)),
    "1 merged between forward and backward": ("forward", merged_and_back),
    "2 eval before a step": ("before", lambda it: it.loaded.model.eval()),
    "5 a sample between steps": ("before", lambda it: it.loaded.model.generate(input_ids=IDS, do_sample=True, max_new_tokens=2)),
    "5 our own sample between steps, without its excursion": ("before", lambda it: greedy(it.loaded, [1, 2, 3], 2, (), lambda: None)),
    "5 random numbers": ("before", lambda it: torch.rand(3)),
    "update": ("backward", lambda it: it.optimizer.step()),
}


@pytest.mark.parametrize("race", HARMFUL)
def test_without_the_fence_the_race_corrupts_the_run_and_nobody_hears_of_it(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: dict[str, torch.Tensor], race: str
) -> None:
    moment, action = HARMFUL[race]
    without_fence(monkeypatch)
    met: list[BaseException | None] = []
    Strike(monkeypatch, moment, lambda it: met.append(intruder(lambda: action(it))))
    ran = drive(run_of(**SETTINGS | {"eval_steps": 100}), tmp_path / "raced")
    assert (met, ran.error) == ([None], None)
    assert not same_bits(tensors(ran), quiet)


@pytest.mark.slow
@pytest.mark.parametrize("fenced", [True, False])
def test_a_thread_that_compares_base_and_tuned_all_the_time(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fenced: bool
) -> None:
    """150 steps beside a real second thread: with the fence not one step is touched, without it hardly one is whole."""
    settings = {"max_steps": 150, "lora_dropout": 0.1, "eval_steps": 50, "save_steps": 50}
    whole = drive(run_of(**settings), tmp_path / "quiet")
    if not fenced:
        without_fence(monkeypatch)
    over, refused, tried = threading.Event(), [], []

    def compare(it: loop.Loop) -> None:
        while not over.is_set():
            tried.append(1)
            try:
                base_against_tuned(it)
            except FenceError:
                refused.append(1)
            except Exception:  # noqa: BLE001  without a fence the thread meets half-changed models
                continue
            over.wait(0.001)

    def begin(it: loop.Loop) -> None:
        threading.Thread(target=compare, args=(it,), name="viewer", daemon=True).start()

    Strike(monkeypatch, "before", begin)
    ran = drive(run_of(**settings), tmp_path / "raced")
    over.set()
    one, two = (
        (load_file(run.folder / "adapter/adapter_model.safetensors") for run in (whole, ran))
        if ran.error is None
        else ({}, {"": torch.ones(1)})
    )
    assert tried
    assert (len(refused) == len(tried) and same_bits(one, two)) is fenced
