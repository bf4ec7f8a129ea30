"""The folder of a run: how it is made, what it says of its origin, and the results in it."""

from __future__ import annotations

import errno
import importlib.metadata
import itertools
import json
import math
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import robustkit
from robustkit.core import checkpoint
from robustkit.core.errors import RecipeError, StorageError, UserError
from robustkit.core.reading import parse_json, read_object, read_text
from robustkit.core.recipe import Recipe, save_recipe, split_address
from robustkit.core.registry import FOLDERS, registry
from robustkit.core.spec import digest, to_json, walk
from robustkit.core.world import World
from robustkit.lock import locked

CHECKPOINTS = ("last", "best")
"""Of a finished run; best is there where images were held out."""
_BEGUN = ".begun"
"""What is in a folder until it is a run."""
LARGEST_NUMBER = 1e300
"""Numbers in files are below it: no infinities, and none that formats or floats cannot take."""


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a run, {} where there is none yet.

    Raises:
        UserError: it is not JSON, or does not hold results.
    """
    path, remedy = folder / "results.json", "remove it and resume the run"
    data = read_object(path, remedy)
    for name, results in data.items():
        for key, entry in results.items() if isinstance(results, dict) else [("", results)]:
            if not _is_result(entry):
                raise UserError(f"holds no result at '{name}', '{key}'", place=str(path), remedy=remedy)
    return data


def _is_result(entry: Any) -> bool:
    """Whether what tables, figures and comparisons ask of a result is there, and is what it should be."""
    if not isinstance(entry, dict):
        return False
    count, interval, notes = entry.get("n"), entry.get("ci95"), entry.get("notes", [])
    shares, texts = entry.get("shares", {}), [entry.get("path", ""), *(notes if isinstance(notes, list) else [None])]
    return (
        _is_share(entry.get("accuracy"))
        and type(count) is int
        and count >= 0
        and isinstance(interval, list)
        and len(interval) == 2
        and all(map(_is_share, interval))
        and _is_number(entry.get("seconds"))
        and _are_shares(entry.get("breakdown", {}))
        and isinstance(shares, dict)
        and all(map(_are_shares, shares.values()))
        and all(isinstance(text, str) for text in texts)
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST_NUMBER < value < LARGEST_NUMBER


def _is_share(value: Any) -> bool:
    return _is_number(value) and -0.1 <= value <= 1.1


def _are_shares(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_share, value.values()))


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """As measured: the order of a measure's stages says something."""
    checkpoint.write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")


