"""What a run costs here and rented, and after how many such runs a card is paid for: arithmetic on prices and hours.

Here it costs electricity (watts x hours x price) and the card's share (its price spread over the hours it will work). Rented it
costs the hours that the same run takes on that card, and some of setup, times the rate. A card is paid for once what renting would
have cost beyond the electricity here adds up to its price. Inputs that are ranges make ranges: the cheap ends go with each other.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from qlora_tui.engine import machine as machines
from qlora_tui.engine import planner, prices
from qlora_tui.engine.errors import EngineError
from qlora_tui.engine.forecast import Before, Work, before_work
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.prices import Prices, Range
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.units import count, words

_LEAST = 0.01
CHANGE = "qlora-tui money changes prices"


@dataclass(frozen=True, slots=True)
class Power:
    """Watts of the device and of the rest of its machine, and how the device's are known."""

    device: Range
    rest: Range
    how: str

    @property
    def all(self) -> Range:
        """Return both together."""
        return self.device[0] + self.rest[0], self.device[1] + self.rest[1]


@dataclass(frozen=True, slots=True)
class Rented:
    """The same run on a rented card: hours of the run and paid ones of setup, the rate of one, and what they come to."""

    card: str
    hours: Range
    setup_hours: Range
    rate: Range
    cost: Range


@dataclass(frozen=True, slots=True)
class Bill:
    """What a run costs. `share` is the card's part, None where its price is not known; `break_even` is None where nothing can be said.

    A `break_even` of infinity: renting costs no more than the electricity here.
    """

    prices: Prices
    hours: Range
    power: Power | None
    electricity: Range | None
    card_price: Range | None
    card_price_how: str
    share: Range | None
    rented: Rented | None
    break_even: Range | None

    @property
    def here(self) -> Range | None:
        """Return electricity and the card's share; None where the watts are not known."""
        return None if self.electricity is None else _plus(self.electricity, self.share or (0.0, 0.0))

    def to_json(self) -> dict[str, Any]:
        """Return the promised keys of `budget --json`'s `cost`; ranges are low and high."""
        return {
            "currency": self.prices.currency,
            "here": self.here,
            "electricity": self.electricity,
            "card_share": self.share,
            "watts": self.power.all if self.power else None,
            "watts_how": self.power.how if self.power else "",
            "rented": self.rented.cost if self.rented else None,
            "rented_card": self.rented.card if self.rented else self.prices.rent_card,
            "rented_hours": self.rented.hours if self.rented else None,
            "break_even_runs": [end if math.isfinite(end) else None for end in self.break_even] if self.break_even else None,
        }


def bill(known: Prices, device: Machine, hours: Range, *, watts: float | None = None, rented_hours: Range | None = None) -> Bill:
    """Return what `hours` on `device` cost.

    Args:
        known: the prices.
        device: the one that trains.
        hours: low and high.
        watts: of the device, as measured in the run; None: not measured.
        rented_hours: that the same run takes on the card that would be rented; None: not known, or it does not fit there.
    """
    power = _power(known, device, watts)
    electricity = _times(_times(power.all, hours), known.electricity, 1e-3) if power else None
    price, how = _card_price(known, device)
    share = (hours[0] * price[0] / known.card_hours[1], hours[1] * price[1] / known.card_hours[0]) if price else None
    rented = None
    if rented_hours is not None:
        cost = _times(_plus(rented_hours, known.setup_hours), known.rent)
        rented = Rented(known.rent_card, rented_hours, known.setup_hours, known.rent, cost)
    return Bill(known, hours, power, electricity, price, how, share, rented, _break_even(price, rented, electricity))


def before_run(model: ModelSpec, asked: RunConfig, device: Machine, time: Before | None, work: Work | None) -> Bill | None:
    """Return the bill of a run that has not started; None where its time is not known.

    Args:
        model: the base's shape.
        asked: the settings as they were asked, since another card leaves the planner other choices.
        device: the one that would train.
        time: what was estimated for it.
        work: the rows, to estimate the same on the card that would be rented.
    """
    if time is None or work is None:
        return None
    known, _ = prices.usable()
    hours = (time.total_seconds[0] / 3600, time.total_seconds[2] / 3600)
    return bill(known, device, hours, rented_hours=rented_hours(model, asked, known, work))


def rented_hours(model: ModelSpec, asked: RunConfig, known: Prices, work: Work) -> Range | None:
    """Return the hours of a run on the card that would be rented, as its data sheet lets expect; None where it does not fit there."""
    card = machines.find_card(known.rent_card)
    free = dataclasses.replace(asked, memory_limit_gib=0.0, max_time=0.0, until="")
    try:
        mean = sum(work.lengths) / len(work.lengths) if work.lengths else None
        plan = planner.choose(model, free, card, longest=max(work.lengths, default=None), mean=mean, lengths=work.lengths)
    except EngineError:
        return None
    time = before_work(model, plan.run, card, work) if plan.budget.fits else None
    return (time.total_seconds[0] / 3600, time.total_seconds[2] / 3600) if time else None


def lines(found: Bill) -> list[str]:
    """Return a bill in sentences: here, rented, the break-even, and what all of it assumes."""
    said = [_here(found)]
    if found.rented is not None:
        said.append(rented_words(found.rented, found.prices.currency))
    else:
        said.append(f"Rented: not reckoned, since it is not known how long it takes on {found.prices.rent_card}, or it does not fit there.")
    if found.break_even is not None:
        said.append(_break_even_words(found))
    return [*said, _assumed(found)]


def rented_words(rented: Rented, currency: str) -> str:
    """Return in a sentence what renting costs."""
    rate, cost = amount(rented.rate, currency), amount(rented.cost, currency)
    setup = f" and {_hours(rented.setup_hours)} of setup" if rented.setup_hours[1] else ""
    return f"Rented: {cost}, for {_hours(rented.hours)} on {rented.card} (by its data sheet){setup} at {rate} an hour."


