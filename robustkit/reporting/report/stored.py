"""What a run's folder holds, read for a report: what is damaged is left out and named, nothing is computed."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, TypeVar

import attrs

from robustkit.core import checkpoint
from robustkit.core.errors import CheckpointError, UserError
from robustkit.core.reading import parse_json
from robustkit.core.recipe import Recipe, result_key
from robustkit.folder import CHECKPOINTS
from robustkit.opening import recipe_of
from robustkit.reporting.comparison import Item, short_names
from robustkit.reporting.report.shapes import (
    Each,
    Maybe,
    amount,
    bits,
    count,
    counted,
    fits,
    number,
    positive,
    share,
    text,
)

T = TypeVar("T")

RESULT = {
    "accuracy": share,
    "n": counted,
    "ci95": (share, share),
    "seconds": amount,
    "path": Maybe(text),
    "breakdown": Maybe(Each(share)),
    "shares": Maybe(Each(Each(number))),
    "notes": Maybe([text]),
}
OUTCOMES = {"images": text, "right": bits}
REPORT = {
    "epoch": counted,
    "lr": number,
    "step": Maybe(count),
    "seconds": Maybe(amount),
    "images_per_second": Maybe(amount),
    "train": {"objective": number, "epsilon": Maybe(amount)},
    "radii": Maybe({"unit": positive, "counts": [count]}),
    "validation": Maybe(Each(share)),
    "training": Maybe(Each(share)),
    "collapse": Maybe({"epoch": count, "robust": share, "fgsm": share}),
}
FINDING = {"check": text, "verdict": text, "evidence": text, "remedy": text}
AUDIT = {"verdict": text, "images": count, "right": count, "findings": [FINDING]}
CLASS = {"name": text, "accuracy": share, "ci95": (share, share), "n": count}
CURVE = {
    "along": text,
    "key": text,
    "values": [amount],
    "accuracies": [share],
    "ci95": [(share, share)],
    "n": count,
    "norm": text,
    "epsilon": amount,
}
PICTURE = {"image": text, "predicted": Maybe(text), "probability": Maybe(share)}
EXAMPLES = {"true": [text], "rows": [{"label": text, "pictures": [PICTURE]}], "norm": text, "epsilon": amount}
FACTS = {"step": count, "epoch": count, "best": {"epoch": Maybe(count), "collapse": Maybe(count)}}
PNG = b"\x89PNG\r\n\x1a\n"


@attrs.frozen
class StoredRun:
    """A run as its folder tells of it.

    Attributes:
        path: the folder, as it was given; name: the same without what all runs of the report share.
        item: the recipe with its results and outcomes, for comparisons.
        reports: a line of metrics.jsonl for each epoch, in order.
        facts: of the last checkpoint: how far training is; None where there is none.
        faults: what could not be read, a sentence each.
        changed: when the newest of the files was written, in seconds since 1970.
    """

    path: str
    name: str
    item: Item
    reports: tuple[dict[str, Any], ...]
    facts: dict[str, Any] | None
    environment: dict[str, Any]
    audits: dict[str, dict[str, Any]]
    curves: dict[str, Any]
    preflight: tuple[dict[str, Any], ...] | None
    examples: dict[str, Any] | None
    picture: str | None
    under_way: bool
    control: StoredRun | None
    faults: tuple[str, ...]
    changed: float

    @property
    def recipe(self) -> Recipe:
        return self.item.recipe

    @property
    def results(self) -> dict[str, Any]:
        return self.item.results

    @property
    def finished(self) -> bool:
        """Whether training has come to its end."""
        best = {} if self.facts is None else self.facts["best"]
        reached = self.facts is not None and self.facts["epoch"] >= self.recipe.epochs
        return reached or self.recipe.validation.ended_by(best)

    @property
    def unmeasured(self) -> list[str]:
        """What the recipe asks for and results.json lacks: "autoattack", "best: autoattack"."""
        wanted = [result_key(suite, measure) for suite, measure in self.recipe.measures()]
        found = []
        for name in CHECKPOINTS:
            if name == "last" or Path(self.path, "checkpoints", f"{name}.safetensors").is_file():
                held = self.results.get(name, {})
                found += [key if name == "last" else f"{name}: {key}" for key in wanted if key not in held]
        return found

    @property
    def texts(self) -> dict[str, str]:
        """The facts of the environment that are plain text."""
        return {key: value for key, value in self.environment.items() if isinstance(value, str)}


def read_runs(paths: list[str]) -> list[StoredRun]:
    """What the folders hold.

    Raises:
        RecipeError: one is no run, or its recipe cannot be read.
    """
    return [_read(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def _read(path: str, name: str) -> StoredRun:
    folder = Path(path)
    recipe = recipe_of(folder)
    reader = _Reader(folder)
    results = reader.parts("results.json", 2, RESULT)
    outcomes = reader.parts("outcomes.json", 2, OUTCOMES)
    control = None
    if (folder / "control" / "recipe.json").is_file():
        try:
            control = _read(str(folder / "control"), f"{name}, control")
        except UserError as error:
            reader.faults.append(f"The control cannot be read: {error}.")
    environment = reader.json("environment.json")
    found = reader.json("preflight.json")
    if found is not None and not fits(found, [FINDING]):
        found = reader.refuse("preflight.json", None)
    drawn = reader.json("examples.json")
    return StoredRun(
        path=path,
        name=name,
        item=Item(path, recipe, True, results, outcomes),
        reports=reader.reports(),
        facts=reader.facts(),
        environment=environment if isinstance(environment, dict) else {},
        audits=reader.parts("audit.json", 1, AUDIT),
        curves=_curves(reader),
        preflight=None if found is None else tuple(found),
        examples=drawn if drawn is None or _drawn(drawn) else reader.refuse("examples.json", None),
        picture=reader.picture("figures/examples.png"),
        under_way=any((folder / "evaluation").glob("*")),
        control=control,
        faults=tuple(reader.faults),
        changed=max([reader.changed] + ([] if control is None else [control.changed])),
    )


class _Reader:
    """Reads files of a folder; keeps what is wrong with them, and when the newest was written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[str] = []
        self.changed = (folder / "recipe.json").stat().st_mtime

    def bytes(self, name: str) -> bytes | None:
        path = self.folder / name
        try:
            if not path.is_file():
                return None
            self.changed = max(self.changed, path.stat().st_mtime)
            return path.read_bytes()
        except OSError as error:
            self.faults.append(f"{name} cannot be read: {error.strerror}.")
            return None

    def json(self, name: str) -> Any:
        """None where there is none."""
        held = self.bytes(name)
        try:
            return None if held is None else parse_json(held.decode())
        except ValueError:
            return self.refuse(name, None)

    def refuse(self, name: str, instead: T) -> T:
        self.faults.append(f"{name} is damaged: what it should hold is left out, in whole or in part.")
        return instead

    def parts(self, name: str, depth: int, shape: Any) -> dict[str, Any]:
        """{key: ... {key: part}}, `depth` keys deep, of those parts that have the shape."""
        data = self.json(name)
        if data is None:
            return {}
        kept = _kept(data, depth, shape)
        return kept if kept == data else self.refuse(name, kept)

    def reports(self) -> tuple[dict[str, Any], ...]:
        """Lines of metrics.jsonl, one for each epoch; a last line that is cut off belongs to a kill."""
        lines = (self.bytes("metrics.jsonl") or b"").splitlines()
        found: dict[int, dict[str, Any]] = {}
        for line in lines:
            try:
                data = parse_json(line.decode())
            except ValueError:
                data = None
            if fits(data, REPORT):
                found[data["epoch"]] = data
        if len(found) < len(lines):
            self.refuse("metrics.jsonl", None)
        return tuple(found[epoch] for epoch in sorted(found))

    def facts(self) -> dict[str, Any] | None:
        path = self.folder / "checkpoints" / "last.safetensors"
        if not path.is_file():
            return None
        try:
            facts = checkpoint.facts_of(path)
        except CheckpointError:
            facts = {}
        return facts if fits(facts, FACTS) else self.refuse("checkpoints/last.safetensors", None)

    def picture(self, name: str) -> str | None:
        """A PNG file in base 64."""
        held = self.bytes(name)
        if held is not None and not held.startswith(PNG):
            held = self.refuse(name, None)
        return None if held is None else base64.b64encode(held).decode()


