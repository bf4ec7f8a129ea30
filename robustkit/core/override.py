"""`threat.epsilon=4/255 target.inner=inverse`: typed changes to a recipe from the command line.

Words are applied left to right: a strategy's name replaces that part by its defaults, a dotted path changes one
setting of what stands there then. Values are literals with + - * /; nothing is evaluated. Each object is rebuilt once,
from the leaf up, after all of its changes are known, so that two changes which only fit together are accepted.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

import attrs

from robustkit.core.errors import RegistryError, SpecError
from robustkit.core.registry import hint, registry
from robustkit.core.spec import conform, hints, kind_of

T = TypeVar("T")
_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LARGEST = 1 << 1000  # no sum or product of whole numbers grows beyond: they would cost time and memory
_WORDS = {"none": None, "true": True, "false": False}


def override(recipe: T, words: Sequence[str]) -> T:
    """`recipe` with the changes that `words` ("path=value") ask for.

    Raises:
        SpecError, RegistryError: the path is unknown, or the value does not fit; the line names the path.
    """
    edits = []
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise SpecError("an override reads path=value", place=repr(word), remedy="e.g. threat.epsilon=4/255")
        edits.append((path.split("."), text))
    return _rebuild(recipe, edits, "") if edits else recipe


def literal(text: str) -> Any:
    """A Python literal (numbers may be combined with + - * /), or None, true, false in any case.

    Raises:
        ValueError: it is none of these.
    """
    if text.strip().lower() in _WORDS:
        return _WORDS[text.strip().lower()]
    try:
        with warnings.catch_warnings():  # Python has opinions on '\d' and 0x1for
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval")
        return _value(tree.body)
    except (SyntaxError, RecursionError, ZeroDivisionError, OverflowError, MemoryError) as error:
        raise ValueError(text) from error


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(_value(item) for item in items)
        case ast.UnaryOp(op=ast.USub(), operand=operand) if isinstance(number := _value(operand), (int, float)):
            return -number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left), _value(right)
            if isinstance(a, (int, float)) and isinstance(b, (int, float)):
                number = _OPERATORS[type(op)](a, b)
                if abs(number) < _LARGEST or isinstance(number, float):
                    return number
        case ast.Name(id=name) if name in ("inf", "nan"):
            return float(name)
    raise ValueError("not a literal")


def _rebuild(node: Any, edits: list[tuple[list[str], str]], path: str) -> Any:
    """`node` with `edits` (paths relative to it) made."""
    if isinstance(node, tuple):
        return _rebuild_tuple(node, edits, path)
    if not attrs.has(type(node)):
        where = ".".join([path, *edits[0][0]]).strip(".")
        raise SpecError(f"there is nothing below '{path}', which is {node!r}", place=where)
    known = hints(type(node))
    changes: dict[str, Any] = {}
    nested: dict[str, list[tuple[list[str], str]]] = {}
    for (name, *rest), text in edits:
        place = f"{path}.{name}".strip(".")
        if name not in known:
            remedy = hint(place, [f"{path}.{other}".strip(".") for other in known])
            raise SpecError(f"{type(node).__name__} has no setting '{name}'", place=place, remedy=remedy)
        if rest:
            nested.setdefault(name, []).append((rest, text))
        else:
            nested.pop(name, None)  # a later replacement makes earlier changes below it void
            changes[name] = _parse(known[name], text, place)
    for name, below in nested.items():
        changes[name] = _rebuild(changes.get(name, getattr(node, name)), below, f"{path}.{name}".strip("."))
    try:
        return attrs.evolve(node, **changes)
    except SpecError as error:
        raise SpecError(str(error), place=path) if path else error from None


def _rebuild_tuple(node: tuple[Any, ...], edits: list[tuple[list[str], str]], path: str) -> tuple[Any, ...]:
    places = {str(index): index for index in range(len(node))}
    nested: dict[int, list[tuple[list[str], str]]] = {}
    for (name, *rest), text in edits:
        if name not in places or not rest:
            remedy = f"e.g. {path}.0.<setting>=..." if node else ""
            raise SpecError(f"{name[:20]!r} is not one of its {len(node)} places", place=path, remedy=remedy)
        nested.setdefault(places[name], []).append((rest, text))
    items = enumerate(node)
    return tuple(_rebuild(item, nested[i], f"{path}.{i}") if i in nested else item for i, item in items)


def _parse(annotation: Any, text: str, place: str) -> Any:
    """The value of one field, from text."""
    kind = kind_of(annotation)
    options = [option for option in get_args(annotation) if option is not type(None)]
    optional = len(options) < len(get_args(annotation))
    if kind is not None:
        if optional and text.strip().lower() == "none":
            return None
        try:
            return registry(kind).get(text)()
        except (SpecError, RegistryError) as error:
            raise type(error)(str(error), place=place) from None
    if annotation is str or str in options or get_origin(annotation) is Literal:
        try:
            value = literal(text)
        except ValueError:
            value = text
        if annotation is str or (get_origin(annotation) is Literal and text in get_args(annotation)):
            value = value if isinstance(value, str) else text
        elif str in options and value is not None and not isinstance(value, str):
            value = text
        return conform(annotation, value, place)
    try:
        value = literal(text)
    except ValueError:
        value = float(text) if text.strip() in ("-inf", "inf") else text
    if get_origin(annotation) is tuple and not isinstance(value, tuple):
        value = (value,)
    return conform(annotation, value, place)
