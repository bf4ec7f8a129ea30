"""Contract checks for strategies, built-in or your own: an AssertionError says what is wrong; what to do.

    from robustkit.testing import check

    def test_contract() -> None:
        check(MyAttack(step=1.25))

A check takes a second on the CPU: a net of two convolutions with batch normalisation, six images, a real `Scene`.
`check` asks for what every strategy of the kind must do (see `core.strategy`); that yours does what its paper says is
for your own tests. `tiny_recipe(attack=MyAttack())` composes it into a recipe that trains in a second or two.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, cast, get_args
from unittest.mock import patch

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.batch import Batch, Budget, Mode, Output, Part, Passes, Prepared, Progress
from robustkit.core.model import Model, RobustModel
from robustkit.core.recipe import Recipe, Validation, rehearsed
from robustkit.core.registry import FOLDERS, registry
from robustkit.core.rng import Generator, derive
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
    Predict,
    Record,
    Reference,
    Scene,
    Schedule,
    TargetDistribution,
    TargetRuntime,
    ThreatModel,
    WeightAverage,
    WeightPerturbation,
    build,
)
from robustkit.core.world import World
from robustkit.engine import Predictor, count_passes

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

BATCH, CLASSES, WIDTH, EPOCHS, STEPS = 6, 4, 8, 4, 2
SHAPE = (3, 8, 8)


def check(strategy: Any) -> None:
    """Everything that strategies of its kind must do.

    Raises:
        AssertionError: it does not; the sentence says what.
    """
    kind = kind_of(strategy)
    checker = globals().get(f"check_{kind}")
    if checker is None:  # data sets and measures: what they need is not to be had everywhere
        check_spec(strategy)
    else:
        checker(strategy)


def kind_of(strategy: Any) -> str:
    """The kind that the strategy's class is registered for."""
    for kind in FOLDERS:
        if registry(kind).name_of(type(strategy)) is not None:
            return kind
    raise AssertionError(
        f"{type(strategy).__name__} is registered for no kind: "
        f'put @registry("attack").register("its-name") (or another kind) above @spec'
    )


def tiny_recipe(**parts: Any) -> Recipe:
    """A recipe of small parts with `parts` in place of its own.

    A loss that uses a target gets one; a target gets a loss that uses it; an attack takes two steps if it can. Networks
    that strategies would load are untrained ones instead.
    """
    if "loss" not in parts and parts.get("target") is not None:
        parts["loss"] = registry("loss").get("align")()
    given: dict[str, Any] = {
        "data": registry("dataset").get("synthetic")(train=70, test=16, classes=CLASSES, size=8, channels=1),
        "model": Model(backbone="convnet_small"),
        "threat": registry("threat").get("linf")(),
        "attack": registry("attack").get("pgd")(steps=2),
        "loss": registry("loss").get("cross-entropy")(),
        "schedule": registry("schedule").get("constant")(),
        "epochs": EPOCHS,
        "batch_size": 16,
        "validation": Validation(images=12, train_images=6, attack=registry("attack").get("pgd")(steps=2)),
        "evaluation": (),
        **parts,
    }
    if given["loss"].needs_target and "target" not in given:
        given["target"] = registry("target").get("natural")()
    return rehearsed(Recipe(**given))


# What to do about the commonest faults.

_INSIDE = "forward inside `with predict.using(mode) as predict:`"
_LEAVE = {
    "the mode": _INSIDE,
    "track_running_stats": _INSIDE,
    "the buffer": f'{_INSIDE}, in "eval" mode, or have a setting `mode` that says "train"',
    "the gradient": "differentiate with torch.autograd.grad(value, images), not with backward()",
    "requires_grad": "differentiate with torch.autograd.grad(value, images), which needs no switch",
    "the weight": "work on a copy",
}
"""About what was changed, by the beginning of its name."""

_DRAW = "draw from the generator that is given (`generator`, `scene.generator(purpose)`) and from nothing else"
_KEEP = "keep what is remembered in buffers (register_buffer), and draw from scene.generator(purpose) alone"
_CHARGE = "let `passes` say what is forwarded and differentiated, no more and no less"


# The stage: everything a strategy may look at, small.


