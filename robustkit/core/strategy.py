"""The contracts between strategies and the loop: one protocol for each kind of part. Read this page first.

A strategy is a spec (see `core.spec`) that answers one question. One without state is its own runtime; one with state
has `build(world) -> nn.Module`, whose buffers and parameters are saved, restored and equal in every process. Each
says what it costs (`passes`), and every strategy that forwards images names the mode in which it does.

What only some have, and the loop asks for where it is there. Of specs:

- `check(recipe)` raises RecipeError where it does not fit the rest of the recipe; `accumulates` False: nor pieces of a
  batch.
- `sought`, of a data set: what is looked for on the disk, and where (`datasets.location.Sought`); `robustkit doctor`
  says whether it is there.
- `clip_norm`, of an optimiser: gradients longer than that (None: none) are shortened to it before each step.
- `interval`: its passes repeat every so many steps (else: every step). `passes_in(recipe, progress)`, of an epsilon
  schedule or an attack: its passes where they depend on the rest of the recipe. `stops_early` True: what is declared is
  the most that it makes, or has the attack make.
- `step_counts`, of an epsilon schedule: how many steps equal parts of a batch take, at most.
- `waits` True: some of its steps wait for the device on purpose; otherwise `testing.check` takes that for an oversight.
- `rehearsed(recipe)`: itself with untrained networks in place of those it would load, for smoke runs and tests.

Of runtimes:

- `ready() -> {what: in words}` loads what training needs besides data (a trained network), before training begins.
- `observe(record)`, once after each step.
- `watched() -> {name: attack}`: accuracy on the validation images under each is measured after each epoch, and
  `after_epoch(report) -> "keep" | "rewind" | None` then says whether to keep the weights, or to go back to those kept;
  it may add to the report.
- `trains_itself` True: its parameters are none of the recipe's optimiser's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor, nn

from robustkit.core.batch import Batch, Budget, Mode, Output, Part, Passes, Prepared, Progress
from robustkit.core.rng import Generator
from robustkit.core.spec import kind
from robustkit.core.world import World

if TYPE_CHECKING:
    from robustkit.data.augment import Augmentation
    from robustkit.data.images import Data


class Predict(Protocol):
    """The engine's way to forward images through the model without touching it: how, is the engine's business."""

    def __call__(self, images: Tensor) -> Output:
        """Logits and features of `images` (B, C, H, W), any range; differentiable with respect to the images."""

    def using(self, mode: Mode) -> AbstractContextManager[Predict]:
        """`with predict.using("eval") as predict:` forwards in that mode; the model's own mode returns afterwards."""


@runtime_checkable
class Repeating(Predict, Protocol):
    """A `predict` that may record what an attack, or a target, does, and replay it."""

    def repeatedly(self, key: Hashable, function: Callable[..., Tensor], tensors: tuple[Any, ...]) -> Tensor:
        """`function(*tensors)`, which forwards through this `predict`.

        Whenever `key` is the same it does the same; all that may differ is in `tensors` (tensors, or tuples of them).
        """


def _no_rehearsal(scene: Scene, budget: Budget, x_adv: Tensor, loss: LossRuntime | None) -> Predict:
    raise RuntimeError("this scene is of no training step: there is nothing to rehearse")


@attrs.frozen
class Scene:
    """All that a training-time strategy may look at."""

    predict: Predict
    batch: Batch
    progress: Progress
    threat: ThreatModel
    attack: Attack | None
    world: World
    part: Part
    stepped: Callable[[Scene, Budget, Tensor, LossRuntime | None], Predict] = _no_rehearsal

    def generator(self, purpose: str) -> Generator:
        """Draws for one purpose of this step; asking twice for a purpose gives the same draws."""
        return self.world.generator(purpose, self.progress, self.part)

    def rehearse(self, budget: Budget, x_adv: Tensor, loss: LossRuntime | None = None) -> Predict:
        """`predict` of a copy of the model, in training mode, after one training step on `x_adv` that is never made.

        The step is the recipe's own (loss, weight perturbation, this step's rate), of an optimiser without history;
        `loss` takes the place of the recipe's. Costs one pure pass and what the weight perturbation adds.
        """
        return self.stepped(self, budget, x_adv, loss)


@attrs.frozen
class Record:
    """What a step did, for strategies that remember (`observe`) and for the log."""

    batch: Batch
    progress: Progress
    budget: Budget
    x_adv: Tensor
    outputs: dict[str, Output]
    target: Tensor | None
    terms: dict[str, Tensor]


