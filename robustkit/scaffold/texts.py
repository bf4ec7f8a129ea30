"""What stands around the strategy in a new package, with `new-strategy` where its name goes."""

from __future__ import annotations

from robustkit.core.registry import FOLDERS

_RECIPE = {
    "dataset": ("data", "Digits()", "robustkit.datasets", "Digits"),
    "model": ("model", 'Model(backbone="convnet_small")', "robustkit", "Model"),
    "head": ("head", "", "", ""),
    "threat": ("threat", "Linf(epsilon=0.15)", "robustkit.threats", "Linf"),
    "epsilon": ("epsilon", "", "", ""),
    "attack": ("attack", "PGD(steps=5)", "robustkit.attacks", "PGD"),
    "target": ("target", "", "", ""),
    "loss": ("loss", "CrossEntropy()", "robustkit.losses", "CrossEntropy"),
    "weights": ("weights", "", "", ""),
    "average": ("average", "", "", ""),
    "optimizer": ("optimizer", "SGD(lr=0.05)", "robustkit.optimizers", "SGD"),
    "schedule": ("schedule", "Cosine()", "robustkit.schedules", "Cosine"),
}
"""Kind -> its field of a recipe, what stands there otherwise ("": nothing), and where that is imported from."""


_TITLES = {
    "threat": "a threat model",
    "epsilon": "an epsilon schedule",
    "attack": "an attack",
    "objective": "an objective of attacks",
    "target": "a target distribution",
    "head": "a head",
    "loss": "an outer loss",
    "weights": "a weight perturbation",
    "average": "a weight average",
    "optimizer": "an optimizer",
    "schedule": "a schedule of learning rates",
    "dataset": "a data set",
    "measure": "a measure",
}


def recipe(kind: str, cls: str) -> str:
    """A recipe of small parts with the new strategy among them."""
    parts = dict(_RECIPE)
    if kind == "objective":
        parts["attack"] = ("attack", f"PGD(steps=5, objective={cls}())", "robustkit.attacks", "PGD")
    elif kind == "threat":
        parts["threat"] = ("threat", f"{cls}(epsilon=0.15)", "", "")
    elif kind in parts:
        parts[kind] = (parts[kind][0], f"{cls}()", "", "")
    if kind == "target":
        parts["loss"] = ("loss", "Align(weight=3.5)", "robustkit.losses", "Align")
    measures = ["Clean()", "PGD_20"] + ([f"{cls}()"] if kind == "measure" else [])
    imports = {"robustkit": {"Recipe", "Suite", "Validation"}, "robustkit.evaluation": {"Clean", "PGD_20"}}
    for _, _, home, name in parts.values():
        if home:
            imports.setdefault(home, set()).add(name)
    # constants before classes, as ruff sorts them
    lines = [
        f"from {home} import {', '.join(sorted(names, key=lambda name: (not name.isupper(), name)))}"
        for home, names in sorted(imports.items())
    ]
    fields = [f"    {field}={value}," for field, value, _, _ in parts.values() if value]
    return "\n".join(
        [
            f'"""new-strategy, {_TITLES[kind]}, on small images that need no download.',
            "",
            "Run:        robustkit run recipes/new_strategy.py    (after pip install -e .)",
            "Cost:       robustkit show recipes/new_strategy.py says",
            "Measured:   not yet",
            '"""',
            "",
            *lines,
            f"from robustkit_new_strategy import {cls}",
            "",
            "recipe = Recipe(",
            *fields,
            "    epochs=10,",
            "    batch_size=64,",
            "    validation=Validation(images=128, train_images=128),",
            f"    evaluation=(Suite(measures=({', '.join(measures)})),),",
            ")",
            "",
        ]
    )


def test(kind: str) -> str:
    """Tests that hold for any strategy of the kind; what this one promises is for tests of its author's."""
    return _TEST.replace("KIND", kind) + (_TEST_OF_IMAGES if kind == "dataset" else "")


def pyproject(kind: str, folder: str) -> str:
    """`folder`: the last word of the kind's entry-point group."""
    return _PYPROJECT.replace("a KIND", _TITLES[kind]).replace("FOLDER", folder)


def readme(kind: str) -> str:
    """How to install, use and test it, and where to read on."""
    page = {"objective": "attacks", "average": "weights", "schedule": "optimizers", "dataset": "data"}
    page["measure"] = "evaluation"
    use = {
        "objective": "attack.objective=new-strategy",
        "dataset": "data=new-strategy",
        "measure": "",
        "target": "target=new-strategy loss=align",
    }.get(kind, f"{kind}=new-strategy")
    told = f"    robustkit run RECIPE {use}\n" if use else "    (in a recipe) Suite(measures=(..., NewStrategy()))\n"
    return (
        _README.replace("a KIND", _TITLES[kind])
        .replace("KIND", kind)
        .replace("USE", told)
        .replace("PAGE", page.get(kind, FOLDERS[kind]))
    )


_TEST = '''\
"""new-strategy: what its kind must do, and its recipe. Tests of what this one promises come here, too."""

from __future__ import annotations

from pathlib import Path

from robustkit import load_recipe
from robustkit.core.registry import entries
from robustkit.runs import run
from robustkit.smoke import smoke
from robustkit.testing import check
from robustkit_new_strategy import NewStrategy

RECIPE = Path(__file__).parents[1] / "recipes" / "new_strategy.py"


def test_contract() -> None:
    check(NewStrategy())


def test_announced() -> None:
    assert "new-strategy" in {entry.name for entry in entries("KIND")}


def test_recipe_runs(tmp_path: Path) -> None:
    outcome = run(smoke(load_recipe(RECIPE)), out=tmp_path / "run", device="cpu", max_steps=2)
    assert outcome.stopped == "steps"
'''

_TEST_OF_IMAGES = """

def test_images() -> None:
    data = NewStrategy().load()
    assert (data.train.shape, len(data.classes)) == NewStrategy().facts
"""

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=68"]
build-backend = "setuptools.build_meta"

[project]
name = "robustkit-new-strategy"
version = "0.1.0"
description = "new-strategy, a KIND for robustkit"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["robustkit"]

[project.optional-dependencies]
test = ["pytest>=8"]

# The one line by which robustkit finds it.
[project.entry-points."robustkit.FOLDER"]
new-strategy = "robustkit_new_strategy:NewStrategy"

[tool.setuptools.packages.find]
where = ["src"]

[tool.setuptools.package-data]
robustkit_new_strategy = ["py.typed"]

[tool.ruff]
line-length = 120
lint.isort.known-first-party = ["robustkit"]
"""

_README = """\
# robustkit-new-strategy

`new-strategy`, a KIND for robustkit. So far it is what `robustkit new KIND new-strategy` wrote: a small strategy that
works, in [`src/robustkit_new_strategy/__init__.py`](src/robustkit_new_strategy/__init__.py). Make it yours.

Install it and run its tests, which hold it against the contract of its kind:

    pip install -e ".[test]"
    pytest

Use it:

    robustkit run recipes/new_strategy.py
USE
Ask whether it is announced, loads and keeps its contract:

    robustkit doctor --plugin robustkit-new-strategy

The contract is in robustkit's `core/strategy.py`, other strategies of the kind are in `docs/kinds/PAGE.md`, and how
plugins work is in `docs/plugins.md`.
"""