class _Backbone(nn.Module):
    """(B, 3, H, W) -> (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x)).mean(dim=(2, 3))


@attrs.define
class _Stage:
    model: RobustModel
    threat: ThreatModel
    world: World
    x: Tensor
    y: Tensor

    @classmethod
    def set(cls, threat: ThreatModel | None = None) -> _Stage:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = RobustModel(_Backbone(), registry("head").get("linear")().build(WIDTH, CLASSES), None)
            x, y = torch.rand(2 * BATCH, *SHAPE), torch.arange(2 * BATCH) % CLASSES
            model.train()
            for _ in range(20):  # running statistics that are not those of any batch below
                model(0.8 * torch.rand(16, *SHAPE))
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        next(iter(model.head.parameters())).requires_grad_(False)
        world = World(samples=2 * BATCH, training=2 * BATCH, classes=CLASSES, image_shape=SHAPE, seed=3)
        return cls(model, threat or registry("threat").get("linf")(), world, x, y)

    def batch(self, step: int = 0, part: Part | None = None) -> Batch:
        """One of two disjoint batches of six; epochs take them in different order."""
        progress = self.progress(step)
        first = (step + progress.epoch) % STEPS * BATCH
        part = part or Part(0, BATCH, BATCH)
        index = torch.arange(first + part.start, first + part.stop)
        return Batch(self.x[index].clone(), self.y[index].clone(), index)

    def progress(self, step: int = 0) -> Progress:
        return Progress.at(step, EPOCHS, STEPS)

    def scene(self, step: int = 0, *, predict: Predict | None = None, part: Part | None = None) -> Scene:
        return Scene(
            predict=predict or self.predict(),
            batch=self.batch(step, part),
            progress=self.progress(step),
            threat=self.threat,
            attack=registry("attack").get("pgd")(steps=2),
            world=self.world,
            part=part or Part(0, BATCH, BATCH),
            stepped=self.stepped,
        )

    def stepped(self, scene: Scene, budget: Budget, x_adv: Tensor, loss: LossRuntime | None) -> Predictor:
        """A copy after a plain gradient step on the cross-entropy, or on `loss`."""
        model, y = deepcopy(self.model), scene.batch.y
        parameters = [p.requires_grad_() for p in model.parameters()]
        with torch.enable_grad(), model.using("train"):
            if loss is None:
                value = F.cross_entropy(model(x_adv, y).margined, y)
            else:
                prepared = loss.prepare(scene, budget, x_adv)
                outputs = _forwarded(model, prepared, y)
                terms = loss(outputs, None, scene.batch, prepared.extras, scene.progress)
                value = torch.stack(list(terms.values())).sum()
            gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            torch._foreach_sub_(parameters, gradients, alpha=0.1)
        return Predictor(model.train(), self.world.device)

    def predict(self) -> _Watched:
        return _Watched(self.model, self.world.device)

    def epsilon(self, batch: Batch) -> Tensor:
        return torch.full((len(batch.y),), self.threat.epsilon)

    def adversarial(self, batch: Batch, step: int = 0) -> Tensor:
        generator = Generator(derive(7, step), Part(0, len(batch.y), len(batch.y)), self.world.device)
        return self.threat.random(batch.x, self.epsilon(batch), generator)


class _Stop(Exception):
    """Thrown by a `predict` in the middle."""


class _Watched(Predictor):
    """A predictor that notes in which modes it was asked, and gives up after some calls if told to."""

    def __init__(self, model: RobustModel, device: torch.device) -> None:
        super().__init__(model, device)
        self.modes: set[Mode] = set()
        self.calls = 0
        self.gives_up_after: int | None = None

    def __call__(self, images: Tensor, y: Tensor | None = None) -> Output:
        if self.gives_up_after is not None and self.calls >= self.gives_up_after:
            raise _Stop
        self.calls += 1
        return super().__call__(images, y)

    @contextmanager
    def using(self, mode: Mode) -> Iterator[Predictor]:
        self.modes.add(mode)
        with super().using(mode):
            yield self


class _Draws(Generator):
    """A generator that knows whether anything was drawn from it."""

    drew = False

    def uniform(self, like: Tensor) -> Tensor:
        self.drew = True
        return super().uniform(like)

    def normal(self, like: Tensor) -> Tensor:
        self.drew = True
        return super().normal(like)

    def integer(self, below: int) -> int:
        self.drew = True
        return super().integer(below)

    def integers(self, below: int, like: Tensor) -> Tensor:
        self.drew = True
        return super().integers(below, like)


@contextmanager
def _elsewhere() -> Iterator[None]:
    """As in another process on another machine: its name and number, and everybody's own randomness, are others."""
    python, arrays = random.getstate(), np.random.get_state()
    host = {"RANK": "1", "LOCAL_RANK": "1", "HOSTNAME": "elsewhere"}
    names = ("socket.gethostname", "platform.node")
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(patch.dict(os.environ, host))
        stack.enter_context(patch("os.getpid", return_value=1))
        for name in names:
            stack.enter_context(patch(name, return_value="elsewhere"))
        torch.seed()
        random.seed()
        np.random.seed()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


