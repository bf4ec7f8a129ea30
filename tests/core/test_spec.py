"""Specs are values: frozen, checked when written, comparable, hashable, JSON both ways."""

import json
import math
from typing import Any, ClassVar, Literal

import attrs
import pytest
import torch

from robustkit.attacks import PGD
from robustkit.core.errors import SpecError, UserError
from robustkit.core.registry import FOLDERS, registry
from robustkit.core.spec import canonical, digest, evolve, flatten, from_json, kind_of, setting, spec, to_json, walk
from robustkit.core.strategy import Attack, Objective, TargetDistribution, ThreatModel
from robustkit.epsilons import ECAS, Cyclic
from robustkit.objectives import KL, Margin
from robustkit.targets import Inverse, Momentum, OneOff, Universal
from robustkit.threats import L2, Linf


@spec
class Inner:
    size: int = setting(default=3, at_least=1, below=10)
    label: str = "a"


@spec
class Outer:
    """One field of every kind."""

    need: float = setting(above=0, at_most=2, remedy="write 8/255")
    flag: bool = False
    word: Literal["up", "down"] = "up"
    maybe: float | None = None
    many: tuple[float, ...] = setting(default=(1.0,), at_least=0)
    pair: tuple[int, str] = (1, "x")
    inner: Inner = setting(default=attrs.Factory(Inner))
    threat: ThreatModel = setting(default=attrs.Factory(Linf))
    attack: Attack | None = None
    attacks: tuple[Attack, ...] = ()
    where: str = setting(default="", location=True)
    constant: ClassVar[int] = 7


def built_in(kind: str) -> list[type]:
    names = registry(kind)
    return [cls for cls in map(names.get, names.names()) if cls.__module__.startswith("robustkit.")]


def defaults() -> list[Any]:
    """Every built-in strategy that needs no setting, by itself."""
    found = []
    for kind in FOLDERS:
        for cls in built_in(kind):
            try:
                found.append(cls())
            except SpecError as error:
                assert "needs a value" in str(error)
    return found


@pytest.mark.parametrize("value", defaults(), ids=lambda value: type(value).__name__)
def test_every_strategy_is_a_value(value: Any) -> None:
    assert value == type(value)() and hash(value) == hash(type(value)())
    assert value == evolve(value) and value is not evolve(value)
    for field in attrs.fields(type(value)):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(value, field.name, getattr(value, field.name))
    with pytest.raises(SpecError, match="unknown setting 'zzz'"):
        type(value)(zzz=1)
    with pytest.raises(SpecError, match="by name"):
        type(value)(1)
    names = {cls.__name__: cls for kind in FOLDERS for cls in built_in(kind)}
    names |= {type(part).__name__: type(part) for _, part in walk(value)}
    assert eval(repr(value), names | {type(value).__name__: type(value), "inf": math.inf}) == value
    assert type(value).__doc__ and type(value).__doc__.strip()


@pytest.mark.parametrize("value", defaults(), ids=lambda value: type(value).__name__)
def test_every_strategy_survives_json(value: Any) -> None:
    kind = next(kind for kind in FOLDERS if registry(kind).name_of(type(value)))
    from robustkit.core import spec as module

    protocol = next(protocol for protocol, name in module._KINDS.items() if name == kind)
    text = json.dumps(to_json(value), allow_nan=False)
    back = from_json(protocol, json.loads(text))
    assert back == value and type(back) is type(value) and digest(back) == digest(value)
    assert json.loads(text)["name"] == registry(kind).name_of(type(value))


NESTED = [
    Momentum(inner=OneOff(inner=Inverse(steps=2), start=0.5), gamma=0.5),
    ECAS(h_low=-math.inf, h_high=math.inf, values=(0.1, 0.2), big=1),
    PGD(objective=Margin(clamp=False), step_size=0.01),
    Outer(need=1, attack=PGD(objective=KL()), attacks=(PGD(), PGD(steps=3)), many=(), threat=L2()),
]


