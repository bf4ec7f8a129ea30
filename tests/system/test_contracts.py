"""Every registered strategy keeps its kind's contract; and a contract check notices who does not."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from robustkit import evolve, setting, spec
from robustkit.attacks import PGD
from robustkit.core.batch import Batch, Budget, Output, Passes, Prepared, Progress
from robustkit.core.registry import FOLDERS, registry
from robustkit.core.strategy import Rates
from robustkit.epsilons import ECAS, Fixed
from robustkit.heads import GaussianMixture, Linear
from robustkit.losses import Align, CrossEntropy, Trades
from robustkit.objectives import KL, InverseObjective, Margin
from robustkit.targets import Inverse, Momentum, Natural, OneOff, Universal
from robustkit.testing import check, kind_of, tiny_recipe
from robustkit.threats import Linf
from robustkit.weights import AWP, Still

STRATEGIES = [(kind, name) for kind in FOLDERS for name in registry(kind).names()]


@pytest.mark.parametrize(("kind", "name"), STRATEGIES, ids=lambda word: word)
def test_registered(kind: str, name: str) -> None:
    strategy = registry(kind).get(name)()
    assert kind_of(strategy) == kind
    check(strategy)


VARIANTS = [
    PGD(steps=0),
    PGD(steps=0, start="gaussian"),
    PGD(steps=1, start="clean"),
    PGD(steps=3, start="gaussian", objective=KL()),
    PGD(steps=3, objective=Margin(clamp=False)),
    PGD(steps=3, step_size=0.5),
    PGD(steps=3, start_epsilon=12 / 255, final_epsilon=6 / 255),
    ECAS(step_follows="sample"),
    Fixed(value=0.01, step_fraction=0.25),
    Universal(objective=InverseObjective(beta=0.0), step_size=1 / 255),
    Universal(radius=0.0),
    Inverse(steps=0),
    Inverse(objective=InverseObjective(beta=0.0)),
    Momentum(inner=Natural(), start=0.0),
    Momentum(inner=Inverse(steps=1), start=1.0, gamma=1.0),
    Momentum(inner=Momentum(inner=Natural()), start=0.25),
    OneOff(inner=Universal(), start=0.5),
    OneOff(inner=Universal(), start=0.5, freeze="perturbation"),
    OneOff(inner=Momentum(), start=2.0),
    OneOff(inner=Inverse(steps=1), start=0.25),
    GaussianMixture(margin=0.0, likelihood_schedule="down"),
    GaussianMixture(likelihood_schedule="constant", centre_lr_scale=0.1, centre_weight_decay=0.0),
    Linear(zero_bias=True),
    Align(detach=False, label_smoothing=0.1),
    CrossEntropy(label_smoothing=1 / 3),
    Trades(weight=0.0),
    AWP(gamma=0.0),
    AWP(start=0.5),
]


@pytest.mark.parametrize("strategy", VARIANTS, ids=lambda strategy: repr(strategy)[:60])
def test_settings(strategy: Any) -> None:
    check(strategy)


# Who breaks a contract is caught, and told why.


@spec
class Leaves(PGD):  # type: ignore[misc]
    """Steps without projecting."""

    def __call__(self, predict: Any, x: Tensor, y: Tensor, budget: Budget, threat: Any, generator: Any) -> Tensor:
        return (threat.random(x, 2 * budget.epsilon, generator) + 0.1).clamp(0, 1)


@spec
class Attached(PGD):  # type: ignore[misc]
    """Returns an image that requires a gradient."""

    def __call__(self, predict: Any, x: Tensor, y: Tensor, budget: Budget, threat: Any, generator: Any) -> Tensor:
        return x.clone().requires_grad_()


@spec
class Drifts(PGD):  # type: ignore[misc]
    """Forgets to say in which mode it forwards."""

    def __call__(self, predict: Any, x: Tensor, y: Tensor, budget: Budget, threat: Any, generator: Any) -> Tensor:
        predict(x)
        return x.clone()

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=1)


@spec
class Collects(PGD):  # type: ignore[misc]
    """Calls backward, so that parameters collect gradients."""

    def __call__(self, predict: Any, x: Tensor, y: Tensor, budget: Budget, threat: Any, generator: Any) -> Tensor:
        with torch.enable_grad(), predict.using("eval") as predict:
            images = x.clone().requires_grad_()
            predict(images).logits.sum().backward()
        return x.clone()


@spec
class Global(PGD):  # type: ignore[misc]
    """Draws from torch's global generator."""

    def __call__(self, predict: Any, x: Tensor, y: Tensor, budget: Budget, threat: Any, generator: Any) -> Tensor:
        return threat.project(x + torch.randn_like(x), x, budget.epsilon)

    def passes(self, progress: Progress) -> Passes:
        return Passes()


@spec
class Cheap(PGD):  # type: ignore[misc]
    """Says it costs nothing."""

    def passes(self, progress: Progress) -> Passes:
        return Passes()