@contextmanager
def _left_as_found(model: RobustModel, who: str, *, statistics: bool = True) -> Iterator[None]:
    """The model's modes, weights, gradients (and statistics) are the same afterwards, also after a `_Stop`."""

    def seen() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, module in model.named_modules():
            found[f"the mode (training or not) of {name or 'the model'}"] = module.training
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                found[f"track_running_stats of {name}"] = module.track_running_stats
        for name, parameter in model.named_parameters():
            found[f"the weight {name}"] = parameter.detach().clone()
            found[f"the gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
            found[f"requires_grad of {name}"] = parameter.requires_grad
        if statistics:
            found |= {f"the buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
        return found

    before = seen()
    try:
        yield
    finally:
        after = seen()
        for what, was in before.items():
            remedy = next(words for start, words in _LEAVE.items() if what.startswith(start))
            assert _same(was, after[what]), f"{who} changed {what}; {remedy}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _state(part: Any) -> dict[str, Tensor]:
    return {k: t.clone() for k, t in part.state_dict().items()} if isinstance(part, nn.Module) else {}


def _same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)


def _in_mode(strategy: Any, mode: Mode) -> Any:
    """The strategy with every `mode` setting in it, and in the strategies it wraps, set to `mode`."""
    changes: dict[str, Any] = {}
    for field in attrs.fields(type(strategy)):
        value = getattr(strategy, field.name)
        if field.name == "mode":
            changes["mode"] = mode
        elif attrs.has(type(value)):
            changes[field.name] = _in_mode(value, mode)
    return evolve(strategy, **changes)


def _variants(strategy: Any) -> list[Any]:
    """The strategy, and itself in the other modes that it can be told to use."""
    return list(dict.fromkeys([strategy, *(_in_mode(strategy, mode) for mode in get_args(Mode))]))


def _mode(strategy: Any) -> Mode | None:
    return getattr(strategy, "mode", None)


def _name(strategy: Any) -> str:
    text = repr(strategy)
    return text if len(text) <= 120 else type(strategy).__name__


# Specs.


def check_spec(strategy: Any) -> None:
    """A frozen, hashable value that survives JSON and has all that its protocol asks for."""
    kind, who = kind_of(strategy), _name(strategy)
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


# Threat models.


def check_threat(threat: ThreatModel) -> None:
    """Points stay in ball and box, image by image; `ascend` is a unit step uphill; draws come from the generator."""
    check_spec(threat)
    who = _name(threat)
    stage = _Stage.set(threat)
    batch = stage.batch()
    x = batch.x
    x[0, :, :4] = 0.0  # corners of the box
    x[1, :, :4] = 1.0
    norms = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}
    assert threat.norm in norms, f"{who}: norm must be one of {', '.join(norms)}, is {threat.norm!r}"
    assert threat.epsilon > 0, f"{who}: epsilon must be above 0, is {threat.epsilon}"
    epsilon = threat.epsilon * torch.tensor([1.0, 0.5, 0.0, 2.0, 0.1, 1.0])

    far = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    size = threat.size(far)
    expected = torch.linalg.vector_norm(far.flatten(1), ord=norms[threat.norm], dim=1)
    assert size.shape == (BATCH,), f"{who}.size must give (B,), gave {tuple(size.shape)}"
    assert torch.allclose(size, expected, rtol=1e-4), f"{who}.size is not the {threat.norm} norm"

    whole = Part(0, BATCH, BATCH)
    inside = x.clone()
    draws = [threat.random(x, epsilon, Generator(seed, whole, x.device)) for seed in (1, 1, 2)]
    with _elsewhere():
        draws[1] = threat.random(x, epsilon, Generator(1, whole, x.device))
    assert torch.equal(inside, x), f"{who}.random changes its argument; work on a copy"
    _in_ball(draws[0], x, threat, epsilon, f"{who}.random")
    _differ(draws, who + ".random", drew=True)
    parts = [Part(0, 4, BATCH), Part(4, BATCH, BATCH)]
    pieces = [threat.random(x[p.start : p.stop], epsilon[p.start : p.stop], Generator(1, p, x.device)) for p in parts]
    assert torch.equal(torch.cat(pieces), draws[0]), (
        f"{who}.random draws something else when a batch is split over processes: draw by generator.uniform(x) or "
        "generator.normal(x), in the shape of all images of the call"
    )

    projected = threat.project(x + far, x, epsilon)
    _in_ball(projected, x, threat, epsilon, f"{who}.project")
    assert torch.allclose(threat.project(inside, x, epsilon), x, atol=1e-6), f"{who}.project moves the image itself"
    again = threat.project(projected, x, epsilon)
    assert torch.allclose(again, projected, atol=1e-5), f"{who}.project moves images that are inside already"
    assert torch.equal(inside, x), f"{who}.project changes its argument; work on a copy"

    up = far.clone()
    up[2] = 0
    direction = threat.ascend(up)
    assert _same(up[2], torch.zeros_like(up[2])) and torch.equal(up[0], far[0]), (
        f"{who}.ascend changes its argument; work on a copy"
    )
    assert bool((direction[2] == 0).all()), f"{who}.ascend must be zero where the gradient is zero"
    others = torch.arange(BATCH) != 2
    lengths = threat.size(direction)[others]
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4), f"{who}.ascend has lengths {lengths.tolist()}"
    uphill = (direction * up).flatten(1).sum(dim=1)[others]
    assert bool((uphill > 0).all()), f"{who}.ascend does not go uphill"


def _in_ball(x_adv: Tensor, x: Tensor, threat: ThreatModel, radius: Tensor, who: str) -> None:
    _images(x_adv, x, who)
    sizes = threat.size(x_adv - x)
    excess = sizes - radius
    assert bool((excess <= 1e-5 + 1e-4 * radius).all()), (
        f"{who} left the ball: {threat.norm} distances {_list(sizes)} for radii {_list(radius)}; bring images back "
        "into the ball of their own radius (an attack: by threat.project)"
    )


def _images(images: Tensor, like: Tensor, who: str) -> None:
    remedy = "give an image for each of `x`, of its shape and type"
    assert isinstance(images, Tensor), f"{who} must give a tensor, gave {type(images).__name__}; {remedy}"
    assert images.shape == like.shape, f"{who} must give {tuple(like.shape)}, gave {tuple(images.shape)}; {remedy}"
    assert images.dtype == like.dtype, f"{who} must give {like.dtype}, gave {images.dtype}; {remedy}"
    assert not images.requires_grad, f"{who} must give detached images; give images.detach()"
    assert bool(images.isfinite().all()), f"{who} gave numbers that are not finite"
    low, high = images.min().item(), images.max().item()
    assert low >= 0 and high <= 1, f"{who} left the box [0, 1]: pixels range from {low:g} to {high:g}; clamp last"


def _differ(three: Sequence[Tensor], who: str, *, drew: bool) -> None:
    """Results under seeds a, a, b."""
    assert torch.equal(three[0], three[1]), f"{who} gives different results under the same seed; {_DRAW}"
    if drew:
        assert not torch.equal(three[0], three[2]), f"{who} draws, but gives the same under another seed"


def _list(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.tolist())


# Attacks.


def check_attack(attack: Attack) -> None:
    """Detached images within reach, reproducible, at the declared price, and a model left as it was found."""
    check_spec(attack)
    assert attack.reach > 0, f"{_name(attack)}: reach must be above 0, is {attack.reach}"
    for threat in (registry("threat").get("linf")(), registry("threat").get("l2")()):
        stage = _Stage.set(threat)
        for variant in _variants(attack):
            _check_attack(variant, stage)