def amount(value: Range, currency: str) -> str:
    """Return an amount or a range of money.

    >>> amount((0.341, 0.619), "$"), amount((1600.0, 1600.0), "$"), amount((3.0, 5.0), "€"), amount((0.0001, 0.004), "$")
    ('$0.34 - 0.62', '$1,600', '€3 - 5', 'under $0.01')
    """
    if 0 < value[1] < _LEAST:
        return f"under {currency}{_LEAST}"
    low, high = (_plain(end) for end in value)
    return f"{currency}{low}" if low == high else f"{currency}{low} - {high}"


def short(found: Bill) -> str:
    """Return a bill in one line for a screen, what counts first: here and rented, then the break-even, and what the first assumes."""
    sign, parts, assumed = found.prices.currency, [], ""
    if found.power is not None and found.here is not None:
        rest = f" and {amount(found.power.rest, '')} W of the rest" if found.power.rest[1] else ""
        share = ", the card's share" if found.share is not None else ""
        parts.append(f"{amount(found.here, sign)} here")
        assumed = f"here: {amount(found.power.device, '')} W{rest}, {amount(found.prices.electricity, sign)} a kWh{share}"
    if found.rented is not None:
        parts.append(f"{amount(found.rented.cost, sign)} rented ({found.rented.card})")
    said = [" / ".join(parts)]
    if found.break_even is not None and math.isfinite(found.break_even[0]):
        said.append(f"the card is paid for after {_runs(found.break_even)}")
    return "; ".join(part for part in (*said, assumed) if part)


def _here(found: Bill) -> str:
    sign = found.prices.currency
    if found.power is None or found.electricity is None or found.here is None:
        return f"Here: {_hours(found.hours)} of this card; nothing says how many watts it takes: qlora-tui money watts=300 does."
    energy = _times(found.power.all, found.hours, 1e-3)
    parts = f"{amount(energy, '')} kWh at {amount(found.prices.electricity, sign)} make {amount(found.electricity, sign)}"
    if found.share is not None:
        parts += f", and the card's share is {amount(found.share, sign)}"
    elif found.card_price_how:
        parts += f"; {found.card_price_how}"
    return f"Here: {amount(found.here, sign)} for {_hours(found.hours)}: {parts}."


def _break_even_words(found: Bill) -> str:
    low, high = found.break_even or (0.0, 0.0)
    card = f"the card ({amount(found.card_price or (0.0, 0.0), found.prices.currency)})"
    if not math.isfinite(low):
        return f"Break-even: never; renting costs no more than the electricity here, so {card} is not paid for by such runs."
    return f"Break-even: {card} is paid for after {_runs((low, high))}."


def _runs(value: Range) -> str:
    low, high = value
    if not math.isfinite(high):
        return f"{count(math.ceil(low))} such runs or more, and perhaps never"
    most = f" - {count(math.ceil(high))}" if math.ceil(high) != math.ceil(low) else ""
    return f"{count(math.ceil(low))}{most} such runs"


def _assumed(found: Bill) -> str:
    parts = []
    if found.power is not None:
        rest = f" and {amount(found.power.rest, '')} W of the rest of the machine" if found.power.rest[1] else ""
        parts.append(f"{amount(found.power.device, '')} W ({found.power.how}){rest}")
    if found.share is not None:
        hours = amount(found.prices.card_hours, "")
        parts.append(
            f"a card of {amount(found.card_price or (0.0, 0.0), found.prices.currency)} ({found.card_price_how}) that works {hours} h"
        )
    own = f"; {', '.join(found.prices.own)} as you said" if found.prices.own else ""
    return f"Assumed: {', '.join(parts) or 'nothing'}{own}. {CHANGE}."


def _power(known: Prices, device: Machine, watts: float | None) -> Power | None:
    if known.watts[1]:
        return Power(known.watts, known.rest_watts, "as you said")
    if device.kind == "cpu":
        return Power(known.cpu_watts, known.rest_watts, "assumed for a processor")
    if watts:
        return Power((watts, watts), known.rest_watts, "measured in this run")
    card = machines.card_of(device)
    if card is None:
        return None
    how = "an estimate of what it may take" if card.power_source.startswith("estimate") else "what it is said to take at most"
    return Power((card.power_watts, card.power_watts), known.rest_watts, how)


def _card_price(known: Prices, device: Machine) -> tuple[Range | None, str]:
    if device.kind == "cpu":
        return None, ""
    if known.card_price[1]:
        return known.card_price, "as you said"
    card = machines.card_of(device)
    launch = prices.launch_price(card.name) if card else None
    if launch is None:
        return None, "the card's price is not known (qlora-tui money card_price=1600)"
    return (launch[0], launch[0]), f"its launch price: {launch[1]}"


def _break_even(price: Range | None, rented: Rented | None, electricity: Range | None) -> Range | None:
    if price is None or rented is None or electricity is None:
        return None
    most, least = rented.cost[1] - electricity[0], rented.cost[0] - electricity[1]
    return price[0] / most if most > 0 else math.inf, price[1] / least if least > 0 else math.inf


def _plus(one: Range, other: Range) -> Range:
    return one[0] + other[0], one[1] + other[1]


def _times(one: Range, other: Range, scale: float = 1.0) -> Range:
    return one[0] * other[0] * scale, one[1] * other[1] * scale


def _plain(value: float) -> str:
    if value >= 100 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.2f}"


def _hours(value: Range) -> str:
    low, high = (words(end * 3600) for end in value)
    return low if low == high else f"{low} to {high}"
