"""What a recipe is made of: every setting and where it comes from, what a step costs, what changes over training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import attrs
import torch
from rich.console import Console
from rich.table import Table

from robustkit.core.batch import Passes, Progress
from robustkit.core.recipe import Recipe
from robustkit.core.registry import FOLDERS, registry
from robustkit.core.spec import digest, evolve, flatten, to_json
from robustkit.reporting import consoles, formats
from robustkit.reporting.tables import plain_table

NOMINAL_STEPS = 100
"""Steps per epoch in schedules that are shown without loading the data."""

_STYLES = {"set": "cyan", "override": "bold yellow"}


class Row(NamedTuple):
    """One setting; `origin` is "default", "set" (by the recipe file) or "override", `note` what it would be else."""

    depth: int
    name: str
    value: str
    origin: str = "default"
    note: str = ""


class Phase(NamedTuple):
    """Epochs `first` to `last`, counted from 1, whose steps cost the same."""

    first: int
    last: int
    parts: dict[str, Passes]
    total: Passes


class Overview(NamedTuple):
    """A recipe in one line; `units` of a step, in each phase of training."""

    recipe: str
    data: str
    attack: str
    target: str
    loss: str
    epochs: int
    units: str
    digest: str


def overview(file: str, name: str, recipe: Recipe) -> Overview:
    """The line of the recipe that `file` defines under that name ("": the one without)."""
    data, attack, target, loss = (_name(x) or "none" for x in (recipe.data, recipe.attack, recipe.target, recipe.loss))
    units = " / ".join(f"{phase.total.units:.4g}" for phase in phases(recipe))
    address = f"{file}:{name}" if name else file
    return Overview(address, data, attack, target, loss, recipe.epochs, units, digest(recipe))


def rows(recipe: Recipe, before: Recipe) -> Iterator[Row]:
    """Every setting of `recipe`, in the order of its fields; `before` is the recipe without overrides."""
    kind: Any = type(recipe)
    for field in attrs.fields(kind):
        if field.name != "control":
            yield from _field(field.name, getattr(recipe, field.name), _default(field), getattr(before, field.name), 0)
    if recipe.control is None:
        yield Row(0, "control", "none")
        return
    yield Row(0, "control", "as above, except")
    above, old = _leaves(recipe), _leaves(before.control or before)
    for path, value in _leaves(recipe.control).items():
        if path in old and value != old[path]:
            yield Row(1, path, _leaf(path, value), "override", f"override, recipe says {_leaf(path, old[path])}")
        elif value != above.get(path):
            yield Row(1, path, _leaf(path, value), "set", f"above {_leaf(path, above.get(path))}")


def phases(recipe: Recipe) -> list[Phase]:
    """Consecutive epochs whose steps cost the same, on average, together."""
    found: list[Phase] = []
    for epoch in range(recipe.epochs):
        parts = recipe.mean_passes(Progress.at(epoch * NOMINAL_STEPS, recipe.epochs, NOMINAL_STEPS))
        if found and found[-1].parts == parts:
            found[-1] = found[-1]._replace(last=epoch + 1)
        else:
            found.append(Phase(epoch + 1, epoch + 1, parts, sum(parts.values(), Passes())))
    return found


def parameter_count(recipe: Recipe) -> int | None:
    """Parameters of backbone and head, None where that takes knowing the data. No memory is used for the weights."""
    shape, classes = recipe.data.facts
    if shape is None or classes is None:
        return None
    with torch.device("meta"), torch.random.fork_rng(()):
        model = evolve(recipe.model, pretrained=False).build(recipe.head, classes, shape, recipe.seed)
    return sum(parameter.numel() for parameter in model.parameters())


def to_data(recipe: Recipe) -> dict[str, Any]:
    """The same as JSON data."""
    return {
        "digest": digest(recipe),
        "parameters": parameter_count(recipe),
        "passes": [
            {
                "epochs": [phase.first, phase.last],
                "parts": {name: _passes_data(passes) for name, passes in phase.parts.items()},
                "step": _passes_data(phase.total),
            }
            for phase in phases(recipe)
        ],
        "recipe": to_json(recipe),
    }


def print_composition(console: Console, recipe: Recipe, before: Recipe, title: str) -> None:
    """Settings, costs, schedules."""
    parameters = parameter_count(recipe)
    size = "" if parameters is None else f", {parameters:,} parameters"
    console.print(f"{title}: digest {digest(recipe)}{size}", style="bold", soft_wrap=True)
    console.print(_settings_table(recipe, before))
    console.print(_passes_table(recipe))
    for label, values, ends in _courses(recipe):
        console.print(f"{label}: {ends}")
        for line in formats.course(values, width=console.width - 1, ascii_only=console.options.ascii_only):
            console.print(line)


def recipe_as_html(recipe: Recipe) -> str:
    """The same as a notebook shows it."""
    return consoles.as_html(lambda console: print_composition(console, recipe, recipe, "Recipe"))


def _field(name: str, value: Any, default: Any, before: Any, depth: int) -> Iterator[Row]:
    """The rows of one field; `default` and `before` are NOTHING where there is nothing to compare with."""
    if isinstance(value, tuple) and any(attrs.has(type(item)) for item in value):
        yield Row(depth, name, "")
        old = before if isinstance(before, tuple) and len(before) == len(value) else (attrs.NOTHING,) * len(value)
        for number, (item, was) in enumerate(zip(value, old, strict=True)):
            if _name(item) is None:
                yield from _field(str(number), item, attrs.NOTHING, was, depth + 1)
            else:  # measures: a line each
                yield _compared(depth + 1, str(number), item, attrs.NOTHING, was, _line)
    elif attrs.has(type(value)):
        same = type(before) is type(value)
        yield _compared(depth, name, type(value), _type(default), _type(before), _type_name)
        for field in attrs.fields(type(value)):
            was = getattr(before, field.name) if same else attrs.NOTHING
            yield from _field(field.name, getattr(value, field.name), _default(field), was, depth + 1)
    else:
        yield _compared(depth, name, value, default, before, lambda item: _leaf(name, to_json(item)))


def _compared(depth: int, name: str, value: Any, default: Any, before: Any, show: Any) -> Row:
    if before is not attrs.NOTHING and before != value:
        return Row(depth, name, show(value), "override", f"override, recipe says {show(before)}")
    if default is not attrs.NOTHING and default != value:
        return Row(depth, name, show(value), "set", f"default {show(default)}")
    return Row(depth, name, show(value))


def _type(value: Any) -> Any:
    """What is compared where a strategy stands: its class, or None, or NOTHING."""
    return type(value) if attrs.has(type(value)) else value


def _type_name(cls: Any) -> str:
    return "none" if cls is None else _registered(cls) or ""


def _registered(cls: type) -> str | None:
    return next((name for kind in FOLDERS if (name := registry(kind).name_of(cls)) is not None), None)


def _name(value: Any) -> str | None:
    return _registered(type(value)) if attrs.has(type(value)) else None


def _default(field: Any) -> Any:
    return field.default.factory() if isinstance(field.default, attrs.Factory) else field.default  # type: ignore[arg-type]


def _line(strategy: Any) -> str:
    """A strategy and all its settings on one line."""
    data = flatten(to_json(strategy))
    return " ".join([data.pop(""), *(f"{name}={_leaf(name, value)}" for name, value in data.items())])


def _leaf(path: str, value: Any) -> str:
    return formats.setting(path.rpartition(".")[2], value)


def _leaves(recipe: Recipe) -> dict[str, Any]:
    return flatten(to_json(evolve(recipe, control=None)))


def _passes_data(passes: Passes) -> dict[str, float]:
    counts = attrs.asdict(passes) | {"units": passes.units}
    return {name: int(n) if n == int(n) else round(n, 4) for name, n in counts.items()}


def _settings_table(recipe: Recipe, before: Recipe) -> Table:
    table = plain_table("Setting", "Value", "Otherwise")
    for row in rows(recipe, before):
        style = "bold" if row.depth == 0 else ""
        table.add_row(f"{'  ' * row.depth}{row.name}", row.value, row.note, style=_STYLES.get(row.origin, style))
    return table


def _passes_table(recipe: Recipe) -> Table:
    table = plain_table(title="Passes over the batch in one step (units of one forward)")
    table.add_column("Epochs")
    table.add_column("Part")
    for heading in ("Forward", "Input backward", "Parameter backward", "Units"):
        table.add_column(heading, justify="right")
    for phase in phases(recipe):
        epochs = f"{phase.first}-{phase.last}" if phase.last > phase.first else f"{phase.first}"
        for name, passes in phase.parts.items():
            if passes.units:
                table.add_row(epochs, name, *_counts(passes))
                epochs = ""
        table.add_row(epochs, "all", *_counts(phase.total), style="bold", end_section=True)
    return table


def _counts(passes: Passes) -> list[str]:
    return [f"{n:.4g}" for n in (passes.forward, passes.input_backward, passes.parameter_backward, passes.units)]


def _courses(recipe: Recipe) -> Iterator[tuple[str, list[float], str]]:
    """(label, values, range) of what changes over training: radius and learning rate; no values: it does not change."""
    starts = [Progress.at(epoch * NOMINAL_STEPS, recipe.epochs, NOMINAL_STEPS) for epoch in range(recipe.epochs)]
    value = getattr(recipe.epsilon, "value", attrs.NOTHING)
    if callable(value):
        steps = [Progress.at(step, recipe.epochs, NOMINAL_STEPS) for step in range(min(60, starts[-1].total_steps))]
        by_step = value(steps[0]) != value(steps[1])
        radii = [value(progress) for progress in (steps if by_step else starts)]
        label = "Radius in the first steps" if by_step else "Radius by epoch"
        yield label, radii, f"{formats.in_255ths(min(radii))} to {formats.in_255ths(max(radii))}"
    elif (value is None or isinstance(value, float)) and recipe.attack is not None:
        radius = recipe.threat.epsilon if value is None else value
        yield "Radius in every epoch", [], formats.in_255ths(radius)
    rates = [recipe.optimizer.lr * recipe.schedule(progress).lr_scale for progress in starts]
    yield "Learning rate by epoch", rates, f"{min(rates):.3g} to {max(rates):.3g}"
