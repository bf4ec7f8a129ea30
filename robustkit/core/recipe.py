"""A recipe composes one strategy of each kind, and is a value: printed, compared, hashed without data or a GPU."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import attrs

from robustkit.core.batch import Passes, Progress
from robustkit.core.errors import RecipeError, UserError
from robustkit.core.model import Model
from robustkit.core.reading import read_json
from robustkit.core.registry import did_you_mean, hint, near_misses, registry
from robustkit.core.spec import evolve, from_json, hints, setting, spec, to_json, walk
from robustkit.core.strategy import (
    Attack,
    Dataset,
    EpsilonSchedule,
    Head,
    Measure,
    Optimizer,
    OuterLoss,
    Schedule,
    TargetDistribution,
    ThreatModel,
    WeightAverage,
    WeightPerturbation,
)

px = 1 / 255
"""One step of an 8-bit pixel: `8 * px` is 8/255."""


def _default(kind: str, name: str, **settings: Any) -> Any:
    """A field's default strategy, looked up by name when first needed: the core imports no strategy."""
    return setting(default=attrs.Factory(lambda: registry(kind).get(name)(**settings)))


@spec
class Validation:
    """What is held out of the training images, and how robustness is measured on it after each epoch.

    The best checkpoint has the highest robust accuracy here. `train_images` training images are measured likewise, for
    the learning curves. `attack` None measures natural accuracy alone.

    Where training attacks in a single step, FGSM is measured as well, and a collapse that it does not see (see
    `core.collapse`) is reported; with `on_collapse` "stop" training ends with that epoch.
    """

    images: int = setting(default=1024, at_least=0)
    train_images: int = setting(default=512, at_least=0)
    attack: Attack | None = _default("attack", "pgd")
    every: int = setting(default=1, at_least=1)
    on_collapse: Literal["warn", "stop"] = "warn"

    def ended_by(self, best: dict[str, Any]) -> bool:
        """Whether training ended at a collapse: `best` is what a run, or its checkpoint's facts, holds of that name."""
        return self.on_collapse == "stop" and "collapse" in best


@spec
class Precision:
    """Arithmetic of the attack and target passes, and of the outer pass. Losses and evaluation are always float32.

    "auto" is "bf16" where the device multiplies it in hardware and the network is not tiny, else "fp32". A run keeps
    what it began with, wherever it is resumed.
    """

    attack: Literal["auto", "fp32", "bf16"] = "auto"
    outer: Literal["auto", "fp32", "bf16"] = "auto"


@spec
class Health:
    """What becomes of a step whose objective or gradient is NaN or infinite.

    "stop" ends training. "skip" takes back all that the step did and goes on with the next batch: the state is copied
    before each step, and a GPU waited for in each. "rewind" does neither, but goes back to the last checkpoint and
    comes again, past that step: the result is the same. After `most_skipped` such steps training stops all the same.
    """

    on_fault: Literal["stop", "skip", "rewind"] = "stop"
    most_skipped: int = setting(default=10, at_least=1)


def _standard_measures() -> tuple[Measure, ...]:
    measures = registry("measure")
    attacked, objective = measures.get("attacked"), registry("objective").get("margin")
    cw = attacked(key="cw", objective=objective())
    return (measures.get("clean")(), attacked(), cw, measures.get("autoattack")())


@spec
class Suite:
    """Measures of a finished model under one threat model (None: the recipe's), on the test images.

    `images` limits every measure to a fixed random part of the test set. A suite's `name` goes before its keys in
    results.json ("l2/autoattack"); the main suite has none.
    """

    name: str = ""
    threat: ThreatModel | None = None
    measures: tuple[Measure, ...] = setting(default=attrs.Factory(_standard_measures))
    images: int | None = setting(default=None, at_least=1)


