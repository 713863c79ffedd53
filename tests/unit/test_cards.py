"""The table of cards: every figure has a source, agrees with its neighbours, and every name finds one card or none."""

from __future__ import annotations

import itertools
import json
from importlib import resources

import pytest

from qlora_tui.engine import cards
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.machine import Machine, card_of, find_card

GIB = 1 << 30
ROWS = {card.name: card for card in cards.cards()}
BOOST = {  # CUDA cores and nominal boost MHz: an independent way to a GeForce card's peak
    "RTX 3060 12GB": (3584, 1777),
    "RTX 3060 Ti 8GB": (4864, 1665),
    "RTX 3070 8GB": (5888, 1725),
    "RTX 3080 10GB": (8704, 1710),
    "RTX 3090": (10496, 1695),
    "RTX 4060 8GB": (3072, 2460),
    "RTX 4060 Ti 16GB": (4352, 2535),
    "RTX 4070": (5888, 2475),
    "RTX 4070 Ti SUPER": (8448, 2610),
    "RTX 4080": (9728, 2505),
    "RTX 4080 SUPER": (10240, 2550),
    "RTX 4090": (16384, 2520),
    "RTX 5060 Ti 16GB": (4608, 2572),
    "RTX 5070 Ti": (8960, 2452),
    "RTX 5080": (10752, 2617),
    "RTX 5090": (21760, 2407),
}


def test_cards_from_8_to_192_gb_are_there():
    wanted = set(BOOST) | {"RTX A6000", "T4", "A10G", "L4", "L40S", "A100 40GB", "A100 80GB", "H100 80GB", "H200", "MI300X"}
    assert wanted <= set(ROWS)
    assert len(ROWS) == len(cards.cards())


@pytest.mark.parametrize("card", cards.cards(), ids=lambda card: card.name)
def test_every_card_names_its_source_and_is_of_a_believable_size(card):
    assert len(card.source) > 20
    assert card.power_source, "where its watts were read, or that they are an estimate"
    assert card.source.isprintable()
    assert 7 * GIB < card.memory_bytes < 200 * GIB
    assert 200e9 < card.bandwidth_bytes < 6000e9
    assert 5e12 < card.flops < 1400e12
    assert 20 < card.flops / card.bandwidth_bytes < 450  # operations for each byte moved
    assert card.bf16 == (card.capability is None or card.capability >= (8, 0))


def test_only_what_was_measured_here_is_called_tested():
    assert [card.name for card in cards.cards() if card.tested] == ["H100 80GB"]
    assert ROWS["MI300X"].note.startswith("untested")
    assert (find_card("MI300X").kind, find_card("MI300X").compute_capability) == ("cuda", None)
    assert "untested" in find_card("AMD Instinct MI300X").note


@pytest.mark.parametrize("name", BOOST)
def test_a_geforce_card_runs_at_four_operations_a_core_and_clock(name):
    cores, megahertz = BOOST[name]  # half of what 16-bit accumulation reaches, twice plain 32-bit arithmetic
    assert ROWS[name].flops == pytest.approx(4 * cores * megahertz * 1e6, rel=0.005)


@pytest.mark.parametrize(
    "rising",
    [
        ["RTX 3060 12GB", "RTX 3060 Ti 8GB", "RTX 3070 8GB", "RTX 3080 10GB", "RTX 3090"],
        ["RTX 4060 8GB", "RTX 4060 Ti 16GB", "RTX 4070", "RTX 4070 Ti SUPER", "RTX 4080", "RTX 4080 SUPER", "RTX 4090"],
        ["RTX 5060 Ti 16GB", "RTX 5070 Ti", "RTX 5080", "RTX 5090"],
        ["A10G", "RTX A6000", "A100 40GB", "A100 80GB", "H100 80GB", "H200", "MI300X"],
        ["RTX 3090", "RTX 4090", "RTX 5090"],
    ],
)
def test_a_better_card_is_never_slower_in_any_figure(rising):
    row = [ROWS[name] for name in rising]
    for lower, higher in itertools.pairwise(row):
        assert lower.flops <= higher.flops, higher.name
        assert lower.bandwidth_bytes <= higher.bandwidth_bytes, higher.name


def test_the_driver_shows_the_memory_on_the_box_or_a_little_less():
    on_the_box = {"RTX 3090": 24, "RTX 4070": 12, "RTX 4090": 24, "RTX 5080": 16, "RTX 5090": 32, "RTX A6000": 48, "MI300X": 192}
    on_the_box |= {card.name: int(card.name.split()[-1][:-2]) for card in cards.cards() if card.name.endswith("GB")}
    for name, size in on_the_box.items():
        assert 0.97 * size * GIB < ROWS[name].memory_bytes <= 1.001 * size * GIB, name


def test_the_table_says_how_its_figures_are_meant():
    about = " ".join(json.loads(resources.files("qlora_tui.engine").joinpath("cards.json").read_text(encoding="utf-8"))["about"])
    assert "32-bit accumulation" in about
    assert "half the rate" in about


@pytest.mark.parametrize(
    ("name", "memory", "card"),
    [
        ("NVIDIA GeForce RTX 4090", 24, "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 D", 24, None),
        ("NVIDIA GeForce RTX 3060", 12, "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 3060 Ti", 8, "RTX 3060 Ti 8GB"),
        ("NVIDIA GeForce RTX 4080 SUPER", 16, "RTX 4080 SUPER"),
        ("NVIDIA H100 80GB HBM3", 80, "H100 80GB"),
        ("NVIDIA H100 80GB HBM3", 24, "H100 80GB"),
        ("NVIDIA H100 PCIe", 80, "H100 PCIe 80GB"),
        ("NVIDIA H100 NVL", 94, None),
        ("NVIDIA A100-SXM4-40GB", 40, "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", 80, "A100 80GB"),
        ("Tesla T4", 15, "T4"),
        ("NVIDIA A10", 22, "A10"),
        ("NVIDIA A10G", 22, "A10G"),
        ("NVIDIA L40S", 45, "L40S"),
        ("NVIDIA L40", 45, None),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16, "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 4070 Ti", 12, None),
        ("NVIDIA GeForce RTX 3080 Ti", 12, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5, None),
        ("", 8, None),
    ],
)
def test_a_drivers_name_means_one_card_or_none(name, memory, card):
    found = card_of(Machine(name, "cuda", memory * GIB))
    assert (found.name if found else None) == card


def test_a_processor_is_no_card():
    assert card_of(Machine("RTX 4090", "cpu", 24 * GIB)) is None


def test_every_card_is_found_by_its_own_name():
    for card in cards.cards():
        found = find_card(card.name.lower())
        assert (found.total_bytes, card_of(found)) == (card.memory_bytes, card)


@pytest.mark.parametrize(
    ("said", "card"),
    [
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("rtx a6000", "RTX A6000"),
        ("h100", "H100 80GB"),
        ("3060", "RTX 3060 12GB"),
        ("4060ti", "RTX 4060 Ti 16GB"),
        ("4080", "RTX 4080"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
    ],
)
def test_cards_are_found_by_short_names_and_by_the_drivers(said, card):
    assert cards.find(said).name == card


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RTX 409", "did you mean RTX 4090"),
        ("a100", "A100 40GB or A100 80GB"),
        ("RTX 3060 8GB", "no card"),
        ("RTX 4090 Laptop GPU", "no card"),
        ("", "known"),
        ("Voodoo", "known"),
    ],
)
def test_a_card_that_is_not_known_is_refused_with_help(name, said):
    with pytest.raises(ConfigError, match=said):
        find_card(name)