class Reference(NamedTuple):
    """Constants that an objective compares with: the model's output on the image, and on its adversarial example."""

    natural: Output | None = None
    adversarial: Output | None = None


class Rates(NamedTuple):
    """What an LR schedule sets for one step: a factor on each group's rate, and a momentum (None: as configured)."""

    lr_scale: float
    momentum: float | None = None


@runtime_checkable
@kind("threat")
class ThreatModel(Protocol):
    """Where may an image go? A ball around it, and the box [0, 1]."""

    @property
    def epsilon(self) -> float:
        """The radius that the model is judged at, in pixels of [0, 1]."""

    @property
    def norm(self) -> Literal["Linf", "L2", "L1"]: ...

    def random(self, x: Tensor, epsilon: Tensor, generator: Generator) -> Tensor:
        """A random image within `epsilon` (B,) of `x` (B, C, H, W), in the box."""

    def project(self, x_adv: Tensor, x: Tensor, epsilon: Tensor) -> Tensor:
        """The nearest allowed image: into the ball first, into the box last."""

    def ascend(self, gradient: Tensor) -> Tensor:
        """The steepest direction of unit length in this norm, per image; zero where the gradient is zero."""

    def size(self, perturbation: Tensor) -> Tensor:
        """The norm of each perturbation, (B,)."""


@runtime_checkable
@kind("epsilon")
class EpsilonSchedule(Protocol):
    """How hard, for each image?"""

    @property
    def sets_step_size(self) -> bool:
        """Whether the budget carries a step size (then the attack must not)."""

    def passes(self, progress: Progress) -> Passes: ...


class EpsilonRuntime(Protocol):
    """What an epsilon schedule does: the spec itself, or what its `build(world)` makes."""

    def __call__(self, scene: Scene) -> Budget: ...


@runtime_checkable
@kind("objective")
class Objective(Protocol):
    """What does an attack climb? A value for each image."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the model's output on the image itself."""

    def __call__(self, output: Output, y: Tensor, reference: Reference) -> Tensor:
        """(B,), to be maximised."""


@runtime_checkable
@kind("attack")
class Attack(Protocol):
    """How do we get there? A stateless attack nests in others and serves evaluation as it stands."""

    @property
    def reach(self) -> float:
        """How many epsilon the result may lie from the image (1 for most).

        One with a `threat` of its own keeps to that ball: its radii stand to the budget's as `threat.epsilon` to the
        recipe's.
        """

    def __call__(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        """Adversarial images like `x` (B, C, H, W), detached, in [0, 1]. Leaves the model as it was."""

    def passes(self, progress: Progress) -> Passes: ...


@runtime_checkable
@kind("target")
class TargetDistribution(Protocol):
    """What should the prediction match? Rows of probabilities."""

    @property
    def mode(self) -> Mode:
        """The mode of the pass that forwards the images which `prepare` returns."""

    def passes(self, progress: Progress) -> Passes:
        """What `prepare` costs, and one forward where it returns images."""


class TargetRuntime(Protocol):
    """What a target distribution does: the spec itself, or what its `build(world)` makes."""

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor, *, advance: bool = True) -> Tensor | None:
        """The images to forward for this step's target, or None where no forward is needed.

        Called exactly once per step; may advance the strategy's state, unless `advance` is false.
        """

    def __call__(self, output: Output | None, batch: Batch, progress: Progress) -> Tensor:
        """(B, K) probabilities in float32, from the output on the prepared images."""

    def observe(self, record: Record) -> None:
        """Called once after the optimiser's step; `record.target` is what was used."""


@runtime_checkable
@kind("head")
class Head(Protocol):
    """How do features become logits?"""

    def build(self, width: int, classes: int) -> nn.Module:
        """A module `(features (B, D), y (B,) or None) -> Output`; a margin applies only where y is given."""

    def penalty_weight(self, progress: Progress) -> float:
        """The factor on `Output.penalty` in the objective of this step."""

    def parameter_options(self) -> dict[str, float]:
        """Options of the head's parameter group: `lr_scale`, `weight_decay`."""


@runtime_checkable
@kind("loss")
class OuterLoss(Protocol):
    """What is minimised?"""

    @property
    def needs_target(self) -> bool: ...

    @property
    def detach_target(self) -> bool:
        """Whether the target is a constant; otherwise its forward is part of the pure pass."""

    def passes(self, progress: Progress) -> Passes:
        """What one pure pass costs, as often as it is made.

        One that costs more once a step has `preparation(progress)`, too: what its `prepare` forwards, and backwards
        through a companion network, of which the gradient of a weight perturbation needs none.
        """


