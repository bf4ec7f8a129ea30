"""What every strategy must be: a value with all that its protocol asks for."""

from __future__ import annotations

import inspect
import json
from typing import Any

import attrs
from torch import Tensor, nn

from robustkit.core.registry import FOLDERS, registry
from robustkit.core.spec import digest, evolve, from_json, to_json, walk
from robustkit.core.strategy import (
    Attack,
    Dataset,
    EpsilonRuntime,
    EpsilonSchedule,
    Head,
    LossRuntime,
    Measure,
    Objective,
    Optimizer,
    OuterLoss,
    Schedule,
    TargetDistribution,
    TargetRuntime,
    ThreatModel,
    WeightAverage,
    WeightPerturbation,
)
from robustkit.testing.common import name_of

PROTOCOLS: dict[str, Any] = {
    "threat": ThreatModel,
    "epsilon": EpsilonSchedule,
    "attack": Attack,
    "objective": Objective,
    "target": TargetDistribution,
    "head": Head,
    "loss": OuterLoss,
    "weights": WeightPerturbation,
    "average": WeightAverage,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "dataset": Dataset,
    "measure": Measure,
}
"""Kind -> its protocol."""

RUNTIMES: dict[str, Any] = {"epsilon": EpsilonRuntime, "target": TargetRuntime, "loss": LossRuntime}
"""Kind -> the protocol of what does the work: the spec itself where it has no `build`."""


def kind_of(strategy: Any) -> str:
    """The kind that the strategy's class is registered for."""
    for kind in FOLDERS:
        if registry(kind).name_of(type(strategy)) is not None:
            return kind
    raise AssertionError(
        f"{type(strategy).__name__} is registered for no kind: "
        f'put @registry("attack").register("its-name") (or another kind) above @spec'
    )


def check_spec(strategy: Any) -> None:
    """A frozen, hashable value that survives JSON and has all that its protocol asks for."""
    kind, who = kind_of(strategy), name_of(strategy)
    fields = attrs.fields(type(strategy))
    missing = [name for name in _members(PROTOCOLS[kind]) if not hasattr(strategy, name)]
    if hasattr(strategy, "build") and "__call__" in missing:  # what it builds is called
        missing.remove("__call__")
    remedy = f"see core.strategy.{PROTOCOLS[kind].__name__}"
    assert not missing, f"{who} is registered as {kind}, but has no {', '.join(missing)}; {remedy}"
    _check_signatures(strategy, PROTOCOLS[kind])
    if not hasattr(strategy, "build"):
        _check_signatures(strategy, RUNTIMES.get(kind, PROTOCOLS[kind]))
    for field in fields:
        try:
            setattr(strategy, field.name, getattr(strategy, field.name))
        except attrs.exceptions.FrozenInstanceError:
            continue
        raise AssertionError(f"{who}: the setting {field.name} can be changed: decorate the class with @spec")
    again = from_json(PROTOCOLS[kind], json.loads(json.dumps(to_json(strategy), allow_nan=False)))
    assert again == strategy, f"{who} comes back from JSON as {again!r}"
    assert hash(again) == hash(strategy), f"{who}: equal settings have different hashes"
    assert digest(again) == digest(strategy), f"{who}: equal settings have different digests"
    assert evolve(strategy) == strategy, f"{who} is not equal to a copy of itself"
    for path, part in walk(strategy):
        for name, value in vars(part).items():
            assert not isinstance(value, (Tensor, nn.Module)), f"{who} holds a tensor or module, {path}.{name}"


def _members(protocol: Any) -> list[str]:
    names = [name for name, value in vars(protocol).items() if not name.startswith("_") and value is not None]
    return [*names, "__call__"] if "__call__" in vars(protocol) else names


def _check_signatures(strategy: Any, protocol: Any) -> None:
    """Each of its methods can be called as the protocol's is: in that order, keyword-only ones by name."""
    for name, function in vars(protocol).items():
        if not inspect.isfunction(function) or (name.startswith("_") and name != "__call__"):
            continue
        if not hasattr(strategy, name):  # what it builds has it
            continue
        _, *wanted = inspect.signature(function).parameters.values()
        keywords = {p.name: p.default for p in wanted if p.kind is inspect.Parameter.KEYWORD_ONLY}
        own = inspect.signature(getattr(strategy, name))
        try:
            own.bind(*(p.name for p in wanted if p.name not in keywords), **keywords)
        except TypeError as error:
            takes, asked = (", ".join(parameters) for parameters in (own.parameters, [p.name for p in wanted]))
            fault = f"{type(strategy).__name__}.{name} is called with ({asked}), but takes ({takes})"
            raise AssertionError(f"{fault}; see core.strategy.{protocol.__name__}") from error
