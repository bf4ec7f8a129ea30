"""Runs beside each other: what is tested, and what cannot be, as different questions were asked."""

from __future__ import annotations

from typing import Any

import pytest

from robustkit import Recipe, Suite
from robustkit.evaluation import PGD_20, Attacked, AutoAttack, Clean
from robustkit.reporting.comparison import Difference, Item, differences, groups, to_data
from robustkit.testing import tiny_recipe
from robustkit.threats import L2, Linf


def item(name: str, right: dict[str, str], **parts: Any) -> Item:
    """A run that got those images right ("1101"), by measure."""
    results = {
        key: {"accuracy": found.count("1") / len(found), "n": len(found), "ci95": [0.0, 1.0], "seconds": 1.0}
        for key, found in right.items()
    }
    outcomes = {key: {"images": f"the first {len(found)}", "right": found} for key, found in right.items()}
    return Item(name, recipe(**parts), True, {"last": results}, {"last": outcomes})


def recipe(*measures: Any, **parts: Any) -> Recipe:
    suites = parts.pop("evaluation", (Suite(measures=measures or (Clean(), PGD_20, AutoAttack())),))
    return tiny_recipe(evaluation=suites, **parts)


def found(*items: Item) -> dict[str, Difference]:
    return {each.key: each for each in differences(groups(items))}


WELL, BADLY = "1" * 40, "1" * 20 + "0" * 20
MANY = {"clean": WELL, "pgd-20": WELL, "autoattack": WELL}
FEW = {"clean": WELL, "pgd-20": BADLY, "autoattack": BADLY}


def test_in_one_ball_they_are_tested() -> None:
    tested = found(item("a", MANY), item("b", FEW, epochs=3))
    assert [each.basis for each in tested.values()] == ["same images"] * 3
    assert tested["pgd-20"].verdict == "resolved" and tested["clean"].verdict == "not resolved"


@pytest.mark.parametrize("threat", [Linf(epsilon=0.07), L2(epsilon=0.5)])
def test_in_different_balls_only_clean_images_are_tested(threat: Any) -> None:
    tested = found(item("a", MANY, threat=Linf(epsilon=0.15)), item("b", FEW, threat=threat))
    assert tested["clean"].basis == "same images"
    for key in ("pgd-20", "autoattack"):
        assert tested[key].verdict == tested[key].basis == "not alike"
        assert not tested[key].resolved
        assert (tested[key].value, tested[key].p, tested[key].ci95) == (0.5, None, None)


def test_so_do_other_settings_of_an_attack_and_the_ball_of_a_suite() -> None:
    slower = Suite(measures=(Clean(), Attacked(key="pgd-20", steps=40), AutoAttack()))
    tested = found(item("a", MANY), item("b", FEW, evaluation=(slower,)))
    assert tested["pgd-20"].verdict == "not alike" and tested["autoattack"].verdict == "resolved"
    elsewhere = Suite(measures=(Clean(), PGD_20, AutoAttack()), threat=L2(epsilon=0.5))
    tested = found(item("a", MANY), item("b", FEW, evaluation=(elsewhere,)))
    assert tested["autoattack"].verdict == "not alike" and tested["clean"].verdict == "not resolved"


def test_other_numbers_of_images_answer_the_same_question() -> None:
    less = Suite(measures=(Clean(), PGD_20, AutoAttack(images=20)))
    tested = found(item("a", MANY), item("b", FEW | {"autoattack": BADLY[10:30]}, evaluation=(less,)))
    assert tested["autoattack"].basis == "different images"


def test_what_the_recipe_did_not_ask_for_goes_by_its_threat_model() -> None:
    only = (Suite(measures=(Clean(),)),)
    a, b = item("a", MANY, evaluation=only), item("b", FEW, evaluation=only, epochs=3)
    assert found(a, b)["pgd-20"].verdict == "resolved"
    assert found(a, item("c", FEW, evaluation=only, threat=L2(epsilon=0.5)))["pgd-20"].verdict == "not alike"
    other = {"ldat/pgd-40": BADLY}
    beside = found(item("a", other), item("b", {"ldat/pgd-40": WELL}, threat=L2(epsilon=0.5)))
    assert beside["ldat/pgd-40"].verdict == "resolved"  # a suite of that name has balls of its own


def test_seeds_of_different_balls_are_not_tested_either() -> None:
    runs = [item(f"a{seed}", MANY, seed=seed) for seed in (1, 2)]
    others = [item(f"b{seed}", FEW, seed=seed, threat=Linf(epsilon=0.07)) for seed in (1, 2)]
    tested = found(*runs, *others)
    assert tested["pgd-20"].verdict == "not alike" and tested["clean"].basis == "seeds"
    entries = {each["measure"]: each for each in to_data([*runs, *others])["differences"]}
    assert entries["pgd-20"]["basis"] == "not alike" and entries["pgd-20"]["resolved"] is False