@spec
class Stays(PGD):  # type: ignore[misc]
    """Leaves the model in eval mode when something goes wrong."""

    def __call__(self, predict: Any, x: Tensor, y: Tensor, budget: Budget, threat: Any, generator: Any) -> Tensor:
        was = predict.model.training
        predict.model.eval()
        with torch.no_grad():
            predict(x)
        predict.model.train(was)
        return x.clone()

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=1)


@spec
class OneRow(Fixed):  # type: ignore[misc]
    """One radius instead of one for each image."""

    def __call__(self, scene: Any) -> Budget:
        return Budget(torch.tensor([0.1]))


@spec
class Overfull(Natural):  # type: ignore[misc]
    """Rows that do not sum to one."""

    def __call__(self, output: Output | None, batch: Batch, progress: Progress) -> Tensor:
        assert output is not None
        return output.logits.sigmoid()


@spec
class Hidden(Natural):  # type: ignore[misc]
    """Keeps its state where no checkpoint finds it."""

    def build(self, world: Any) -> nn.Module:
        return HiddenState()


class HiddenState(nn.Module):
    mode: ClassVar[str] = "train"

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def prepare(self, scene: Any, budget: Budget, x_adv: Tensor, *, advance: bool = True) -> Tensor | None:
        return scene.batch.x  # type: ignore[no-any-return]

    def forward(self, output: Output | None, batch: Batch, progress: Progress) -> Tensor:
        assert output is not None
        return (output.logits * (1 + self.calls)).softmax(dim=1)

    def observe(self, record: Any) -> None:
        self.calls += 1


@spec
class Impatient(Universal):  # type: ignore[misc]
    """Moves its state although it was asked not to."""

    def build(self, world: Any) -> nn.Module:
        runtime = super().build(world)
        prepare = runtime.prepare
        runtime.prepare = lambda scene, budget, x_adv, *, advance=True: prepare(scene, budget, x_adv)  # type: ignore
        return runtime


@spec
class SumLoss(CrossEntropy):  # type: ignore[misc]
    """A sum instead of a mean."""

    def __call__(self, outputs: Any, target: Any, batch: Batch, extras: Any, progress: Progress) -> dict[str, Tensor]:
        terms = super().__call__(outputs, target, batch, extras, progress)
        return {name: term * len(batch.y) for name, term in terms.items()}


@spec
class Undeclared(CrossEntropy):  # type: ignore[misc]
    """Uses a view that it did not prepare."""

    def __call__(self, outputs: Any, target: Any, batch: Batch, extras: Any, progress: Progress) -> dict[str, Tensor]:
        return {"natural": outputs["natural"].logits.mean()}


@spec
class Constant(CrossEntropy):  # type: ignore[misc]
    """Has no gradient."""

    def prepare(self, scene: Any, budget: Budget, x_adv: Tensor) -> Prepared:
        return Prepared({"adversarial": x_adv})

    def __call__(self, outputs: Any, target: Any, batch: Batch, extras: Any, progress: Progress) -> dict[str, Tensor]:
        return {"nothing": outputs["adversarial"].logits.detach().mean()}


@spec
class Margined(GaussianMixture):  # type: ignore[misc]
    """Puts the margin into the logits."""

    def build(self, width: int, classes: int) -> Any:
        head = super().build(width, classes)
        plain = head.forward
        head.forward = lambda f, y=None: plain(f, y)._replace(logits=plain(f, y).margined)  # type: ignore
        return head


@spec
class Displaced(Still):  # type: ignore[misc]
    """Does not come back."""

    def displaced(self, model: nn.Module, gradients: Any, progress: Progress) -> Any:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)
        return super().displaced(model, gradients, progress)


@spec
class Sharp(Linf):  # type: ignore[misc]
    """Projects to a ball that is too large."""

    def project(self, x_adv: Tensor, x: Tensor, epsilon: Tensor) -> Tensor:
        return super().project(x_adv, x, 2 * epsilon)  # type: ignore[no-any-return]


@spec
class Remembers:
    """A schedule with a memory."""

    at: tuple[float, ...] = setting(default=(0.5,))

    def __call__(self, progress: Progress) -> Rates:
        calls = getattr(type(self), "calls", 0) + 1
        type(self).calls = calls  # type: ignore[attr-defined]
        return Rates(1 / calls)


@spec
class Clean(PGD):  # type: ignore[misc]
    """Gives images as they are, in ways that a GPU would suffer from."""

    def __call__(self, predict: Any, x: Tensor, y: Tensor, budget: Budget, threat: Any, generator: Any) -> Tensor:
        return x.clone()

    def passes(self, progress: Progress) -> Passes:
        return Passes()


@spec
class Asks(Clean):
    """Branches on a number."""

    def __call__(self, predict: Any, x: Tensor, *others: Any) -> Tensor:
        return x.clone() if x.max() <= 1 else x.clamp(0, 1)


@spec
class Fetches(Clean):
    """Looks at the labels."""

    def __call__(self, predict: Any, x: Tensor, y: Tensor, *others: Any) -> Tensor:
        return torch.stack([x[row] for row, _ in enumerate(y.tolist())])


