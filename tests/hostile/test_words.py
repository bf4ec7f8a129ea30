"""Overrides and recipes that nobody would write: refused as mistakes are, or taken as they stand."""

from __future__ import annotations

import ast
import json
import math
import operator
from typing import Any

import pytest
from corpus import in_time
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robustkit.core.errors import UserError
from robustkit.core.override import literal, override
from robustkit.core.recipe import Recipe
from robustkit.core.registry import FOLDERS, registry
from robustkit.core.spec import canonical, digest, flatten, from_json, to_json
from robustkit.datasets import ImageFolder
from robustkit.epsilons import ECAS
from robustkit.losses import Align
from robustkit.targets import Momentum
from robustkit.testing import tiny_recipe
from robustkit.weights import AWP

BOUNDED = settings(max_examples=100, deadline=None, derandomize=True, database=None)
BASE = tiny_recipe(
    data=ImageFolder(root="photos"), loss=Align(), target=Momentum(), epsilon=ECAS(), weights=AWP(), epochs=100
)
LEAVES = {path: value for path, value in flatten(to_json(BASE)).items() if path}
NAMES = [name for kind in FOLDERS for name in registry(kind).names()]

numbers = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(repr),
    st.sampled_from(["1e400", "-0.0", "0x7f", "1_000", "9" * 400, "0x" + "f" * 3600, "1" * 4400, "1j", "08", "1e-400"]),
)
sums = st.recursive(
    numbers,
    lambda inner: st.builds(lambda a, sign, b: f"({a}){sign}({b})", inner, st.sampled_from("+-*/%"), inner),
    max_leaves=5,
)
texts = st.one_of(
    numbers,
    sums,
    st.text(max_size=20),
    st.text(alphabet="0123456789+-*/.,()[]{}'\"\\ eExXnoijr_", max_size=15),
    st.sampled_from(
        ["none", "None", "true", "FALSE", "inf", "-inf", "nan", "'a'", '"\\d"', "0x1for 2", "()", "[]", "(1,)"]
    ),
    st.sampled_from(NAMES),
)
paths = st.one_of(
    st.sampled_from([*LEAVES, *{path.rpartition(".")[0] for path in LEAVES if "." in path}]),
    st.text(alphabet="abcdefgpt._019", max_size=12),
    st.builds(
        lambda path, more: f"{path}.{more}", st.sampled_from(list(LEAVES)), st.sampled_from(["x", "0", "", "__class__"])
    ),
)
words = st.one_of(st.builds(lambda path, text: f"{path}={text}", paths, texts), st.text(max_size=20))


def changed(word: str, *more: str) -> Recipe | None:
    """The recipe with that change; None where it is refused, as users' mistakes are."""
    try:
        with in_time():
            return override(BASE, [word, *more])
    except UserError:
        return None


@BOUNDED
@given(word=words)
@example(word="data.root='\\d'")
@example(word="epochs=0x" + "f" * 3600)
@example(word="loss.weight=1if 0else 2")
def test_a_word_changes_what_it_names(word: str) -> None:
    """No other setting, and to something that survives being written down."""
    found = changed(word)
    if found is None:
        return
    path = word.partition("=")[0]
    before, after = flatten(to_json(BASE)), flatten(to_json(found))
    differing = {key for key in {*before, *after} if before.get(key, math.nan) != after.get(key, math.nan)}
    assert all(f"{key}.".startswith(f"{path}.") for key in differing), differing
    again = from_json(Recipe, json.loads(json.dumps(to_json(found))))
    assert (
        again == found
        and digest(again) == digest(found)
        and (digest(found) == digest(BASE)) == (canonical(found) == canonical(BASE))
    )