@pytest.mark.parametrize("value", NESTED, ids=lambda value: type(value).__name__)
def test_nested_values_survive_json(value: Any) -> None:
    annotation = {Momentum: TargetDistribution, PGD: Attack}.get(type(value), type(value))
    if isinstance(value, ECAS):
        from robustkit.core.strategy import EpsilonSchedule

        annotation = EpsilonSchedule
    assert from_json(annotation, json.loads(json.dumps(to_json(value), allow_nan=False))) == value


def test_values_are_brought_to_their_type() -> None:
    value = Outer(need=1, many=[1, 2], pair=[3, "z"], maybe=2)
    assert value.need == 1.0 and type(value.need) is float and type(value.maybe) is float
    assert value.many == (1.0, 2.0) and value.pair == (3, "z")
    assert hash(value) == hash(Outer(need=1.0, many=(1.0, 2.0), pair=(3, "z"), maybe=2.0))
    assert digest(Outer(need=1)) == digest(Outer(need=1.0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs a value for 'need'"),
        ({"need": 0}, "above 0, got 0; write 8/255"),
        ({"need": 2.5}, "at most 2"),
        ({"need": True}, "must be a number, got True"),
        ({"need": "1"}, "must be a number, got '1'"),
        ({"need": math.nan}, "must be a number"),
        ({"need": None}, "must be a number"),
        ({"need": torch.tensor(1.0)}, "must be a number"),
        ({"need": 10**400}, "must be"),
        ({"need": 1, "flag": 1}, "true or false"),
        ({"need": 1, "word": "upp"}, "did you mean 'up'"),
        ({"need": 1, "word": 3}, "'up' or 'down'"),
        ({"need": 1, "maybe": "x"}, "a number"),
        ({"need": 1, "many": 1.0}, "a list of values"),
        ({"need": 1, "many": (1.0, "x")}, r"many\[1\]"),
        ({"need": 1, "many": (1.0, -1.0)}, "at least 0"),
        ({"need": 1, "pair": (1, "x", 2)}, "2 values"),
        ({"need": 1, "pair": (1.5, "x")}, r"pair\[0\].*whole number"),
        ({"need": 1, "inner": {"size": 1}}, "a Inner|an Inner"),
        ({"need": 1, "threat": PGD()}, "a threat"),
        ({"need": 1, "attack": Linf()}, "an attack"),
        ({"need": 1, "attack": PGD}, "an attack"),
        ({"need": 1, "attacks": (PGD(), None)}, r"attacks\[1\]"),
        ({"need": 1, "ned": 1}, "did you mean 'need'"),
        ({"need": 1, "constant": 8}, "unknown setting 'constant'"),
    ],
)
def test_mistakes_are_refused_where_they_are_written(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        Outer(**settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(SpecError) as caught:
        Outer(need=5, word="left", many=(-1,))
    assert all(f"Outer.{name}" in str(caught.value) for name in ("need", "word", "many"))
    with pytest.raises(SpecError, match=r"Inner\.size"):
        Inner(size=10)


def test_limits_of_defaults_hold_too() -> None:
    @spec
    class Wrong:
        size: int = setting(default=0, at_least=1)

    with pytest.raises(SpecError):
        Wrong()


def test_no_live_object_can_be_a_setting() -> None:
    @spec
    class Holds:
        module: torch.nn.Module = setting(default=None)

    with pytest.raises(TypeError, match="cannot be annotated"):
        Holds()


def test_evolve_checks_anew() -> None:
    value = Outer(need=1)
    assert evolve(value, need=2, flag=True) == Outer(need=2, flag=True) and value.need == 1
    for wrong in ({"need": 9}, {"nee": 1}, {"constant": 1}):
        with pytest.raises(SpecError):
            evolve(value, **wrong)


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        [],
        "pgd",
        {},
        {"name": 3},
        {"name": "pgdd"},
        {"name": "pgd", "step": 3},
        {"name": "pgd", "steps": "3"},
        {"name": "pgd", "objective": None},
        {"name": "pgd", "objective": {"name": "kll"}},
        {"name": "pgd", "norm": 1},
        {"name": "pgd", "reach": 2.0},
        {"name": "pgd", "steps": 10**400},
        {"name": "pgd", "step_size": 10**400},
    ],
)
def test_broken_json_is_a_users_mistake(data: Any) -> None:
    with pytest.raises(UserError):
        from_json(Attack, data)