def read_outcomes(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """outcomes.json of a run, {} where there is none: {checkpoint: {key: {"images": ..., "right": "0110..."}}}.

    `images` is a fingerprint of the images judged and their order: outcomes may be compared image by image where it is
    the same. `right` has one character for each image: "1" where the model got it right.
    """
    path, remedy = folder / "outcomes.json", "remove it and measure the run again"
    data = read_object(path, remedy)
    for name, outcomes in data.items():
        for key, entry in outcomes.items() if isinstance(outcomes, dict) else [("", outcomes)]:
            said = [entry.get(part) for part in ("images", "right")] if isinstance(entry, dict) else [None]
            if not all(isinstance(text, str) for text in said) or str(said[-1]).strip("01"):
                raise UserError(f"holds no outcomes at '{name}', '{key}'", place=str(path), remedy=remedy)
    return data


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The reports of a run's epochs, as metrics.jsonl has them; none where there is none yet.

    Raises:
        UserError: a line is no report of an epoch.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    reports = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            report = parse_json(line)
        except ValueError as error:
            raise UserError(f"not JSON: {error}", place=f"{path}:{number}") from error
        if not _is_report(report):
            raise UserError("is no report of an epoch", place=f"{path}:{number}", remedy="put back the file as it was")
        reports.append(report)
    return reports


def cut_metrics(folder: Path, epochs: int) -> int:
    """Leaves the reports of that many epochs at most, of whole lines alone; how many there are now.

    What a checkpoint does not know of was written after it; what a disk has lost of a line cannot be had again.
    """
    path = folder / "metrics.jsonl"
    lines = read_text(path, errors="replace").splitlines() if path.is_file() else []
    whole = [line for line in lines[:epochs] if _is_whole(line)]
    checkpoint.write_text(path, "".join(f"{line}\n" for line in whole))
    return len(whole)


def _is_whole(line: str) -> bool:
    try:
        return _is_report(parse_json(line))
    except ValueError:
        return False


def _is_report(report: Any) -> bool:
    """Whether what figures ask of an epoch is there, and is what it should be."""
    if not isinstance(report, dict) or not isinstance(report.get("radii"), dict):
        return False
    numbers, counts = [report.get("train"), report.get("validation", {}), report.get("training", {})], report["radii"]
    return (
        all(isinstance(part, dict) and all(map(_is_number, part.values())) for part in numbers)
        and {"objective", "epsilon"} <= report["train"].keys()
        and type(report.get("epoch")) is int
        and _is_number(report.get("lr"))
        and _is_number(counts.get("unit"))
        and isinstance(counts.get("counts"), list)
        and all(map(_is_number, counts["counts"]))
    )


def write_outcomes(folder: Path, outcomes: dict[str, dict[str, dict[str, str]]]) -> None:
    checkpoint.write_text(folder / "outcomes.json", json.dumps(outcomes, indent=1, sort_keys=True) + "\n")


@contextmanager
def new_folder(
    out: str | Path | None, source: str | Path | None, world: World, say: Callable[[str], None]
) -> Iterator[Path]:
    """Makes the run's folder and holds it (see `locked`). One process makes it for all.

    In the default place, it is the first number that is free, also for runs that begin at the same time.

    Raises:
        UserError: something is there already, or it cannot be made; in every process.
    """
    made: Path | UserError | None = None
    with ExitStack() as stack:
        if world.rank == 0:
            try:
                made = _numbered(stem_of(source) if source is not None else "run") if out is None else Path(out)
                _make(made)
                stack.enter_context(locked(made, say))
                _make(made)  # another process may have made a run of it before we had the lock
            except UserError as error:
                made = error
        made = world.share(made)
        if isinstance(made, UserError):
            raise made
        assert made is not None
        yield made


def stem_of(source: str | Path) -> str:
    """'uiat_table1-cifar10-mart' of 'recipes/uiat_table1.py:cifar10-mart'."""
    file, name = split_address(source)
    return f"{file.stem}-{name}" if name else file.stem


def _numbered(stem: str) -> Path:
    """runs/<stem>-<n>, made here and now."""
    for number in itertools.count(1):
        path = Path("runs", f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise _unwritable(path, error) from error
    raise AssertionError


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot be written: {error.strerror}", place=str(folder), remedy="choose another --out")


def _make(folder: Path) -> None:
    killed = (folder / _BEGUN).is_dir() and not (folder / "recipe.json").exists()  # before it was a run
    if folder.exists() and not killed and (not folder.is_dir() or any(folder.iterdir())):
        remedy = f"choose another --out, or go on with `robustkit resume {folder}`"
        raise UserError("exists already and is not empty", place=str(folder), remedy=remedy)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _BEGUN).mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_facts(
    folder: Path, recipe: Recipe, source: str | Path | None, overrides: tuple[str, ...], world: World
) -> None:
    """recipe.py, environment.json, and recipe.json last: with it the folder is a run."""
    file = None if source is None else split_address(source)[0]
    begun = folder / _BEGUN
    begun.mkdir(exist_ok=True)
    if file is not None and file.suffix == ".py":
        shutil.copyfile(file, folder / "recipe.py")
    environment = {
        "robustkit": robustkit.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in ("torch", "torchvision", "timm", "accelerate", "pyautoattack")},
        "device": str(world.device),
        "device_name": _device_name(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "precision": to_json(recipe.precision),
        "command": sys.argv,
        "source": None if source is None else str(source),
        "overrides": list(overrides),
        "digest": digest(recipe),
        "unannounced": unannounced(recipe),
        "git_commit": _git_commit(Path.cwd() if file is None else file.resolve().parent),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    checkpoint.write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    save_recipe(recipe, begun / "recipe.json")
    checkpoint.replace(begun / "recipe.json", folder / "recipe.json")
    begun.rmdir()


def note(folder: Path, **facts: str) -> None:
    """Adds to environment.json what is known once data are loaded and the model is built."""
    path = folder / "environment.json"
    environment = read_object(path, "remove it: it is for reading only")
    checkpoint.write_text(path, json.dumps(environment | facts, indent=2) + "\n")


def noted(folder: Path, fact: str) -> str | None:
    """What `note` noted; None where nothing is."""
    try:
        found = read_object(folder / "environment.json").get(fact)
    except UserError:
        return None
    return found if isinstance(found, str) else None


def unannounced(recipe: Recipe) -> list[list[str]]:
    """[kind, name, module] of strategies that no installed package brings: of a cell, a script, a file beside it."""
    classes = {type(part) for _, part in walk(recipe)}
    kinds = [(kind, cls) for kind in FOLDERS for cls in classes if registry(kind).name_of(cls) is not None]
    return sorted([k, str(registry(k).name_of(c)), c.__module__] for k, c in kinds if not registry(k).is_announced(c))


def not_known_here(folder: Path) -> RecipeError | None:
    """What to say where a run's recipe cannot be read because it names what was `unannounced` where it began."""
    try:
        noted = read_object(folder / "environment.json").get("unannounced")
    except UserError:
        return None
    for entry in noted if isinstance(noted, list) else ():
        if not (isinstance(entry, list) and len(entry) == 3 and all(isinstance(word, str) for word in entry)):
            continue
        kind, name, module = entry
        if kind in FOLDERS and name not in registry(kind).names():
            return RecipeError(
                f"unknown {kind} '{name}', which is defined in {_home(module)}",
                place=str(folder),
                remedy=f"run or import that first, or put the class, with its imports, into {folder / 'recipe.py'}",
            )
    return None


def warnings_of(recipe: Recipe, folder: Path) -> Iterator[str]:
    """What to say as long as there is nothing to do about it yet."""
    if not (folder / "recipe.py").is_file():
        for kind, name, module in unannounced(recipe):
            remedy = f"begin with run(..., source=FILE), or put the class, with its imports, into {folder}/recipe.py"
            yield f"The {kind} '{name}' is defined in {_home(module)}: to go on with this run elsewhere, {remedy}"


def _home(module: str) -> str:
    return "a notebook's cell, or the script that was started" if module == "__main__" else f"the module {module}"


def set_aside(path: Path, why: str) -> Path | None:
    """Renames a file that is of no use any more, and returns its new name; None where there is none."""
    if not path.is_file():
        return None
    names = (path.with_name(f"{path.name}.{why}{number or ''}") for number in itertools.count())
    return path.rename(next(name for name in names if not name.exists()))


@contextmanager
def disk_trouble(folder: Path, go_on: str = "") -> Iterator[None]:
    """Says of whatever the disk refuses in a run what it was, where, and how to go on: with `go_on`, else by resuming.

    Raises:
        StorageError: in place of the OSError.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # of the terminal
    except OSError as error:
        go_on = go_on or f"go on with: robustkit resume {shlex.quote(str(folder))}"
        place, fault = error.filename or folder, error.strerror or str(error)
        if not (folder / "recipe.json").exists():
            place, fault = folder, "the run's folder is gone"
            remedy = "where it was moved, go on with robustkit resume and its new name; else begin anew"
        elif error.errno == errno.ENOSPC:
            remedy = f"free {_room_needed(folder)} there, then {go_on}"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            remedy = f"make it writable, then {go_on}"
        else:
            remedy = f"mend that, then {go_on}"
        raise StorageError(f"{place}: {fault}; {remedy}") from error


def _room_needed(folder: Path) -> str:
    """For one more checkpoint, as large as the last, and a little more."""
    last = folder / "checkpoints" / "last.safetensors"
    needed = 1.1 * (last.stat().st_size if last.is_file() else 0) + 1e6
    return f"{max(1, math.ceil((needed - shutil.disk_usage(folder).free) / 1e6))} MB"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