@BOUNDED
@given(values=st.lists(words, min_size=2, max_size=4))
def test_several_words(values: list[str]) -> None:
    found = changed(*values)
    if found is not None:
        assert from_json(Recipe, json.loads(json.dumps(to_json(found)))) == found


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@BOUNDED
@given(
    a=st.one_of(st.integers(0, 1000), st.floats(0, 1e6)),
    sign=st.sampled_from("+-*/"),
    b=st.one_of(st.integers(1, 1000), st.floats(1e-6, 1e6)),
    path=st.sampled_from(["loss.weight", "optimizer.lr", "threat.epsilon", "epsilon.h_low", "epochs", "batch_size"]),
)
def test_numbers_are_what_they_say(a: Any, sign: str, b: Any, path: str) -> None:
    """As Python reckons, which is asked here without our parser; and whole where whole numbers are asked for."""
    wanted = OPERATORS[sign](a, b)
    found = changed(f"{path}={a!r}{sign}{b!r}")
    if found is not None:
        value = flatten(to_json(found))[path]
        assert value == wanted and type(value) is (int if path in ("epochs", "batch_size") else float)
    elif path == "loss.weight":  # it takes any number that is not negative
        assert wanted < 0 or not math.isfinite(wanted)


@BOUNDED
@given(text=st.text(max_size=30))
@example(text="'a' 'b'")
@example(text="none")
@example(text="1e3")
def test_texts_are_what_they_say(text: str) -> None:
    """As they stand, but for one pair of quotes, if Python sees a text in them; none is none."""
    found = changed(f"data.root={text}")
    try:
        quoted = ast.literal_eval(text.strip())
    except Exception:
        quoted = None
    wanted = None if text.strip().lower() == "none" else quoted if isinstance(quoted, str) else text
    assert found is not None and isinstance(found.data, ImageFolder) and found.data.root == wanted


@BOUNDED
@given(text=texts)
def test_literals_are_python_s(text: str) -> None:
    """Where Python's own reader of literals knows one, ours agrees, or refuses."""
    try:
        found = literal(text)
    except ValueError:
        return
    try:
        wanted = ast.literal_eval(text.strip())
    except Exception:
        return  # sums, words: asked above
    wanted = tuple(wanted) if isinstance(wanted, list) else wanted
    assert found == wanted and type(found) is type(wanted)


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-(2**80), 2**80),
        st.floats(),
        st.text(max_size=10),
        st.sampled_from([*NAMES, "inf", "-inf", "\0", "\ud800", "x" * 5000]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=5), st.just("name")), inner, max_size=3),
        st.builds(lambda name: {"name": name}, st.sampled_from(NAMES)),
    ),
    max_leaves=6,
)


def put_in(data: Any, path: list[str], value: Any) -> Any:
    """`data` with another value at that place; strategies' own name is no step of the path."""
    if not path:
        return value
    first, *rest = path
    if isinstance(data, list):
        return [put_in(item, rest, value) if str(place) == first else item for place, item in enumerate(data)]
    return data | {first: put_in(data[first], rest, value)}


def same(asked: Any, told: Any) -> bool:
    """Whether a recipe's JSON says what was asked for; defaults may be added."""
    if isinstance(asked, dict) and isinstance(told, dict):
        return all(name in told and same(value, told[name]) for name, value in asked.items())
    if isinstance(asked, list) and isinstance(told, list):
        return len(asked) == len(told) and all(map(same, asked, told))
    if isinstance(told, float) and isinstance(asked, int) and not isinstance(asked, bool):
        return float(asked) == told
    if isinstance(asked, float) and math.isinf(asked):
        return told == ("inf" if asked > 0 else "-inf")
    return type(asked) is type(told) and asked == told


@BOUNDED
@given(path=st.sampled_from([key for key in LEAVES if "[" not in key]), value=json_values)
@example(path="epochs", value=2**70)
@example(path="seed", value=True)
@example(path="loss.weight", value=math.nan)
@example(path="threat.epsilon", value=-0.0)
def test_recipes_in_json(path: str, value: Any) -> None:
    """A setting of any value: the recipe says it, or is refused. Text of JSON is the way it comes."""
    data = json.loads(json.dumps(put_in(to_json(BASE), path.split("."), value)))
    try:
        with in_time():
            found = from_json(Recipe, data)
    except UserError:
        return
    assert same(data, to_json(found))


@pytest.mark.parametrize("value", [[], 3, "x", None, {}, {"name": []}, {"name": "pgd", "steps": {}}, [[]], math.nan])
@pytest.mark.parametrize("part", list(to_json(BASE)))
def test_parts_in_json(part: str, value: Any) -> None:
    data = to_json(BASE) | {part: value}
    try:
        found = from_json(Recipe, data)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert same(data, to_json(found))