def _check_attack(attack: Attack, stage: _Stage) -> None:
    who, threat = _name(attack), stage.threat
    batch = stage.batch()
    x, y = batch.x, batch.y
    runtime = build(attack.rehearsed(tiny_recipe()) if hasattr(attack, "rehearsed") else attack, stage.world)
    tracked = _mode(attack) != "train"
    ball: ThreatModel = getattr(attack, "threat", threat)
    whole = Part(0, BATCH, BATCH)
    epsilon = stage.threat.epsilon * torch.tensor([1.0, 0.5, 0.0, 1.0, 1.5, 0.25])
    steps = torch.tensor([2, 1, 2, 0, 1, 2])
    budgets = {
        "a radius for each image": Budget(epsilon),
        "a radius and a step size for each image": Budget(epsilon, step_size=epsilon / 3),
        "a number of steps for each image": Budget(epsilon, steps=steps, max_steps=2),
    }

    def call(budget: Budget, seed: int, part: Part = whole, predict: _Watched | None = None) -> tuple[Tensor, _Draws]:
        stage.model.load_state_dict(weights)
        generator = _Draws(seed, part, x.device)
        rows = slice(part.start, part.stop)
        with torch.random.fork_rng(devices=[]):
            torch.seed()  # nothing may depend on torch's global generator
            return (
                runtime(predict or stage.predict(), x[rows], y[rows], _rows(budget, rows), threat, generator),
                generator,
            )

    weights = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    before = [tensor.clone() for tensor in (x, y, epsilon, steps)]
    for words, budget in budgets.items():
        for training in (True, False):
            stage.model.train(training)
            with _left_as_found(stage.model, f"{who} with {words}", statistics=tracked):
                first, generator = call(budget, seed=1)
        _in_ball(first, x, ball, attack.reach * ball.epsilon / threat.epsilon * epsilon, f"{who} with {words}")
        with _elsewhere():
            second = call(budget, seed=1)[0]
        third = call(budget, seed=2)[0]
        _differ([first, second, third], f"{who} with {words}", drew=generator.drew)
    for was, tensor, name in zip(before, (x, y, epsilon, steps), ("x", "y", "epsilon", "steps"), strict=True):
        assert torch.equal(was, tensor), f"{who} changes its argument {name}; work on a copy"

    plain = budgets["a radius for each image"]
    watched = stage.predict()
    stage.model.train()
    with count_passes(stage.model) as count:
        result, _ = call(plain, seed=1, predict=watched)
    declared, counted = attack.passes(stage.progress()), count.per_batch(BATCH)
    if getattr(attack, "stops_early", False):
        assert declared.units >= counted.units, f"{who} declares at most {declared}, but makes {counted}; {_CHARGE}"
    else:
        assert declared == counted, f"{who} declares {declared}, but makes {counted}; {_CHARGE}"
    with torch.no_grad():
        assert torch.equal(call(plain, seed=1)[0], result), f"{who} gives something else under torch.no_grad()"
    for number in {0, watched.calls // 2, watched.calls - 1} if watched.calls else set():
        broken = stage.predict()
        broken.gives_up_after = number
        with _left_as_found(stage.model, f"{who}, stopped by an error in predict,", statistics=tracked):
            try:
                call(plain, seed=1, predict=broken)
            except _Stop:
                pass
            else:
                raise AssertionError(f"{who} hides an error that predict raised")
    if watched.modes == {"eval"}:
        pieces = [call(plain, 1, part)[0] for part in (Part(0, 4, BATCH), Part(4, BATCH, BATCH))]
        # Sums round differently in batches of another size, so that the sign of a gradient near zero may flip.
        moved = ((torch.cat(pieces) - result).abs() > 1e-4).float().mean().item()
        assert moved < 0.02, f"{who}: {moved:.0%} of the pixels differ when a batch is split over processes"
    stage.model.load_state_dict(weights)


def _rows(budget: Budget, rows: slice) -> Budget:
    def cut(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    return budget._replace(
        epsilon=budget.epsilon[rows],
        step_size=cut(budget.step_size),
        steps=cut(budget.steps),
        weight=cut(budget.weight),
    )


# Objectives.


def check_objective(objective: Objective) -> None:
    """One finite number for each image, of that image's output alone, with a gradient."""
    check_spec(objective)
    who, stage = _name(objective), _Stage.set()
    batch = stage.batch()
    reference = Reference()
    with stage.predict().using("eval") as predict:
        if objective.needs_reference:
            with torch.no_grad():
                reference = Reference(natural=predict(batch.x), adversarial=predict(stage.adversarial(batch, 1)))
        images = stage.adversarial(batch).requires_grad_()
        output = predict(images)
        values = objective(output, batch.y, reference)
    remedy = "give a number for each image, no mean or sum"
    assert values.shape == (BATCH,), f"{who} must give (B,), gave {tuple(values.shape)}; {remedy}"
    assert bool(values.isfinite().all()), f"{who} gave numbers that are not finite"
    (gradient,) = torch.autograd.grad(values[1], images)
    assert bool((gradient[torch.arange(BATCH) != 1] == 0).all()), f"{who}: an image's value depends on other images"
    two = slice(0, 2)
    first = objective(_cut(output, two), batch.y[two], Reference(*(o and _cut(o, two) for o in reference)))
    assert torch.allclose(first, values[two], atol=1e-6), f"{who}: an image's value depends on other images"


def _cut(output: Output, rows: slice) -> Output:
    return Output(*(value[rows] for value in output))


# Epsilon schedules.


def check_epsilon(schedule: EpsilonSchedule) -> None:
    """A budget with one entry for each image, reproducible, at the declared price; state in buffers."""
    check_spec(schedule)
    for variant in _variants(schedule):
        _check_epsilon(variant)


def _check_epsilon(schedule: EpsilonSchedule) -> None:
    who, stage = _name(schedule), _Stage.set()
    tracked = _mode(schedule) != "train"
    runtime = build(schedule, stage.world)
    for step in range(EPOCHS * STEPS):
        stage.model.train()
        weights = deepcopy(stage.model.state_dict())
        other = _rebuilt(schedule, stage.world, runtime)
        with (
            _left_as_found(stage.model, who, statistics=tracked),
            count_passes(stage.model) as count,
            torch.random.fork_rng(devices=[]),
        ):
            torch.seed()
            scene = stage.scene(step)
            arguments = [tensor.clone() for tensor in scene.batch]
            budget: Budget = runtime(scene)
        for field, before, after in zip(Batch._fields, arguments, scene.batch, strict=True):
            assert torch.equal(before, after), f"{who} changes the batch's {field}; work on a copy"
        declared, counted = schedule.passes(stage.progress(step)), count.per_batch(BATCH)
        assert declared == counted, f"{who} declares {declared}, but makes {counted}; {_CHARGE}"
        _check_budget(budget, schedule, who)
        stage.model.load_state_dict(weights)
        with _elsewhere():
            again: Budget = other(stage.scene(step))
        for name, was, now in zip(Budget._fields, budget, again, strict=True):
            assert _same(was, now), f"{who}: {name} is another after the state went through a checkpoint; {_KEEP}"
        if hasattr(runtime, "observe"):
            x_adv = stage.adversarial(scene.batch, step)
            with torch.no_grad():
                outputs = {"adversarial": stage.model(x_adv)}
            stage.model.load_state_dict(weights)
            for one in (runtime, other):
                one.observe(Record(scene.batch, scene.progress, budget, x_adv, outputs, None, {}))
        assert _same_state(_state(runtime), _state(other)), f"{who}: its state is another after a checkpoint; {_KEEP}"


def _check_budget(budget: Budget, schedule: EpsilonSchedule, who: str) -> None:
    for name in ("epsilon", "step_size", "weight", "steps"):
        values = getattr(budget, name)
        if values is None:
            continue
        wanted = torch.int64 if name == "steps" else torch.float32
        remedy = "give a number for each image, such as x.new_full((len(x),), radius)"
        assert values.shape == (BATCH,), f"{who}: {name} must be (B,), is {tuple(values.shape)}; {remedy}"
        assert values.dtype == wanted, f"{who}: {name} must be {wanted}, is {values.dtype}"
        assert values.device.type == "cpu", f"{who}: {name} is on {values.device}, the images are on the CPU"
        assert not values.requires_grad, f"{who}: {name} must be detached"
        assert bool(values.isfinite().all()), f"{who}: {name} is not finite"
        assert bool((values >= 0).all()), f"{who}: {name} is negative: {_list(values)}"
    assert (budget.step_size is not None) == schedule.sets_step_size, (
        f"{who}: sets_step_size is {schedule.sets_step_size}, but the budget's step size is {budget.step_size}"
    )
    if budget.steps is not None:
        most = int(budget.steps.max())
        assert budget.max_steps >= most, f"{who}: max_steps is {budget.max_steps}, the largest of steps {most}"
    if budget.adjusted is not None:
        assert budget.adjusted.shape == (BATCH,), f"{who}: adjusted must be (B,), is {tuple(budget.adjusted.shape)}"
        assert budget.adjusted.dtype == torch.int64, f"{who}: adjusted must be torch.int64, is {budget.adjusted.dtype}"
        assert set(budget.adjusted.tolist()) <= {-1, 0, 1}, f"{who}: adjusted is another than -1, 0, 1"


def _rebuilt(strategy: Any, world: World, runtime: Any) -> Any:
    """A fresh runtime with the other's state, as a resumed run would have it."""
    fresh = build(strategy, world)
    if isinstance(runtime, nn.Module):
        fresh.load_state_dict(_state(runtime))
    return fresh


# Target distributions.


def check_target(target: TargetDistribution) -> None:
    """Rows of probabilities through all of training, at the declared price; state in buffers, moved by `prepare` once
    and by `observe`, and by nothing else.
    """
    check_spec(target)
    for variant in _variants(target):
        _check_target(variant)


def _check_target(target: TargetDistribution) -> None:
    who, stage = _name(target), _Stage.set()
    assert target.mode in get_args(Mode), f"{who}: mode must be one of {get_args(Mode)}, is {target.mode!r}"
    tracked = target.mode != "train"
    runtime = build(target, stage.world)
    for step in range(EPOCHS * STEPS):
        stage.model.train()
        scene, progress = stage.scene(step), stage.progress(step)
        batch, x_adv = scene.batch, stage.adversarial(scene.batch, step)
        budget = Budget(stage.epsilon(batch))
        other = _rebuilt(target, stage.world, runtime)
        weights = deepcopy(stage.model.state_dict())

        before = _state(runtime)
        with _left_as_found(stage.model, who, statistics=tracked):
            runtime.prepare(scene, budget, x_adv, advance=False)
        assert _same_state(before, _state(runtime)), (
            f"{who}: prepare(advance=False) changes its state; let it look, not move"
        )
        stage.model.load_state_dict(weights)

        with count_passes(stage.model) as count:
            rows, images = _target_rows(runtime, target, stage, scene, budget, x_adv, who, tracked=tracked)
        declared, counted = target.passes(progress), count.per_batch(BATCH)
        assert declared == counted, (
            f"{who} declares {declared} in epoch {progress.epoch}, but makes {counted}; {_CHARGE}"
        )
        remedy = "give a row of probabilities for each image, such as logits.softmax(dim=1)"
        assert rows.shape == (BATCH, CLASSES), f"{who} must give (B, K), gave {tuple(rows.shape)}; {remedy}"
        assert rows.dtype == torch.float32, f"{who} must give float32, gave {rows.dtype}; {remedy}"
        assert bool((rows >= 0).all()), f"{who} gave negative probabilities; {remedy}"
        sums = rows.sum(dim=1)
        assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5), f"{who}: rows sum to {_list(sums)}; {remedy}"
        if images is not None:
            _images(images, batch.x, f"{who}.prepare")

        stage.model.load_state_dict(weights)
        with _elsewhere():
            again, _ = _target_rows(other, target, stage, scene, budget, x_adv, who, tracked=tracked)
        fault = f"{who} gives another target after its state went through a checkpoint"
        assert torch.equal(rows, again), f"{fault}; {_KEEP}"
        with torch.no_grad():
            output = stage.model(batch.x)
            record = Record(batch, progress, budget, x_adv, {"adversarial": output}, rows, {})
            for one in (runtime, other):
                one.observe(record)
        assert _same_state(_state(runtime), _state(other)), f"{who}: its state is another after a checkpoint"


def _target_rows(
    runtime: Any,
    target: TargetDistribution,
    stage: _Stage,
    scene: Scene,
    budget: Budget,
    x_adv: Tensor,
    who: str,
    *,
    tracked: bool,
) -> tuple[Tensor, Tensor | None]:
    """What the loop does with a target before the pure pass."""
    arguments = [scene.batch.x.clone(), x_adv.clone()]
    with _left_as_found(stage.model, who, statistics=tracked), torch.random.fork_rng(devices=[]):
        torch.seed()
        images: Tensor | None = runtime.prepare(scene, budget, x_adv)
    assert torch.equal(arguments[0], scene.batch.x), f"{who}.prepare changes the images; work on a copy"
    assert torch.equal(arguments[1], x_adv), f"{who}.prepare changes the adversarial images; work on a copy"
    output: Output | None = None
    prepared = _state(runtime)
    with torch.no_grad():
        if images is not None:
            with stage.predict().using(target.mode) as predict:
                output = predict(images)
        rows: Tensor = runtime(output, scene.batch, scene.progress)
        twice: Tensor = runtime(output, scene.batch, scene.progress)
    assert torch.equal(rows, twice), f"{who}: asked twice, it gives two targets; {_DRAW}"
    assert _same_state(prepared, _state(runtime)), f"{who}: giving the target changes its state; do that in observe"
    return rows, images


# Heads.


def check_head(head: Head) -> None:
    """Finite logits, a margin only where labels are given, rows that do not mix, state in parameters and buffers."""
    check_spec(head)
    who = _name(head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = head.build(WIDTH, CLASSES)
        torch.manual_seed(0)
        twin = head.build(WIDTH, CLASSES)
        torch.manual_seed(1)
        other = head.build(WIDTH, CLASSES)
    assert _same_state(_state(module), _state(twin)), (
        f"{who}.build does not draw from torch's seeded generator alone; initialise by torch.nn.init"
    )
    generator = torch.Generator().manual_seed(2)
    features = torch.rand(BATCH, WIDTH, generator=generator).requires_grad_()
    y = torch.arange(BATCH) % CLASSES
    plain, labelled = module(features), module(features, y)
    shapes = {"logits": (BATCH, CLASSES), "margined": (BATCH, CLASSES), "features": (BATCH, WIDTH), "penalty": (BATCH,)}
    for output in (plain, labelled):
        assert isinstance(output, Output), f"{who} must give an Output, gave {type(output).__name__}"
        for name, shape in shapes.items():
            value = getattr(output, name)
            remedy = "see core.batch.Output for its fields"
            assert value.shape == shape, f"{who}: {name} must be {shape}, is {tuple(value.shape)}; {remedy}"
            assert value.dtype == torch.float32, f"{who}: {name} must be float32, is {value.dtype}; {remedy}"
            assert bool(value.isfinite().all()), f"{who}: {name} is not finite"
    assert torch.equal(plain.logits, plain.margined), f"{who}: the margin applies although no label was given"
    assert torch.equal(plain.logits, labelled.logits), f"{who}: logits depend on the label; put margins in `margined`"
    half = module(features[:2], y[:2])
    for name in shapes:
        assert torch.allclose(getattr(half, name), getattr(labelled, name)[:2], atol=1e-5), (
            f"{who}: {name} of an image depends on the other images"
        )
    value = F.cross_entropy(labelled.margined, y) + labelled.penalty.mean()
    gradients = torch.autograd.grad(value, [features, *module.parameters()], allow_unused=True)
    for name, gradient in zip(["the features", *(n for n, _ in module.named_parameters())], gradients, strict=True):
        assert gradient is not None and bool(gradient.isfinite().all()), f"{who}: no finite gradient for {name}"
    other.load_state_dict(_state(module))
    assert torch.equal(other(features).logits, plain.logits), f"{who}: part of its state is not in state_dict()"
    with torch.autocast("cpu", torch.bfloat16):
        low = module(features.detach().bfloat16(), y)
    for name in shapes:
        assert bool(getattr(low, name).isfinite().all()), f"{who}: {name} is not finite under bfloat16"
    for epoch in range(EPOCHS):
        weight = head.penalty_weight(Progress.at(epoch * STEPS, EPOCHS, STEPS))
        assert math.isfinite(weight) and weight >= 0, f"{who}: the penalty weighs {weight} in epoch {epoch}"
    unknown = set(head.parameter_options()) - {"lr_scale", "weight_decay"}
    assert not unknown, f"{who}: unknown options for the optimiser: {', '.join(sorted(unknown))}"


# Losses.


class _Views(dict[str, Any]):
    """Outputs or extras by name; asking for what was not prepared is a fault of the loss."""

    def __missing__(self, key: str) -> Any:
        raise AssertionError(f"the loss asks for '{key}', but prepared only {', '.join(map(repr, self)) or 'nothing'}")


def _forwarded(model: RobustModel, prepared: Prepared, y: Tensor) -> dict[str, Output]:
    """Outputs on the views, each by the network that it is for; the same images once."""
    found: dict[tuple[int, int], Output] = {}
    outputs = {}
    for name, images in prepared.views.items():
        network = prepared.networks.get(name, model)
        key = id(images), id(network)
        found[key] = found.get(key) or network(images, y)
        outputs[name] = found[key]
    return outputs


def check_loss(loss: OuterLoss) -> None:
    """Named terms, each a mean over the batch with a gradient, from the views that `prepare` names."""
    check_spec(loss)
    who, stage = _name(loss), _Stage.set()
    runtime = build(loss.rehearsed(tiny_recipe()) if hasattr(loss, "rehearsed") else loss, stage.world)
    batch, progress = stage.batch(), stage.progress()
    x_adv, budget = stage.adversarial(batch), Budget(stage.epsilon(batch), weight=torch.ones(BATCH))
    stage.model.train()
    again: Prepared | None = None
    if not isinstance(runtime, nn.Module):
        weights = deepcopy(stage.model.state_dict())
        with _elsewhere():
            again = runtime.prepare(stage.scene(), budget, x_adv.clone())
        stage.model.load_state_dict(weights)
    with count_passes(stage.model) as count:
        with _left_as_found(stage.model, f"{who}.prepare", statistics=_mode(loss) != "train"):
            scene = stage.scene()
            arguments = [scene.batch.x.clone(), x_adv.clone()]
            prepared: Prepared = runtime.prepare(scene, budget, x_adv)
        for was, tensor in zip(arguments, (scene.batch.x, x_adv), strict=True):
            assert torch.equal(was, tensor), f"{who}.prepare changes its images; work on a copy"
        if again is not None:
            for first, second in ((prepared.views, again.views), (prepared.extras, again.extras)):
                assert _same_state(first, second), f"{who}.prepare gives something else when asked again; {_DRAW}"
        assert prepared.views, f"{who}.prepare names no images to forward"
        for name, images in prepared.views.items():
            assert images.shape == batch.x.shape, f"{who}: view '{name}' has shape {tuple(images.shape)}"
            assert bool(images.isfinite().all()), f"{who}: view '{name}' is not finite"
        unknown = set(prepared.shares) - set(prepared.views)
        assert not unknown, f"{who}: shares of views that are not prepared: {', '.join(sorted(unknown))}"
        if prepared.shares:
            total = sum(prepared.shares.values())
            assert set(prepared.shares) == set(prepared.views), f"{who}: give every view a share, or none"
            assert math.isclose(total, 1, abs_tol=1e-6), f"{who}: shares of the head's penalty sum to {total:g}"
        outputs = _Views(_forwarded(stage.model, prepared, batch.y))
        extras = _Views(prepared.extras)
        state = _state(runtime)
        targets: list[Tensor | None] = [None]
        if loss.needs_target:
            soft = torch.rand(BATCH, CLASSES, generator=torch.Generator().manual_seed(5)).softmax(dim=1)
            targets = [F.one_hot(batch.y, CLASSES).float(), soft]
        for target in targets:
            terms: dict[str, Tensor] = runtime(outputs, target, batch, extras, progress)
            assert terms, f"{who} gives no terms"
            for name, term in terms.items():
                assert isinstance(term, Tensor) and term.ndim == 0, (
                    f"{who}: the term '{name}' must be a scalar tensor; give the mean over the batch"
                )
                assert bool(term.isfinite()), f"{who}: the term '{name}' is {term.item()}"
            with _elsewhere():
                twice = runtime(outputs, target, batch, extras, progress)
            assert all(_same(term, twice[name]) for name, term in terms.items()), (
                f"{who}: two calls give two values; it is called twice in a step that perturbs weights"
            )
        assert _same_state(state, _state(runtime)), f"{who}: calling it changes its state; do that in observe"
        weight = stage.model.backbone.layers[0].weight  # type: ignore[union-attr, index]
        objective = torch.stack(list(terms.values())).sum()
        assert objective.requires_grad, f"{who}: no term has a gradient; do not detach the outputs"
        (gradient,) = torch.autograd.grad(objective, weight)
        assert bool(gradient.isfinite().all()) and bool((gradient != 0).any()), f"{who}: no gradient for the weights"
    declared, counted = loss.passes(progress), count.per_batch(BATCH)
    if hasattr(loss, "preparation"):
        declared += loss.preparation(progress)
    if isinstance(runtime, nn.Module) and list(runtime.parameters()):  # a companion's passes cannot be seen here
        assert declared.units >= counted.units, f"{who} declares {declared}, but makes {counted}; {_CHARGE}"
    else:
        assert declared == counted, f"{who} declares {declared}, but makes {counted}; {_CHARGE}"
    if not isinstance(runtime, nn.Module):
        whole = {name: term.item() for name, term in terms.items()}
        sums = dict.fromkeys(whole, 0.0)
        for rows in (slice(0, 4), slice(4, BATCH)):
            part = Batch(*(value[rows] for value in batch))
            cut = _Views({name: _cut(output, rows) for name, output in outputs.items()})
            held = _Views({name: v[rows] if len(v) == BATCH else v for name, v in extras.items()})
            pieces = runtime(cut, None if target is None else target[rows], part, held, progress)
            for name, term in pieces.items():
                sums[name] += term.item() * len(part.y) / BATCH
        for name, value in whole.items():
            assert math.isclose(value, sums[name], rel_tol=1e-4, abs_tol=1e-6), (
                f"{who}: the term '{name}' is no mean over the batch: {value:g} at once, {sums[name]:g} in two pieces; "
                "reduce by the mean over all images of the call"
            )


# Weights.


def check_weights(weights: WeightPerturbation) -> None:
    """The displacement is taken back, a step made inside is kept, and nothing else of the model changes."""
    check_spec(weights)
    who = _name(weights)
    for step in range(0, EPOCHS * STEPS, STEPS):
        seen = []
        for inside in ("nothing", "a step", "an error"):
            stage = _Stage.set()
            with _elsewhere():
                seen.append(_check_displaced(weights, stage, step, inside, f"{who} around {inside}"))
        assert _same_state(seen[0], seen[1]) and _same_state(seen[0], seen[2]), (
            f"{who}: three equal steps have three displacements; seed what is drawn by progress.step alone"
        )


def _check_displaced(weights: WeightPerturbation, stage: _Stage, step: int, inside: str, who: str) -> dict[str, Tensor]:
    """The weights inside."""
    batch, progress, model = stage.batch(step), stage.progress(step), stage.model
    model.train()
    asked = 0

    def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
        nonlocal asked
        asked += 1
        with model.using("train-frozen"), torch.enable_grad():
            value = F.cross_entropy(model(batch.x).logits, batch.y)
            return list(torch.autograd.grad(value, parameters))

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    held = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    try:
        with weights.displaced(model, gradients, progress):
            displaced = {name: p.detach().clone() for name, p in model.named_parameters()}
            if inside == "a step":
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(0.125)
            if inside == "an error":
                raise _Stop
    except _Stop:
        assert inside == "an error"
    else:
        assert inside != "an error", f"{who} hides the error"
    kept = 0.125 if inside == "a step" else 0.0
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, before[name] + kept, rtol=1e-5, atol=1e-6), (
            f"{who} leaves {name} elsewhere; take back in `finally:` what was added, and keep a step made inside"
        )
        assert _same(parameter.grad, held[name]), f"{who} changes the gradient of {name}"
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), f"{who} changes the buffer {name}"
    assert model.training, f"{who} changes the model's mode"
    pure = Passes(forward=1, parameter_backward=1)
    declared = weights.passes(progress, pure)
    counted = sum([pure] * asked, Passes())
    assert declared == counted, f"{who} declares {declared}, but makes {counted}; {_CHARGE}"
    return displaced


