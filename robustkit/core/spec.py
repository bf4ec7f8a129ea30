"""A spec is a value: frozen, keyword-only, checked when written, comparable, hashable, JSON both ways.

    @registry.register("momentum")
    @spec
    class Momentum:
        inner: TargetDistribution
        gamma: float = setting(default=0.9, at_least=0, at_most=1)

Annotations say what a field may hold: int, float, bool, str, Literal, Optional, tuple, another spec, or a *kind*: a
protocol declared with `@kind("target")`, whose values must be of a class registered for that kind. Nothing else may
appear, so a spec can never hold a live module or a tensor. Lists become tuples, whole numbers in float fields floats.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

import attrs

from robustkit.core.errors import SpecError
from robustkit.core.registry import hint, registry

T = TypeVar("T")
_KINDS: dict[type, str] = {}
_LIMITS = {
    "at_least": (lambda value, limit: value >= limit, "at least"),
    "above": (lambda value, limit: value > limit, "above"),
    "at_most": (lambda value, limit: value <= limit, "at most"),
    "below": (lambda value, limit: value < limit, "below"),
}


def kind(name: str) -> Any:
    """Class decorator: the protocol of one kind of strategy; a field annotated with it takes any registered one."""

    def declare(protocol: type) -> type:
        registry(name)
        _KINDS[protocol] = name
        return protocol

    return declare


def setting(
    *,
    default: Any = attrs.NOTHING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    location: bool = False,
    remedy: str = "",
) -> Any:
    """A field with limits (for a tuple: of each item) and a remedy for who exceeds them.

    A `location` says where things lie; it stays out of the digest.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    chosen = {name: limit for name, limit in limits.items() if limit is not None}
    return attrs.field(default=default, metadata={"limits": chosen, "location": location, "remedy": remedy})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting,))
def spec(cls: type[T]) -> type[T]:
    """Make `cls` a spec. A method `validate(self)` may check fields against each other (raise SpecError)."""

    def check(self: Any) -> None:
        problems = []
        known = hints(type(self))
        for field in attrs.fields(type(self)):
            place = f"{type(self).__name__}.{field.name}"
            try:
                value = conform(known[field.name], getattr(self, field.name), place)
                for item in value if isinstance(value, tuple) else (value,):
                    _check_limits(item, field.metadata, place)
                object.__setattr__(self, field.name, value)
            except SpecError as error:
                problems.append(str(error))
        if problems:
            raise SpecError(" | ".join(problems))
        if hasattr(self, "validate"):
            self.validate()

    cls.__attrs_post_init__ = check  # type: ignore[attr-defined]
    made: Any = attrs.define(frozen=True, kw_only=True, slots=False)(cls)
    plain_init = made.__init__

    @functools.wraps(plain_init)
    def init(self: Any, *args: Any, **settings: Any) -> None:
        names = [field.name for field in attrs.fields(made)]
        if args:
            raise SpecError("settings are given by name", place=cls.__name__, remedy=f"known: {', '.join(names)}")
        for name in settings:
            if name not in names:
                raise SpecError(f"unknown setting '{name}'", place=cls.__name__, remedy=hint(name, names))
        missing = [f.name for f in attrs.fields(made) if f.default is attrs.NOTHING and f.name not in settings]
        if missing:
            raise SpecError(f"needs a value for {', '.join(repr(name) for name in missing)}", place=cls.__name__)
        plain_init(self, **settings)

    made.__init__ = init
    return made  # type: ignore[no-any-return]


def evolve(value: T, **changes: Any) -> T:
    """`value` with some settings changed, checked anew."""
    return attrs.evolve(value, **changes)  # type: ignore[misc]


def hints(cls: type) -> dict[str, Any]:
    """Field name -> annotation of a spec class, resolved."""
    return _hints(cls)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    resolved = typing.get_type_hints(cls)
    return {field.name: resolved[field.name] for field in attrs.fields(cls)}  # class attributes are no settings


def kind_of(annotation: Any) -> str | None:
    """The kind that an annotation names ('attack' for Attack or Attack | None), or None."""
    if isinstance(annotation, type):
        return _KINDS.get(annotation)
    for part in get_args(annotation) if _is_union(annotation) else ():
        if isinstance(part, type) and part in _KINDS:
            return _KINDS[part]
    return None


