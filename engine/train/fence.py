"""What keeps training from being corrupted silently: one owner thread, checked phases, checked steps.

A second thread that switches an adapter off between forward and backward changes no loss and raises no
error: the gradients are simply missing. So every door to the model asks who comes and when, and what must hold before
a step is checked before every step; tests/bench/results holds what that costs.

Doors are hooks where torch has them, and otherwise methods replaced on these very objects: no class and no other model is
touched. Whoever is refused gets the error; the run goes on, unharmed, and tells of it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from qlora_tui.engine.errors import FenceError
from qlora_tui.engine.events import Finding
from qlora_tui.engine.fast.flat import Flat
from qlora_tui.engine.fast.lora import adapter_parts
from qlora_tui.engine.load import Loaded, trainable
from qlora_tui.engine.meter import RandomState, set_torch_generators, torch_generators
from qlora_tui.engine.train.lent import Lent, switches
from qlora_tui.engine.train.optim import Kind

_SETUP, _IDLE, _STEP, _EXCURSION = "the preparations", "the time between steps", "an optimizer step", "an evaluation"
_ADVICE = ("nothing was changed; please report it, with log.txt",)
_MOST_TOLD = 20
_training, _switched_off, _merged, _asks = map(attrgetter, ("training", "disable_adapters", "merged_adapters", "requires_grad"))

BETWEEN = (_SETUP, _IDLE)
"""When the model may be put away or lent: never inside a step or an evaluation."""
_BORROWED, _SAVED, _BEFORE = (_SETUP, _EXCURSION), (_SETUP, _IDLE), (_SETUP,)
_Doors = dict[str, tuple[str, ...]]
_EVERY_MODULE: _Doors = {"train": _BORROWED}  # eval() goes through it
_BASE: _Doors = {"generate": _BORROWED, "save_pretrained": _SAVED}
_MODEL: _Doors = _BASE | {"disable_adapter": _BORROWED}
_MODEL |= dict.fromkeys(("set_adapter", "add_adapter", "load_adapter", "delete_adapter"), _BEFORE)
_TUNER: _Doors = dict.fromkeys(("disable_adapter_layers", "enable_adapter_layers"), _BORROWED)
_TUNER |= dict.fromkeys(("merge_adapter", "unmerge_adapter", "merge_and_unload", "unload", "set_adapter", "delete_adapter"), _BEFORE)
_LAYER: _Doors = dict.fromkeys(("enable_adapters", "set_adapter"), _BORROWED) | dict.fromkeys(("merge", "unmerge"), _BEFORE)


class Fence:
    """Remembers who owns the model and what it looked like; refuses anybody and anything else.

    Until the first step everything is allowed to the owner; from then on each door is open in its phases only.
    """

    def __init__(self, loaded: Loaded) -> None:
        """Make the calling thread the owner of the model; a model has one fence."""
        model = loaded.model
        self._owner = threading.get_ident()
        self._owner_name = threading.current_thread().name
        self._phase = self._rest = _SETUP
        self._trained = trainable(model)
        self._updated = dict(self._trained)  # and what the optimizer has in their place
        self._frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        self._modules = list(model.modules())
        self._layers = [module for module in self._modules if isinstance(module, LoraLayer)]
        self._adapters = [(layer.lora_A, len(layer.lora_A)) for layer in self._layers]
        self._dropouts = [module for module in self._modules if isinstance(module, torch.nn.Dropout)]
        self._device = loaded.device
        self._lent = Lent(loaded)
        self._switches = switches()
        self._optimizer: torch.optim.Optimizer | None = None
        self._flat: Flat[Kind] | None = None
        self._judged = self._looked = False  # this step's gradient, and what its update rests on
        self._drawn: list[torch.Tensor] = []  # where torch's generators stood after the last step
        self._draws: bool | None = None  # whether a step draws random numbers at all; the first one shows it
        self._refused: list[str] = []
        self._refusals = 0
        self._close(loaded)

    def attach(self, optimizer: torch.optim.Optimizer, flat: Flat[Kind]) -> None:
        """Guard the optimizer's step too, hold its learning rates to the schedule, and what is trained to where the optimizer works."""
        self._optimizer, self._flat = optimizer, flat
        self._updated |= {f"group {number} of the optimizer": group.parameter for number, group in enumerate(flat.groups, 1)}
        optimizer.register_step_pre_hook(lambda *_: self._before_update())

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Return the trained parameters in their fixed order."""
        return list(self._trained.values())

    def check(self, what: str, phases: tuple[str, ...]) -> None:
        """Let the owner do `what` in one of `phases`.

        Raises:
            FenceError: another thread, or another phase; thread, owner and phase are named.
        """
        if threading.get_ident() != self._owner:
            name = threading.current_thread().name
            raise self._refuse(f"thread {name!r} called {what} on the model that {self._owner_name!r} owns, during {self._phase}")
        if self._phase not in phases:
            raise self._refuse(f"{what} was called during {self._phase}; it belongs to {' or '.join(phases[1:] or phases)}")

    def tell(self, step: int) -> list[Finding]:
        """Return what was refused or put right since the last call; whoever was refused may have swallowed its error."""
        told, self._refused = self._refused, []
        return [Finding("fence", "warn", step, sentence, _ADVICE, {"refusals": self._refusals}) for sentence in told]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enclose one optimizer step: forward, backward and update.

        Raises:
            FenceError: the caller is not the owner, or gradients of something else lie there.
        """
        self.check("a step", (_SETUP, _IDLE))
        if self._drawn:
            self._undo_draws(self._drawn, "between two steps, outside an evaluation")
        before = self._drawn or torch_generators()
        if any(parameter.grad is not None for parameter in self._updated.values()):
            raise FenceError("before a step: gradients were left that do not belong to it")
        self._phase, self._rest, self._judged, self._looked = _STEP, _IDLE, False, False
        try:
            yield
        finally:
            self._phase = _IDLE
            self._drawn = self._without_draws(before)

    def after_backward(self) -> None:
        """Check what the gradient of this step rests on, once all of it was handed over to the device and before anybody waits.

        That takes a millisecond or two of the host's time, which the device needs anyway.

        Raises:
            FenceError: the first thing that does not hold, by name.
        """
        self.check("the check of a gradient", (_STEP,))
        self._hold(next(self._gradient_faults(), ""))
        self._judged = True

    def before_step(self, supervised: int, loss: float, norm: float, rate: float) -> None:
        """Check what an update rests on, just before it.

        Args:
            supervised: tokens that the step learns from.
            loss: of this step, in nats a token.
            norm: the length of its gradient.
            rate: the learning rate that the schedule gives.

        Raises:
            FenceError: the first thing that does not hold, by name.
        """
        self.check("the check before a step", (_STEP,))
        if not self._judged:
            raise FenceError("an optimizer step was prepared without the check of its gradient")
        self._hold(next(self._faults(supervised, loss, norm, rate), ""))
        self._looked = True

    @contextmanager
    def excursion(self, *, adapter_off: bool = False) -> Iterator[None]:
        """Lend the model to an evaluation and put everything back: random numbers, modes, what is trained, adapter, cache.

        Random numbers are put back so that a run that evaluates more often trains on exactly the same numbers.

        Raises:
            FenceError: the caller is not the owner, a step is under way, or something was left changed that cannot be put back.
        """
        self.check("an evaluation", (_SETUP, _IDLE))
        before, random_state = self._lent.now(), RandomState.now()
        self._phase = _EXCURSION
        self._lent.model.eval()
        try:
            with self._lent.model.disable_adapter() if adapter_off else nullcontext():
                yield
        finally:
            self._lent.restore(before)
            random_state.restore()
            self._phase = self._rest
        if left := self._lent.difference(before, self._lent.now()):
            raise FenceError(f"an evaluation left {left} changed", hint="the last checkpoint is good; please report this")
        if not all(map(torch.equal, random_state.torch, torch_generators())):
            raise FenceError("random numbers could not be put back after an evaluation")

    def _close(self, loaded: Loaded) -> None:
        """Put a guard at every door."""
        model = loaded.model
        tuner, base = model.base_model, model.get_base_model()
        loaded.decoder.register_forward_pre_hook(lambda *_: self.check("a forward pass", (_SETUP, _STEP, _EXCURSION)))
        loaded.decoder.register_forward_hook(lambda *_: self._after_forward())
        for module in (model, tuner, base, *(part for _, part in adapter_parts(model))):
            module.register_state_dict_pre_hook(lambda *_: self.check("state_dict", (_SETUP, _IDLE)))
        model.register_load_state_dict_pre_hook(lambda *_: self._before_load())
        self._guard(self._modules, _EVERY_MODULE)
        self._guard([model], _MODEL)
        self._guard([tuner], _TUNER)
        self._guard([base], _BASE)
        self._guard(self._layers, _LAYER)

    def _guard(self, modules: Sequence[torch.nn.Module], doors: _Doors) -> None:
        for module in modules:
            for name, phases in doors.items():
                inner: Callable[..., Any] = getattr(module, name)  # from the tables above; a name that PEFT gives up fails here, at once
                vars(module)[name] = self._door(name, phases, inner)

    def _door(self, name: str, phases: tuple[str, ...], inner: Callable[..., Any]) -> Callable[..., Any]:
        def door(*args: Any, **kwargs: Any) -> Any:
            self.check(name, phases)
            return inner(*args, **kwargs)

        return door

    def _refuse(self, sentence: str) -> FenceError:
        self._refusals += 1
        if len(self._refused) < _MOST_TOLD and sentence not in self._refused:
            self._refused.append(sentence)
        return FenceError(sentence, hint="please report this")

    def _after_forward(self) -> None:
        """Check what a second thread could change and change back while a step is under way, in the parts that act on it."""
        if self._phase == _STEP:
            self._hold(next(self._mode_faults([*self._layers, *self._dropouts]), ""), "in a forward pass")

    def _before_load(self) -> None:
        self.check("load_state_dict", (_SETUP, _IDLE))
        self._drawn = []  # a checkpoint brings random numbers of its own

    def _before_update(self) -> None:
        self.check("optimizer.step", (_SETUP, _STEP))
        if self._phase == _STEP and not self._looked:
            raise FenceError("optimizer.step was called without the check before it")
        self._looked = False

    def _hold(self, fault: str, when: str = "before an optimizer step") -> None:
        if fault:
            raise FenceError(f"{when}: {fault}", hint="the last checkpoint is good; please report this")

    def _mode_faults(self, modules: Sequence[torch.nn.Module]) -> Iterator[str]:
        if not all(map(_training, modules)):
            yield "the model is not in training mode"
        if any(map(_switched_off, self._layers)):
            yield "an adapter layer is switched off"
        if any(map(_merged, self._layers)):
            yield "an adapter is merged into its base"

    def _gradient_faults(self) -> Iterator[str]:
        """Yield what a second thread may have changed of the model while this step's gradient was made."""
        yield from self._mode_faults(self._modules)
        if not all(map(_asks, self._trained.values())):
            yield "a trained tensor no longer asks for gradients"
        if any(map(_asks, self._frozen)):
            yield "a frozen tensor asks for gradients"
        if any(len(adapters) != number for adapters, number in self._adapters):
            yield "adapters were added or taken away"
        if switches() != self._switches:
            yield "a switch of torch that holds for the whole process was changed"

    def _set_faults(self) -> Iterator[str]:
        strays = self._flat.strays() if self._flat else [*self._updated.values()]
        missing = [name for name, parameter in self._updated.items() if parameter.grad is None] if strays else []
        if missing:
            yield f"{len(missing)} of {len(self._updated)} trained tensors have no gradient ({', '.join(missing[:2])})"
        if self._flat and strays:
            names = [name for name, parameter in self._updated.items() if any(parameter is stray for stray in strays)]
            yield f"{len(names)} trained tensors or their gradients lie where no step reaches them ({', '.join(names[:2])})"

    def _faults(self, supervised: int, loss: float, norm: float, rate: float) -> Iterator[str]:
        yield from self._set_faults()
        if supervised <= 0:
            yield "no token is supervised"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            yield f"loss {loss:g} or gradient norm {norm:g} is not finite"
        for group in self._optimizer.param_groups if self._optimizer else ():
            if group["lr"] != rate * group["scale"]:
                yield f"the learning rate is {group['lr']:g} and the schedule says {rate * group['scale']:g}"
        if self._device.type == "cuda" and torch.cuda.current_stream() != torch.cuda.default_stream():
            yield "work runs on another CUDA stream than the default one"

    def _without_draws(self, before: list[torch.Tensor]) -> list[torch.Tensor]:
        """Undo draws of somebody else in a step, and return where generators stand; where dropout draws too, they can't be told apart."""
        if self._draws is None:
            self._draws = not all(map(torch.equal, before, torch_generators()))
        if self._draws:
            return torch_generators()
        self._undo_draws(before, "in a step that draws none")
        return before

    def _undo_draws(self, before: list[torch.Tensor], when: str) -> None:
        """Put generators back that moved: a preview that draws from training's numbers would change the run."""
        if not all(map(torch.equal, before, torch_generators())):
            set_torch_generators(before)
            self._refusals += 1
            self._refused.append(f"random numbers were drawn {when}; they were put back")
