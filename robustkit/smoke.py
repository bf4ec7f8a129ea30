"""Does it run at all? A recipe cut down to a handful of images."""

from __future__ import annotations

from robustkit.core.errors import UserError
from robustkit.core.recipe import Recipe, rehearsed
from robustkit.core.registry import registry
from robustkit.core.spec import evolve


def smoke(recipe: Recipe) -> Recipe:
    """The recipe on a handful of random images of its own shape: every part runs, nothing is learnt.

    Measures that take minutes on any network (AutoAttack) are left out; the others see two images. Trained networks
    that it would load are untrained ones instead.
    """
    recipe = rehearsed(recipe)
    shape, classes = recipe.data.facts
    (channels, height, width), classes = shape or (3, 32, 32), classes or 10
    if height != width:
        raise UserError(f"a smoke run needs square images, these are {height} x {width}", place="data")
    synthetic = registry("dataset").get("synthetic")
    sizes = {"train": 12, "test": 2, "classes": classes, "size": height, "channels": channels}
    data = synthetic(**sizes, augment=getattr(recipe.data, "augment", "none"))
    suites = tuple(
        evolve(
            suite,
            images=2,
            measures=tuple(m for m in suite.measures if registry("measure").name_of(type(m)) != "autoattack"),
        )
        for suite in recipe.evaluation
    )
    return evolve(
        recipe,
        data=data,
        batch_size=4,
        accumulate=min(2, recipe.accumulate),
        validation=evolve(recipe.validation, images=4, train_images=0),
        evaluation=suites,
        control=None if recipe.control is None else smoke(recipe.control),
    )
