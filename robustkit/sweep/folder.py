"""The folder of a sweep: its plan, its trials, and who is at which."""

from __future__ import annotations

import itertools
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import attrs
from filelock import FileLock, Timeout

from robustkit.core import checkpoint
from robustkit.core.errors import RecipeError, UserError
from robustkit.core.override import override
from robustkit.core.reading import parse_json, read_json
from robustkit.core.recipe import Recipe, load_recipe, save_recipe, split_address
from robustkit.core.spec import digest, evolve
from robustkit.folder import stem_of
from robustkit.opening import recipe_of
from robustkit.sweep.axes import Axis, axes_of, combinations, folder_name, values_of

PLAN = "sweep.json"
TRIALS = ".trials"

Ending = Literal["", "done", "collapse", "pruned", "failed"]


@attrs.frozen(kw_only=True)
class Search:
    """Trials that are drawn one after the other, in place of a grid. `prune`: stop those that fall behind."""

    method: Literal["random", "tpe"]
    trials: int
    prune: bool = False


@attrs.frozen(kw_only=True)
class Trial:
    """One run of a sweep.

    `base` is the recipe's place in the plan and `words` its overrides. `ended` is "" while there is something to do,
    "collapse" where training ended at one (see `Validation.on_collapse`); `line` says why a trial failed.
    """

    number: int
    name: str
    base: int
    words: tuple[str, ...]
    ended: Ending = ""
    line: str = ""


@attrs.frozen(kw_only=True)
class Sweep:
    """A sweep in its folder. `bases` are the plan's recipes and `addresses` where they came from."""

    folder: Path
    addresses: tuple[str, ...]
    axes: tuple[Axis, ...]
    search: Search | None
    bases: tuple[Recipe, ...]

    def trials(self) -> list[Trial]:
        """All that are planned, or drawn so far."""
        return [_read_trial(path) for path in sorted((self.folder / TRIALS).glob("*.json"))]

    def again(self, trial: Trial) -> Trial:
        """The trial as its file has it now."""
        return _read_trial(self._file(trial.number, "json"))

    def write(self, trial: Trial) -> None:
        checkpoint.write_text(self._file(trial.number, "json"), json.dumps(attrs.asdict(trial), indent=1) + "\n")

    def path(self, trial: Trial) -> Path:
        """The folder of its run."""
        return self.folder / trial.name

    def recipe(self, trial: Trial) -> Recipe:
        return trial_recipe(self.bases[trial.base], trial.words, self.search)

    def source(self, trial: Trial) -> Path | None:
        """The plan's copy of the file that defined its recipe."""
        file = _base_folder(self.folder, trial.base) / "recipe.py"
        return file if file.is_file() else None

    def values(self, trial: Trial) -> dict[str, str]:
        """What sets it apart: the recipe, where there are several, and the settings that vary."""
        of_recipes = {"recipe": stems(self.addresses)[trial.base]} if len(self.addresses) > 1 else {}
        return of_recipes | values_of(self.axes, trial.words)

    def claim(self, number: int) -> AbstractContextManager[Any] | None:
        """The trial, held until the `with` of what is returned ends; None where another worker has it.

        The system frees it when its holder dies.
        """
        return self.lock(f"{number:04}")

    def lock(self, name: str) -> AbstractContextManager[Any] | None:
        try:
            return FileLock(self.folder / TRIALS / f"{name}.lock").acquire(blocking=False)
        except Timeout:
            return None

    def _file(self, number: int, suffix: str) -> Path:
        return self.folder / TRIALS / f"{number:04}.{suffix}"