class LossRuntime(Protocol):
    """What an outer loss does: the spec itself, or what its `build(world)` makes."""

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Prepared: ...

    def __call__(
        self,
        outputs: dict[str, Output],
        target: Tensor | None,
        batch: Batch,
        extras: dict[str, Tensor],
        progress: Progress,
    ) -> dict[str, Tensor]:
        """Named terms, each a mean over the batch; their sum is the objective, their names are the log."""


Gradients = Callable[[Sequence[Tensor]], list[Tensor]]
"""Gradients of this step's objective with respect to the given parameters: one more pure pass, statistics untouched,
summed over processes."""


@runtime_checkable
@kind("weights")
class WeightPerturbation(Protocol):
    """Where are the weights when we step?"""

    @property
    def accumulates(self) -> bool:
        """Whether it means the same when the batch is worked through in pieces."""

    def displaced(self, model: nn.Module, gradients: Gradients, progress: Progress) -> AbstractContextManager[None]:
        """Weights displaced inside; on leaving, the displacement is taken back and a step made inside is kept."""

    def passes(self, progress: Progress, pure: Passes) -> Passes:
        """What it adds to a step whose pure pass costs `pure`."""


@runtime_checkable
@kind("average")
class WeightAverage(Protocol):
    """Which weights are kept? An average over steps; validation, best and last use it."""

    def decay(self, step: int, total_steps: int) -> float:
        """The weight of the old average after optimiser step number `step` (counted from 1)."""


@runtime_checkable
@kind("optimizer")
class Optimizer(Protocol):
    """How do parameters move?"""

    @property
    def lr(self) -> float: ...

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Groups carry `params` and may carry `lr_scale`, `weight_decay`, and `norm` (of normalisations: true)."""


@runtime_checkable
@kind("schedule")
class Schedule(Protocol):
    """Which learning rate, when? A function of progress, so that nothing needs saving."""

    def __call__(self, progress: Progress) -> Rates: ...


@runtime_checkable
@kind("dataset")
class Dataset(Protocol):
    """Which images?"""

    @property
    def augmentation(self) -> Augmentation | None:
        """How training images are varied."""

    @property
    def facts(self) -> tuple[tuple[int, int, int] | None, int | None]:
        """Image shape and class count, as far as they are known without loading."""

    def load(self) -> Data:
        """Training and test images, and the names of the classes.

        Raises:
            DataError: they are missing or unreadable; the line says how to get them.
        """


class Outcomes(NamedTuple):
    """What a measure found: (B,) bool, still right; accuracy after each of its stages, if it has some; warnings.

    `shares` are further shares of these images, by name, for each stage that has some.
    """

    right: Tensor
    breakdown: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    shares: dict[str, dict[str, float]] = {}


@attrs.frozen(kw_only=True)
class Subject:
    """Whom a measure judges, in eval mode and float32, and in which ball."""

    predict: Predict
    logits: nn.Module  # the same as a module: images (B, C, H, W) in [0, 1] -> logits (B, K) float32
    threat: ThreatModel


class Slice(NamedTuple):
    """Test images that are judged together: x (B, C, H, W) in [0, 1], y (B,), and the slice's number."""

    x: Tensor
    y: Tensor
    number: int = 0


@runtime_checkable
@kind("measure")
class Measure(Protocol):
    """What is reported of a finished model?

    It may also have `images` (judge so many test images), `slice_size` (images per slice, else the batch size),
    `remarks(breakdown)`, further notes on the breakdown over all images, `passes(norm, classes)`, what it costs per
    image where half of the images resist. `calibrated(logits, held_out)` gives itself, with settings from batches of
    training images that a run held out, `ready(threat, world)` itself, ready for that ball and with what
    it found filled in, before anything is judged or trained; or raises UserError where a library or a network that it
    needs is missing.
    """

    @property
    def key(self) -> str:
        """Its name in results.json."""

    def outcomes(self, subject: Subject, part: Slice, seed: int, before: Outcomes | None = None) -> Iterator[Outcomes]:
        """Yields which images of the slice are still right after each of its stages; most measures have one.

        A function of the arguments alone. What was yielded is on disk before the next stage begins: an evaluation that
        was killed passes the last as `before`, and the measure goes on after that stage.
        """


def build(strategy: Any, world: World) -> Any:
    """The runtime of a strategy: what its `build` makes, or the spec itself where it has no state."""
    return strategy.build(world) if hasattr(strategy, "build") else strategy