def check_average(average: WeightAverage) -> None:
    """A share of the old average between 0 and 1, whatever the step."""
    check_spec(average)
    for total in (1, 8, 1000):
        for step in {1, 2, max(1, total // 2), total}:
            decay = average.decay(step, total)
            assert 0 <= decay <= 1, f"{_name(average)}: the old average keeps {decay} after step {step} of {total}"


def check_schedule(schedule: Schedule) -> None:
    """Finite rates, a function of progress alone."""
    check_spec(schedule)
    who = _name(schedule)
    for epochs, steps in ((1, 1), (4, 3), (110, 390)):
        for step in sorted({0, 1, epochs * steps // 2, epochs * steps - 1} & set(range(epochs * steps))):
            progress = Progress.at(step, epochs, steps)
            rates = schedule(progress)
            assert rates == schedule(progress), (
                f"{who}: asked twice, it gives two rates; let it depend on progress alone"
            )
            assert math.isfinite(rates.lr_scale) and rates.lr_scale >= 0, f"{who}: lr_scale {rates.lr_scale}"
            momentum = rates.momentum
            assert momentum is None or 0 <= momentum < 1, f"{who}: momentum {momentum}"


def check_optimizer(optimizer: Optimizer) -> None:
    """Every parameter is moved, at its group's rate; the state is tensors and numbers, and can be loaded again."""
    check_spec(optimizer)
    who, stage = _name(optimizer), _Stage.set()
    assert optimizer.lr > 0, f"{who}: lr must be above 0, is {optimizer.lr}"
    stage.model.requires_grad_()

    def made(model: RobustModel) -> torch.optim.Optimizer:
        head = {"params": list(model.head.parameters()), "lr_scale": 0.5, "weight_decay": 0.0}
        return optimizer.build([{"params": list(model.backbone.parameters())}, head])

    built = made(stage.model)
    held = [id(p) for group in built.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in stage.model.parameters()), f"{who}: a parameter is missing or twice"
    heads = {id(p) for p in stage.model.head.parameters()}
    for group in built.param_groups:
        if any(id(p) in heads for p in group["params"]):
            assert group.get("lr_scale") == 0.5, f"{who} loses the group's option lr_scale"
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    for _ in range(2):
        for p in stage.model.parameters():
            p.grad = torch.full_like(p, 0.5)
        built.step()
    for name, p in stage.model.named_parameters():
        assert not torch.equal(p, before[name]), f"{who} does not move {name}"
    for state in built.state.values():
        for name, value in state.items():
            assert value is None or isinstance(value, (Tensor, int, float)), f"{who}: state '{name}' is no tensor"
