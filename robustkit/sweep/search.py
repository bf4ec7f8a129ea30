"""Trials drawn by Optuna: at random, or by its tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011).

Optuna samples and prunes; it stores nothing. Before each draw it is told what the trials' own files say, and its random
numbers are a function of the recipe's seed and the trial's number: one worker, killed and started again as often as you
like, draws what the worker never stopped would have drawn.

A trial's value is its best robust accuracy on held-out training images (natural, where training attacks nothing).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from robustkit.core.errors import RecipeError, UserError
from robustkit.core.override import override
from robustkit.core.recipe import Recipe
from robustkit.core.rng import derive
from robustkit.core.spec import flatten, to_json
from robustkit.display import Silent
from robustkit.sweep.axes import Axis, combinations, folder_name, values_of
from robustkit.sweep.folder import Search, Sweep, Trial, checked, free_name, held_out

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

_FIXED = ("seed", "threat", "validation", "evaluation", "control")


class Pruned(Exception):
    """The trial has fallen behind."""


class Pruner(Silent):
    """Ends a trial after an epoch in which its best value is below the median of the trials that ran to their end."""

    def __init__(self, sweep: Sweep, trial: Trial) -> None:
        self.sweep, self.trial = sweep, trial

    def epoch(self, report: dict[str, Any]) -> None:
        study = _study(self.sweep, self.trial.number, self.sweep.trials())
        mine = next(seen for seen in study.get_trials() if seen.number == self.trial.number - 1)
        if study.pruner.prune(study, mine):
            raise Pruned


def check_search(bases: Sequence[Recipe], axes: Sequence[Axis], search: Search) -> None:
    """Whether trials can be drawn and told apart: each value, and each end of a range, makes a recipe.

    Raises:
        UserError: one does not, there is nothing to draw, or the trials' values would not be comparable.
    """
    _optuna()
    if len(bases) > 1:
        raise UserError("tunes one recipe", place="--search", remedy="give one, or leave out --search for a grid")
    if not any(axis.varies for axis in axes):
        raise UserError("there is nothing to draw", place="--search", remedy="e.g. optimizer.lr=0.01..0.3:log")
    for axis in axes:
        if axis.varies and (axis.path.split(".")[0] in _FIXED or axis.path == "data"):
            fault = "trials that differ in it cannot be compared by their accuracy on held-out images"
            remedy = "search with one value, then sweep what it found: a grid over seeds, radii, ..."
            raise UserError(fault, place=axis.path, remedy=remedy)
    first = [f"{axis.path}={axis.values[0]}" for axis in axes]
    for place, axis in enumerate(axes):
        for value in axis.values:
            words = [*first[:place], f"{axis.path}={value}", *first[place + 1 :]]
            recipe = checked(bases[0], words, search, folder_name(values_of(axes, words)))
    if not recipe.validation.images or (recipe.attack is not None and recipe.validation.attack is None):
        remedy = "set validation.images=1024, and validation.attack=pgd"
        raise RecipeError("a search needs robust accuracy on held-out images", place="validation", remedy=remedy)
    _distributions(axes, recipe)


def draw(sweep: Sweep) -> Trial:
    """The next trial; it is not written yet. Two workers must not draw at once."""
    trials = sweep.trials()
    number = len(trials) + 1
    study = _study(sweep, number, trials)
    drawn = study.ask(_distributions(sweep.axes, sweep.bases[0])).params
    words = tuple(f"{axis.path}={drawn.get(axis.path, axis.values[0])}" for axis in sweep.axes)
    name = free_name(folder_name(values_of(sweep.axes, words)), trials)
    return Trial(number=number, name=name, base=0, words=words)


def best_trial(sweep: Sweep) -> Trial | None:
    """The finished trial of the highest value, the earlier one of equals."""
    done = [trial for trial in sweep.trials() if trial.ended in ("done", "collapse")]
    return max(done, key=lambda trial: value_of(sweep, trial) or 0.0, default=None)


def value_of(sweep: Sweep, trial: Trial) -> float | None:
    """Its best accuracy on held-out images so far; None before the first epoch."""
    return max(held_out(sweep.path(trial), sweep.recipe(trial)).values(), default=None)


def _study(sweep: Sweep, number: int, trials: Sequence[Trial]) -> Study:
    """What the sweep has seen, and a sampler for its trial `number`."""
    optuna = _optuna()
    assert sweep.search is not None
    samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    first = next(combinations(sweep.axes))  # the seed is no axis of a search: any combination has it
    seed = derive(override(sweep.bases[0], first).seed, "sweep", number) % 2**32
    pruner = optuna.pruners.MedianPruner()
    study: Study = optuna.create_study(
        direction="maximize", sampler=samplers[sweep.search.method](seed=seed), pruner=pruner
    )
    states = {"": "RUNNING", "done": "COMPLETE", "collapse": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    space = _distributions(sweep.axes, sweep.bases[0])
    for trial in trials:
        found = held_out(sweep.path(trial), sweep.recipe(trial))
        ended = trial.ended in ("done", "collapse")
        texts = values_of(sweep.axes, trial.words)
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[states[trial.ended]],
                value=max(found.values(), default=0.0) if ended else None,
                params={path: _typed(text, space[path]) for path, text in texts.items()},
                distributions=space,
                intermediate_values=found,
            )
        )
    return study


def _distributions(axes: Sequence[Axis], base: Recipe) -> dict[str, BaseDistribution]:
    """Where values are drawn from: a list, or a range of whole numbers or of fractions, as the setting has it.

    Raises:
        UserError: a range has its ends the wrong way round, or belongs to a setting that is no number.
    """
    kinds = _optuna().distributions
    found: dict[str, BaseDistribution] = {}
    for axis in axes:
        if not axis.scale:
            if axis.varies:
                found[axis.path] = kinds.CategoricalDistribution(axis.values)
            continue
        low, high = (_end(base, axes, axis, text) for text in axis.values)
        place = f"{axis.path}={'..'.join(axis.values)}"
        if not low < high:
            raise UserError("must go upwards", place=place, remedy="give the lower end first")
        if axis.scale == "log" and low <= 0:
            raise UserError("a logarithmic range begins above 0", place=place, remedy="raise its lower end")
        kind = kinds.IntDistribution if isinstance(low, int) else kinds.FloatDistribution
        found[axis.path] = kind(low, high, log=axis.scale == "log")
    return found


def _end(base: Recipe, axes: Sequence[Axis], axis: Axis, text: str) -> int | float:
    """An end of a range, of the type that the setting has."""
    words = [f"{other.path}={text if other is axis else other.values[0]}" for other in axes]
    recipe = checked(base, words, None, f"{axis.path}={text}")
    value = flatten(to_json(recipe)).get(axis.path)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError("is no number: it has no range", place=axis.path, remedy="list its values")
    return value


def _typed(text: str, distribution: BaseDistribution) -> Any:
    """A value from its word, as Optuna knows it."""
    kind = type(distribution).__name__
    return int(text) if kind == "IntDistribution" else float(text) if kind == "FloatDistribution" else text


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        remedy = "pip install optuna, or robustkit with that extra: pip install 'robustkit[sweep]'"
        raise UserError("Optuna is not installed", place="--search", remedy=remedy) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