@spec
class Recipe:
    """One strategy of each kind. `control` is a second recipe, trained and reported beside this one."""

    data: Dataset
    model: Model
    threat: ThreatModel
    attack: Attack | None
    loss: OuterLoss
    schedule: Schedule
    epochs: int = setting(at_least=1, at_most=100_000)  # looked at one by one when shown
    head: Head = _default("head", "linear")
    epsilon: EpsilonSchedule = _default("epsilon", "fixed")
    target: TargetDistribution | None = None
    weights: WeightPerturbation = _default("weights", "still")
    average: WeightAverage | None = None
    optimizer: Optimizer = _default("optimizer", "sgd")
    batch_size: int = setting(default=128, at_least=2)
    accumulate: int = setting(default=1, at_least=1)
    validation: Validation = setting(default=attrs.Factory(Validation))
    precision: Precision = setting(default=attrs.Factory(Precision))
    health: Health = setting(default=attrs.Factory(Health))
    evaluation: tuple[Suite, ...] = setting(default=attrs.Factory(lambda: (Suite(),)))
    control: Recipe | None = None
    seed: int = setting(default=1, at_least=0)

    def validate(self) -> None:
        """Refuse parts that do not fit together; each part may add its own reasons (`check(recipe)`)."""
        if self.target is not None and not self.loss.needs_target:
            raise RecipeError(
                f"the loss '{_name('loss', self.loss)}' uses no target, but the recipe has one",
                place="target",
                remedy="set target=none, or a loss that uses one, such as align",
            )
        if self.target is None and self.loss.needs_target:
            raise RecipeError(
                f"the loss '{_name('loss', self.loss)}' needs a target", place="target", remedy="e.g. target=natural"
            )
        if self.attack is None and self.loss.passes(Progress.at(0, self.epochs, 1)).forward > 1:
            raise RecipeError(
                f"the loss '{_name('loss', self.loss)}' compares with adversarial images, and there is no attack",
                place="attack",
                remedy="e.g. attack=pgd, or loss=cross-entropy",
            )
        if self.accumulate > 1:
            if self.batch_size // self.accumulate < 2:
                raise RecipeError(
                    f"cannot split batches of {self.batch_size} into {self.accumulate}", place="accumulate"
                )
            for path, part in walk(self):
                if not getattr(part, "accumulates", True) and not path.startswith("control"):
                    raise RecipeError(
                        f"{path} ({type(part).__name__}) takes one step per batch and would take {self.accumulate}",
                        place="accumulate",
                        remedy="set accumulate=1",
                    )
        keys = [key for suite, measure in self.measures() for key in [result_key(suite, measure)]]
        for key, count in Counter(keys).items():
            if count > 1:
                raise RecipeError(
                    f"two measures report as '{key}'",
                    place="evaluation",
                    remedy="give one of them another key, or its suite a name",
                )
        for path, part in walk(self):
            stateful = hasattr(part, "build") and registry("attack").name_of(type(part)) is not None
            if stateful and path != "attack" and not path.startswith("control"):
                raise RecipeError(
                    f"the attack '{_name('attack', part)}' has a state: it can only be the attack of training",
                    place=path,
                    remedy=f"e.g. {path}=pgd",
                )
            if hasattr(part, "check") and part is not self and not path.startswith("control"):
                part.check(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: as `robustkit show`."""
        from robustkit.reporting.composition import recipe_as_html

        return recipe_as_html(self)

    def measures(self) -> Iterator[tuple[Suite, Measure]]:
        """All that is measured, suite by suite."""
        for suite in self.evaluation:
            for measure in suite.measures:
                yield suite, measure

    def passes(self, progress: Progress) -> dict[str, Passes]:
        """What each part of one step forwards and differentiates, at that point of training."""
        pure = self.loss.passes(progress)
        outward = self.loss.preparation(progress) if hasattr(self.loss, "preparation") else Passes()
        target = Passes() if self.target is None else self.target.passes(progress)
        if target.forward and not self.loss.detach_target:  # then its forward is part of the pure pass
            target, pure = target + Passes(forward=-1), pure + Passes(forward=1, parameter_backward=1)
        return {
            "epsilon": passes_in(self.epsilon, self, progress),
            "attack": Passes() if self.attack is None else passes_in(self.attack, self, progress),
            "target": target,
            "loss": outward + pure,
            "weights": self.weights.passes(progress, pure),
        }

    @property
    def interval(self) -> int:
        """So many steps in a row cost together what any other so many cost: 1 for most recipes."""
        return max(getattr(part, "interval", 1) for part in (self.epsilon, self.attack, self.target, self.loss))

    def mean_passes(self, progress: Progress) -> dict[str, Passes]:
        """As `passes`, on average over the steps around that point of the epoch."""
        interval = self.interval
        if interval == 1:
            return self.passes(progress)
        first = -(-progress.step // interval) * interval
        each = [self.passes(attrs.evolve(progress, step=first + step)) for step in range(interval)]
        return {name: sum((one[name] for one in each), Passes()) * (1 / interval) for name in each[0]}


def passes_in(part: EpsilonSchedule | Attack, recipe: Recipe, progress: Progress) -> Passes:
    """What a part costs in that recipe, where it says, else what it costs in any."""
    passes: Passes = part.passes_in(recipe, progress) if hasattr(part, "passes_in") else part.passes(progress)
    return passes


def result_key(suite: Suite, measure: Measure) -> str:
    """The key of a measure in results.json."""
    return f"{suite.name}/{measure.key}" if suite.name else measure.key


def refuse_late_start(start: float, recipe: Recipe, place: str) -> None:
    """Raises RecipeError where an absolute start epoch lies beyond the end of training."""
    if start > 1 and start > recipe.epochs:
        raise RecipeError(
            f"starts at epoch {start:g}, but training ends after {recipe.epochs}",
            place=place,
            remedy="give a fraction of training, e.g. 0.75",
        )


def rehearsed(recipe: Recipe) -> Recipe:
    """The recipe with untrained networks in place of trained ones that its strategies would load."""
    parts = {name: getattr(recipe, name) for name in hints(Recipe)}
    changes = {name: part.rehearsed(recipe) for name, part in parts.items() if hasattr(part, "rehearsed")}
    changes["evaluation"] = tuple(
        evolve(suite, measures=tuple(m.rehearsed(recipe) if hasattr(m, "rehearsed") else m for m in suite.measures))
        for suite in recipe.evaluation
    )
    return evolve(recipe, **changes)


def split_address(address: str | Path) -> tuple[Path, str]:
    """('family.py', 'name') of 'family.py:name'; the name is "" where there is none. A drive's colon names nothing."""
    file, _, name = str(address).rpartition(":")
    return (Path(file), name) if file.endswith(".py") else (Path(address), "")


def load_recipe(address: str | Path) -> Recipe:
    """The recipe of a Python file (of one that defines several: FILE.py:NAME), a JSON file, or a run's folder.

    A Python file is executed.

    Raises:
        RecipeError: the file is missing or broken, or defines no such recipe; the line says where.
    """
    path, name = split_address(address)
    if path.is_dir() and (path / "recipe.json").is_file():
        path = path / "recipe.json"
    if path.suffix == ".json" and path.is_file():
        return _from_json_file(path)
    found = load_recipes(path)
    if name in found:
        return found[name]
    names = [known for known in found if known]
    if not name:
        remedy = f"name one, as in {path}:{names[0]}; known: {', '.join(names)}"
        raise RecipeError(f"defines {len(names)} recipes", place=str(path), remedy=remedy)
    remedy = hint(name, names) if names else f"give {path}: it defines one only"
    raise RecipeError(f"defines no recipe '{name}'", place=str(path), remedy=remedy)


def load_recipes(path: str | Path) -> dict[str, Recipe]:
    """All that a Python file defines: its `recipe`, under "", then those in its `recipes`, by name.

    Raises:
        RecipeError: the file is missing or broken, or defines none; the line says where.
    """
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("recipes")
        files = sorted(folder.glob("*.py"))
        known = f"known: {', '.join(map(str, files))}" if files else ""
        remedy = meant(path, [*files, *runs_beside(path)]) or known
        fault = "no such recipe" if path.suffix == ".py" else "no such recipe or run"
        raise RecipeError(fault, place=str(path), remedy=remedy)
    module = execute(path)
    recipe, family = getattr(module, "recipe", None), getattr(module, "recipes", None)
    found = {"": recipe} if isinstance(recipe, Recipe) else {}
    for name, one in family.items() if isinstance(family, dict) else ():
        if not isinstance(one, Recipe) or not re.fullmatch(r"[\w.-]+", str(name)):
            fault = f"`recipes` holds {name!r}: {type(one).__name__}"
            raise RecipeError(fault, place=str(path), remedy="give recipes by name: letters, digits, '-', '.', '_'")
        found[str(name)] = one
    if not found:
        remedy = "end the file with `recipe = Recipe(...)`, or with `recipes = {name: Recipe(...)}`"
        raise RecipeError("defines no `recipe`", place=str(path), remedy=remedy)
    return found


def runs_beside(path: Path) -> list[Path]:
    """The run folders where `path` lies, or would lie."""
    return [found.parent for found in sorted(path.parent.glob("*/recipe.json"))]


def meant(path: Path, others: list[Path]) -> str:
    """'did you mean ...?' of those whose name is like that of `path`; nothing where none is."""
    by_name = {other.name: str(other) for other in others}
    return did_you_mean([by_name[name] for name in near_misses(path.name, by_name)])


def _from_json_file(path: Path) -> Recipe:
    try:
        data = read_json(path)
    except UserError as error:
        raise RecipeError(error.fault, place=str(path), remedy=error.remedy) from error
    try:
        return from_json(Recipe, data)  # type: ignore[no-any-return]
    except UserError as error:
        raise RecipeError(str(error), place=str(path)) from error


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes recipe.json: every setting, defaults included."""
    path.write_text(json.dumps(to_json(recipe), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def execute(path: Path) -> Any:
    """The module of a recipe file, executed: strategies that it defines are registered.

    Raises:
        RecipeError: it fails; the line says where.
    """
    name = f"robustkit_recipe_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise RecipeError("is no Python file", place=str(path), remedy="give a recipe's FILE.py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # annotations of strategies defined in the file are resolved through it
    try:
        with _importable(path.resolve().parent):
            module_spec.loader.exec_module(module)
    except UserError as error:
        raise RecipeError(str(error), place=f"{path}{_line_in(path, error)}") from error
    except SyntaxError as error:
        raise RecipeError(f"syntax error: {error.msg}", place=f"{error.filename or path}:{error.lineno}") from error
    except Exception as error:
        place = f"{path}{_line_in(path, error)}"
        raise RecipeError(f"{type(error).__name__}: {error}", place=place) from error
    return module


def learn_backbone(source: Path | None, model: Model) -> None:
    """A backbone may be defined in a recipe's file: where nobody knows it, `source` is executed if it is there.

    Raises:
        RecipeError: as `execute`.
    """
    if source is None or not source.is_file():
        return
    import timm

    import robustkit.backbones  # noqa: F401  registers ours

    if not timm.is_model(model.backbone):
        execute(source)


def _line_in(path: Path, error: BaseException) -> str:
    """':12', the last line of the file that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return f":{lines[-1]}" if lines else ""


_neighbours: dict[str, Path] = {}
"""Modules that recipes imported from their own folder, and that folder."""


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Recipes may import their neighbours; a neighbour of the same name in another folder is another one."""
    for name in [name for name, home in _neighbours.items() if home != folder]:
        sys.modules.pop(name, None)
        del _neighbours[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
                _neighbours[name] = folder


def _name(kind: str, part: Any) -> str:
    return registry(kind).name_of(type(part)) or type(part).__name__