def _read_trial(path: Path) -> Trial:
    data = _read_json(path)
    try:
        return Trial(**data | {"words": tuple(data["words"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"is not a trial: {error}", place=str(path), remedy="begin another sweep") from error


def _read_json(path: Path) -> dict[str, Any]:
    data = read_json(path, "begin another sweep")
    if not isinstance(data, dict):
        raise UserError("not an object", place=str(path), remedy="begin another sweep")
    return data


def _base_folder(folder: Path, number: int) -> Path:
    return folder / TRIALS / "recipes" / str(number)


def trial_recipe(base: Recipe, words: Sequence[str], search: Search | None) -> Recipe:
    """The recipe of a trial: without a control, which would be the same every time.

    A search chooses among its trials, so none of them sees test images: what the recipe measures on these is measured
    on the best one, afterwards.

    Raises:
        SpecError, RegistryError, RecipeError: a word does not fit.
    """
    recipe = evolve(override(base, words), control=None)
    return recipe if search is None else evolve(recipe, evaluation=())


def stems(addresses: Sequence[str]) -> list[str]:
    """A short name for each recipe; where two would have the same, numbered."""
    found = [stem_of(address) for address in addresses]
    return [f"{stem}-{number}" if found.count(stem) > 1 else stem for number, stem in enumerate(found, start=1)]


def open_sweep(folder: str | Path) -> Sweep:
    """The sweep in that folder.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    folder = Path(folder)
    if not (folder / PLAN).is_file():
        raise UserError("is not the folder of a sweep: it has no sweep.json", place=str(folder))
    plan = _read_json(folder / PLAN)
    try:
        addresses = tuple(str(entry["address"]) for entry in plan["recipes"])
        axes = axes_of(plan["words"])
        search = None if plan["search"] is None else Search(**plan["search"])
    except (KeyError, TypeError) as error:
        fault = f"is not the plan of a sweep: {type(error).__name__}: {error}"
        raise UserError(fault, place=str(folder / PLAN), remedy="begin another sweep") from error
    bases = tuple(recipe_of(_base_folder(folder, number)) for number in range(len(addresses)))
    return Sweep(folder=folder, addresses=addresses, axes=axes, search=search, bases=bases)


def with_sweeps(paths: Sequence[str]) -> list[str]:
    """The paths, with the measured runs of a sweep in place of its folder or its sweep.json, once each.

    So `FOLDER/*` means what FOLDER does: its other files (its report, say) are passed over.

    Raises:
        UserError: a sweep cannot be read, or none of its runs was measured.
    """
    folders = [Path(path).parent if Path(path).name == PLAN else Path(path) for path in paths]
    runs = {folder: _measured(folder) for folder in folders if (folder / PLAN).is_file()}
    theirs = list(itertools.chain(*runs.values()))
    found: list[str] = []
    for path, folder in zip(paths, folders, strict=True):
        found += [run for run in runs[folder] if run not in found] if folder in runs else []
        beside = folder.is_file() and folder.parent in runs
        if not (folder in runs or path in theirs or beside):
            found.append(path)
    return found


def _measured(folder: Path) -> list[str]:
    sweep = open_sweep(folder)
    runs = [sweep.path(trial) for trial in sweep.trials()]
    found = [str(run) for run in runs if (run / "results.json").is_file()]
    if not found:
        remedy = f"robustkit sweep {folder} goes on with it"
        raise UserError("none of the sweep's runs is measured yet", place=str(folder), remedy=remedy)
    return found


def make_sweep(
    addresses: Sequence[str], words: Sequence[str] = (), *, search: Search | None = None, out: str | Path | None = None
) -> Sweep:
    """Plans a sweep in a new folder; or opens the one in `out`, if it is of the same plan.

    Every trial of a grid is checked as a recipe here; of a search, each value and each end of a range.

    Args:
        addresses: recipes, as `load_recipe` takes them: each is tried with all combinations.
        words: "path=value,value", overrides of one or several values; in a search also "path=low..high" and
            "path=low..high:log".
        search: draw trials instead of trying every combination.
        out: the folder (default: runs/<recipe>-sweep-<n>).

    Raises:
        UserError: a value does not fit (the line names it), two trials are the same recipe, there is nothing to vary,
            or the folder holds something else.
    """
    axes = axes_of(words)
    bases = tuple(load_recipe(address) for address in addresses)
    plan = {
        "recipes": [{"address": a, "digest": digest(b)} for a, b in zip(addresses, bases, strict=True)],
        "words": list(words),
        "search": None if search is None else attrs.asdict(search),
    }
    if search is None:
        trials = _grid(addresses, bases, axes)
    else:
        from robustkit.sweep.search import check_search

        check_search(bases, axes, search)
        trials = []
    folder = Path(out) if out is not None else _free_folder(addresses[0])
    if not (folder / PLAN).is_file() and not _place(folder, plan, bases, trials) and out is None:
        return make_sweep(addresses, words, search=search)  # another sweep took the number in the meantime
    if _read_json(folder / PLAN) != plan:
        remedy = f"choose another --out, or go on with it: robustkit sweep {folder}"
        raise UserError("holds a sweep of another plan", place=str(folder), remedy=remedy)
    return open_sweep(folder)


def _grid(addresses: Sequence[str], bases: Sequence[Recipe], axes: Sequence[Axis]) -> list[Trial]:
    for axis in axes:
        if axis.scale:
            remedy = "list values (1,2,3), or draw from it with --search random or tpe"
            raise UserError("a grid has no ranges", place=f"{axis.path}={'..'.join(axis.values)}", remedy=remedy)
    if len(bases) == 1 and not any(axis.varies for axis in axes):
        remedy = "give a setting several values (seed=1,2,3), or several recipes"
        raise UserError("there is nothing to vary", place="sweep", remedy=remedy)
    trials: list[Trial] = []
    known: dict[str, str] = {}
    names = stems(addresses)
    for (number, base), words in itertools.product(enumerate(bases), list(combinations(axes))):
        parts = [names[number]] if len(bases) > 1 else []
        parts += [folder_name(found)] if (found := values_of(axes, words)) else []
        name = free_name(",".join(parts), trials)
        same = known.setdefault(digest(checked(base, words, None, name)), name)
        if same != name:
            raise RecipeError(f"is the same recipe as {same}", place=name, remedy="leave one of them out")
        trials.append(Trial(number=len(trials) + 1, name=name, base=number, words=words))
    return trials


def free_name(name: str, trials: Sequence[Trial]) -> str:
    """`name`, with the trial's number where another one has it already."""
    return f"{name}-{len(trials) + 1}" if any(trial.name == name for trial in trials) else name


def checked(base: Recipe, words: Sequence[str], search: Search | None, name: str) -> Recipe:
    """The recipe of a trial; an error names the trial, too."""
    try:
        return trial_recipe(base, words, search)
    except UserError as error:
        raise type(error)(str(error), place=f"trial {name}") from error


def _free_folder(address: str) -> Path:
    numbered = (Path("runs", f"{stem_of(address)}-sweep-{number}") for number in itertools.count(1))
    return next(path for path in numbered if not path.exists())


def _place(folder: Path, plan: dict[str, Any], bases: Sequence[Recipe], trials: Sequence[Trial]) -> bool:
    """Makes the folder, all at once: of several workers that begin the same sweep one does. False: another one did.

    Raises:
        UserError: something else is there, or it cannot be written.
    """
    made = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        for number, (entry, base) in enumerate(zip(plan["recipes"], bases, strict=True)):
            _base_folder(made, number).mkdir(parents=True)
            save_recipe(base, _base_folder(made, number) / "recipe.json")
            file, _ = split_address(entry["address"])
            if file.suffix == ".py":
                shutil.copyfile(file, _base_folder(made, number) / "recipe.py")
        new = Sweep(folder=made, addresses=(), axes=(), search=None, bases=())
        for trial in trials:
            new.write(trial)
        checkpoint.write_text(made / PLAN, json.dumps(plan, indent=2) + "\n")
        made.rename(folder)  # refused where something is there
        return True
    except OSError as error:
        if (folder / PLAN).is_file():
            return False
        fault = f"no sweep can be made here: {error.strerror}"
        raise UserError(fault, place=str(folder), remedy="choose another --out") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def held_out(folder: Path, recipe: Recipe) -> dict[int, float]:
    """{epoch: accuracy on held-out training images} so far: robust, or natural where training attacks nothing.

    That is what the best checkpoint is chosen by.
    """
    return dict(_scores(folder / "metrics.jsonl", "natural" if recipe.attack is None else "robust"))


def _scores(file: Path, which: str) -> Iterator[tuple[int, float]]:
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            report = parse_json(line)
        except ValueError:  # its worker is writing it
            return
        if which in report.get("validation", {}):
            yield int(report["epoch"]), float(report["validation"][which])