def test_broken_json_of_plain_specs() -> None:
    for data in (
        {"need": 1, "many": {}},
        {"need": 1, "pair": [1]},
        {"need": 1, "inner": 3},
        {"need": [1]},
        {"need": 1, "constant": 7},
        {"need": 1, "attacks": {"name": "pgd"}},
        [1],
        None,
    ):
        with pytest.raises(UserError):
            from_json(Outer, data)
    with pytest.raises(UserError, match=r"recipe\.attacks\[1\]"):
        from_json(Outer, {"need": 1, "attacks": [{"name": "pgd"}, {"nam": "pgd"}]})
    with pytest.raises(SpecError, match="did you mean 'size'"):
        from_json(Outer, {"need": 1, "inner": {"sizes": 3}})


def test_digest() -> None:
    """Equal values, equal digest, whatever the order and whether defaults are written; locations do not count."""
    value = Outer(need=0.1)
    assert len(digest(value)) == 12 and int(digest(value), 16) >= 0
    assert digest(value) == digest(Outer(where="/elsewhere", word="up", need=0.1))
    seen = {
        digest(Outer(need=0.1, **change))
        for change in (
            {},
            {"flag": True},
            {"word": "down"},
            {"maybe": 0.0},
            {"many": ()},
            {"inner": Inner(size=4)},
            {"threat": L2()},
            {"attack": PGD()},
            {"attack": PGD(steps=11)},
            {"attacks": (PGD(),)},
        )
    }
    assert len(seen) == 10
    assert digest(Cyclic()) != digest(Cyclic(values=(0.1,)))
    assert "where" not in canonical(value) and "where" in to_json(value)
    assert json.loads(canonical(evolve(value, maybe=math.inf)))["maybe"] == "inf"


def test_a_location_deep_inside_stays_out_of_the_digest() -> None:
    @spec
    class Around:
        outers: tuple[Outer, ...]
        one: Outer

    a, b = Outer(need=1, where="a"), Outer(need=1, where="b")
    assert digest(Around(outers=(a, b), one=a)) == digest(Around(outers=(b, b), one=b))


def test_walk_names_every_spec_with_its_path() -> None:
    value = Outer(need=1, attack=PGD(objective=KL()), attacks=(PGD(),))
    found = dict(walk(value))
    assert set(found) == {"", "inner", "threat", "attack", "attack.objective", "attacks.0", "attacks.0.objective"}
    assert found["attack.objective"] == KL()


def test_flatten() -> None:
    flat = flatten(to_json(Outer(need=1, attack=PGD(), attacks=(PGD(steps=3),))))
    assert flat["attack"] == "pgd" and flat["attack.objective"] == "cross-entropy" and flat["attacks.0.steps"] == 3
    assert flat["need"] == 1.0 and flat["many"] == [1.0]


def test_kind_of() -> None:
    assert kind_of(Attack) == kind_of(Attack | None) == "attack" and kind_of(Objective) == "objective"
    assert kind_of(float) is None and kind_of(float | None) is None and kind_of(tuple[Attack, ...]) is None


def test_a_spec_is_not_another_kind() -> None:
    with pytest.raises(SpecError, match=r"Momentum\.inner.*a target"):
        Momentum(inner=PGD())
    with pytest.raises(SpecError, match="an objective"):
        Universal(objective="inverse")
