"""Sizes of everything that a check looks at, and a recipe of small parts."""

from __future__ import annotations

from typing import Any

from robustkit.core.model import Model
from robustkit.core.recipe import Recipe, Validation, rehearsed
from robustkit.core.registry import registry

BATCH, CLASSES, WIDTH, EPOCHS, STEPS = 6, 4, 8, 4, 2
SHAPE = (3, 8, 8)


def tiny_recipe(**parts: Any) -> Recipe:
    """A recipe of small parts with `parts` in place of its own.

    A loss that uses a target gets one; a target gets a loss that uses it; an attack takes two steps if it can. Networks
    that strategies would load are untrained ones instead.
    """
    if "loss" not in parts and parts.get("target") is not None:
        parts["loss"] = registry("loss").get("align")()
    given: dict[str, Any] = {
        "data": registry("dataset").get("synthetic")(train=70, test=16, classes=CLASSES, size=8, channels=1),
        "model": Model(backbone="convnet_small"),
        "threat": registry("threat").get("linf")(),
        "attack": registry("attack").get("pgd")(steps=2),
        "loss": registry("loss").get("cross-entropy")(),
        "schedule": registry("schedule").get("constant")(),
        "epochs": EPOCHS,
        "batch_size": 16,
        "validation": Validation(images=12, train_images=6, attack=registry("attack").get("pgd")(steps=2)),
        "evaluation": (),
        **parts,
    }
    if given["loss"].needs_target and "target" not in given:
        given["target"] = registry("target").get("natural")()
    return rehearsed(Recipe(**given))