def _kept(data: Any, depth: int, shape: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        return {}
    if depth == 1:
        return {key: value for key, value in data.items() if fits(value, shape)}
    parts = {key: _kept(value, depth - 1, shape) for key, value in data.items()}
    return {key: part for key, part in parts.items() if part or data[key] == {}}


def _curves(reader: _Reader) -> dict[str, Any]:
    data = reader.json("curves.json")
    if data is None:
        return {}
    if not isinstance(data, dict):
        return reader.refuse("curves.json", {})
    kept = {name: curve for name, curve in data.items() if _is_curve(name, curve)}
    return kept if len(kept) == len(data) else reader.refuse("curves.json", kept)


def _is_curve(name: str, data: Any) -> bool:
    if name == "classes":
        lengths = {len(entries) for entries in data.values()} if fits(data, Each([CLASS])) else set()
        return len(lengths) == 1
    return fits(data, CURVE) and 0 < len(data["values"]) == len(data["accuracies"]) == len(data["ci95"])


def _drawn(data: Any) -> bool:
    """Whether it is what `robustkit.reporting.figures` stores: rows as long as there are images, all of them PNG."""
    if not fits(data, EXAMPLES):
        return False
    pictures = [picture for row in data["rows"] for picture in row["pictures"]]
    return all(len(row["pictures"]) == len(data["true"]) for row in data["rows"]) and all(
        base64_png(picture["image"]) for picture in pictures
    )


def base64_png(data: str) -> bool:
    try:
        return base64.b64decode(data, validate=True).startswith(PNG)
    except ValueError:
        return False