def conform(annotation: Any, value: Any, place: str) -> Any:
    """`value` as the annotation wants it.

    Raises:
        SpecError: it does not fit; the line names the place and what was expected.
    """

    def refuse(expected: str, remedy: str = "") -> SpecError:
        return SpecError(f"must be {expected}, got {_shown(value)}", place=place, remedy=remedy)

    if _is_union(annotation):
        options = get_args(annotation)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in options:
            if option is type(None):
                continue
            try:
                return conform(option, value, place)
            except SpecError as error:
                errors.append(error)
        raise errors[0]
    origin = get_origin(annotation)
    if origin is Literal:
        choices = get_args(annotation)
        if value in choices and type(value) in {type(choice) for choice in choices}:
            return value
        near = hint(value if isinstance(value, str) else _shown(value), choices)
        raise refuse(" or ".join(repr(choice) for choice in choices), near)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise refuse("a list of values")
        inner = get_args(annotation)
        if len(inner) == 2 and inner[1] is Ellipsis:
            inner = (inner[0],) * len(value)
        if len(inner) != len(value):
            raise refuse(f"{len(inner)} values")
        pairs = enumerate(zip(inner, value, strict=True))
        return tuple(conform(part, item, f"{place}[{index}]") for index, (part, item) in pairs)
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise refuse("a number")
        try:
            return float(value)
        except OverflowError:
            raise refuse("a number below 1e308") from None
    if annotation is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise refuse("a whole number")
        if abs(value) >= 1 << 63:
            raise refuse("a whole number of at most 63 bits")
        return value
    if annotation in (bool, str):
        if not isinstance(value, annotation):
            raise refuse("true or false" if annotation is bool else "text")
        return value
    if annotation in _KINDS:
        names = registry(_KINDS[annotation])
        if names.name_of(type(value)) is None:
            article = "an" if names.kind[0] in "aeiou" else "a"
            raise refuse(f"{article} {names.kind}", f"known: {', '.join(names.names())}")
        return value
    if isinstance(annotation, type) and attrs.has(annotation):
        if not isinstance(value, annotation):
            raise refuse(f"a {annotation.__name__}")
        return value
    raise TypeError(f"{place}: a spec field cannot be annotated {annotation!r}")


def to_json(value: Any) -> Any:
    """A spec (or a part of one) as JSON data; a registered strategy carries its name."""
    if attrs.has(type(value)):
        data: dict[str, Any] = {}
        for known in _KINDS.values():
            if (name := registry(known).name_of(type(value))) is not None:
                data["name"] = name
                break
        return data | {field.name: to_json(getattr(value, field.name)) for field in attrs.fields(type(value))}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"  # JSON has no infinities
    return value


def from_json(annotation: Any, data: Any, place: str = "recipe") -> Any:
    """The value that `to_json` wrote for a field annotated `annotation`.

    Raises:
        SpecError, RegistryError: the data do not describe one.
    """
    if _is_union(annotation):
        if data is None:
            return conform(annotation, None, place)
        options = [option for option in get_args(annotation) if option is not type(None)]
        return from_json(options[0] if len(options) == 1 else _fitting(options, data), data, place)
    if get_origin(annotation) is tuple and isinstance(data, list):
        inner = get_args(annotation)
        parts = (inner[0],) * len(data) if len(inner) == 2 and inner[1] is Ellipsis else inner
        if len(parts) == len(data):
            return tuple(
                from_json(part, item, f"{place}[{i}]") for i, (part, item) in enumerate(zip(parts, data, strict=True))
            )
    if annotation in _KINDS:
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            raise SpecError("must be an object with a name", place=place)
        cls = registry(_KINDS[annotation]).get(data["name"])
        data = {key: item for key, item in data.items() if key != "name"}
    elif isinstance(annotation, type) and attrs.has(annotation):
        cls = annotation
    else:
        if annotation is float and data in ("inf", "-inf"):
            return float(data)
        return conform(annotation, data, place)
    if not isinstance(data, dict):
        raise SpecError("must be an object", place=place)
    known = hints(cls)
    settings = {}
    for key, item in data.items():
        if key not in known:
            raise SpecError(f"unknown setting '{key}'", place=place, remedy=hint(key, known))
        settings[key] = from_json(known[key], item, f"{place}.{key}")
    return cls(**settings)


def canonical(value: Any) -> str:
    """Canonical JSON text: sorted keys, no blanks, defaults included, locations left out."""
    return json.dumps(_without_locations(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of the sha256 of the canonical JSON: equal values, equal digest."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:12]


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every spec inside `value`, itself included, with its dotted path."""
    if attrs.has(type(value)):
        yield path, value
        for field in attrs.fields(type(value)):
            yield from walk(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from walk(item, f"{path}.{index}")


def flatten(data: Any, path: str = "") -> dict[str, Any]:
    """JSON data as {dotted path: leaf}, for showing and comparing recipes."""
    if isinstance(data, dict):
        items = [(path if key == "name" else f"{path}.{key}".lstrip("."), item) for key, item in data.items()]
    elif isinstance(data, list) and any(isinstance(item, (dict, list)) for item in data):
        items = [(f"{path}.{index}", item) for index, item in enumerate(data)]
    else:
        return {path: data}
    leaves: dict[str, Any] = {}
    for key, item in items:
        leaves |= flatten(item, key)
    return leaves


def _without_locations(value: Any) -> Any:
    data = to_json(value)
    if attrs.has(type(value)):
        for field in attrs.fields(type(value)):
            if field.metadata.get("location"):
                data.pop(field.name)
            else:
                data[field.name] = _without_locations(getattr(value, field.name))
    elif isinstance(value, tuple):
        data = [_without_locations(item) for item in value]
    return data


def _check_limits(value: Any, metadata: Mapping[str, Any], place: str) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        for name, limit in metadata.get("limits", {}).items():
            holds, words = _LIMITS[name]
            if not holds(value, limit):  # type: ignore[no-untyped-call]
                fault = f"must be {words} {limit:g}, got {value:g}"
                raise SpecError(fault, place=place, remedy=metadata.get("remedy", ""))


def _shown(value: Any) -> str:
    """At most 60 characters of it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits; a deep list
        return f"{type(value).__name__} that is too large to show"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _fitting(options: list[Any], data: Any) -> Any:
    for option in options:
        try:
            from_json(option, data)
            return option
        except SpecError:
            continue
    return options[0]