@spec
class Masks(Clean):
    """Works on some images alone."""

    def __call__(self, predict: Any, x: Tensor, y: Tensor, *others: Any) -> Tensor:
        x = x.clone()
        x[y > 1] = x[y > 1].clamp(0, 1)
        return x


@spec
class Stranded(Clean):
    """Makes a tensor on the CPU."""

    def __call__(self, predict: Any, x: Tensor, *others: Any) -> Tensor:
        return (x + torch.zeros(len(x), 1, 1, 1)).clamp(0, 1)


@spec
class Indexed(Clean):
    """Picks rows by numbers on the CPU."""

    def __call__(self, predict: Any, x: Tensor, *others: Any) -> Tensor:
        return x[torch.arange(len(x))]


@spec
class Moves(Clean):
    """Makes a tensor on the CPU, and waits until it is on the device."""

    def __call__(self, predict: Any, x: Tensor, *others: Any) -> Tensor:
        return (x + torch.zeros(len(x), 1, 1, 1).to(x.device)).clamp(0, 1)


@spec
class Lists(Clean):
    """Makes a tensor there of numbers here."""

    def __call__(self, predict: Any, x: Tensor, *others: Any) -> Tensor:
        return x * torch.tensor([1.0], device=x.device)


@spec
class Recorded(Clean):
    """Copies in the midst of what is recorded."""

    def __call__(self, predict: Any, x: Tensor, *others: Any) -> Tensor:
        def double(x: Tensor) -> Tensor:
            return x * torch.ones(1).to(x.device, non_blocking=True)

        with predict.using("eval") as predict:
            return predict.repeatedly("double", double, (x,)) if hasattr(predict, "repeatedly") else double(x)


@spec
class Arrays(Clean):
    """Leaves torch for numpy."""

    def __call__(self, predict: Any, x: Tensor, *others: Any) -> Tensor:
        return torch.from_numpy(x.numpy().clip(0, 1))


BROKEN = [
    ("attack", Leaves, "left the ball"),
    ("attack", Attached, "detached"),
    ("attack", Drifts, "changed the buffer"),
    ("attack", Collects, "changed the gradient"),
    ("attack", Global, "under the same seed"),
    ("attack", Cheap, "declares"),
    ("attack", Stays, "stopped by an error in predict, changed the mode"),
    ("epsilon", OneRow, r"epsilon must be \(B,\)"),
    ("target", Overfull, "rows sum to"),
    ("target", Hidden, "went through a checkpoint"),
    ("target", Impatient, "advance=False"),
    ("loss", SumLoss, "no mean over the batch"),
    ("loss", Undeclared, "asks for 'natural'"),
    ("loss", Constant, "no term has a gradient"),
    ("head", Margined, "logits depend on the label"),
    ("weights", Displaced, "leaves .* elsewhere"),
    ("threat", Sharp, "left the ball"),
    ("schedule", Remembers, "asked twice"),
    ("attack", Asks, r"waits for the device, .* \(.*test_contracts.py:\d+\); compute with tensors"),
    ("attack", Fetches, r"waits for the device: it copies from there \(.*test_contracts.py:\d+\)"),
    ("attack", Masks, r"waits for the device: how many images a mask picks"),
    (
        "attack",
        Stranded,
        r"a tensor on the CPU meet one on the device in add \(.*contracts.py:\d+\); make tensors",
    ),
    ("attack", Indexed, r"a tensor on the CPU meet one on the device in index"),
    ("attack", Moves, r"waits for the device: it copies to there .*; move it once"),
    ("attack", Lists, r"waits for the device: it makes a tensor there of numbers here"),
    ("attack", Recorded, r"in the midst of what is recorded"),
    ("attack", Arrays, r"fails on a device that is not the CPU"),
]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers a class for one test, so that other tests do not meet it."""

    def claim(kind: str, cls: type) -> None:
        monkeypatch.setitem(registry(kind)._classes, "broken", cls)
        monkeypatch.setitem(registry(kind)._names, cls, "broken")

    return claim


@pytest.mark.parametrize(("kind", "cls", "words"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_notices(kind: str, cls: Any, words: str, register: Any) -> None:
    register(kind, cls)
    with pytest.raises(AssertionError, match=words):
        check(cls())


def test_who_waits_on_purpose_says_so(register: Any) -> None:
    @spec
    class Declared(Asks):
        waits: ClassVar[bool] = True

    register("attack", Declared)
    check(Declared())


def test_notices_what_is_not_registered() -> None:
    with pytest.raises(AssertionError, match="registered for no kind"):
        check(Leaves())


def test_notices_missing_members(register: Any) -> None:
    @spec
    class Bare:
        pass

    register("attack", Bare)
    with pytest.raises(AssertionError, match="has no reach, passes, __call__"):
        check(Bare())


def test_tiny_recipe_fills_in_what_parts_need() -> None:
    assert tiny_recipe(loss=Align()).target == Natural()
    assert tiny_recipe(target=Universal()).loss == Align()
    assert evolve(tiny_recipe(), epochs=1).attack == PGD(steps=2)
