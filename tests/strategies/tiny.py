"""A small conv + BatchNorm model, scenes around it, and snapshots of all that a strategy must leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core.batch import Batch, Mode, Output, Part, Progress
from robustkit.core.model import RobustModel
from robustkit.core.strategy import Attack, Scene, ThreatModel
from robustkit.core.world import World
from robustkit.engine import Predictor
from robustkit.heads import GaussianMixture, Linear
from robustkit.threats import Linf

CHANNELS, SIZE, CLASSES, WIDTH = 2, 6, 4, 5
SHAPE = (CHANNELS, SIZE, SIZE)


class Backbone(nn.Module):
    """conv-BN-ReLU twice, then a mean over places: (B, 2, H, W) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(CHANNELS, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, WIDTH, 3, stride=2, padding=1),
            nn.BatchNorm2d(WIDTH),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(dim=(2, 3))


class LinearModel(nn.Module):
    """An affine map of the pixels without anything else: the oracle of many a closed form."""

    def __init__(self, classes: int, pixels: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, pixels, generator=generator))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        features = x.flatten(1)
        logits = features @ self.weight.T
        return Output(logits, logits, features, logits.new_zeros(len(logits)))


def tiny_model(seed: int = 0, *, mixture: bool = False, warm: bool = True) -> RobustModel:
    """In training mode, with running statistics and BatchNorm weights that are not the trivial ones."""
    torch.manual_seed(seed)
    head = GaussianMixture() if mixture else Linear()
    model = RobustModel(Backbone(), head.build(WIDTH, CLASSES), None)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(3)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
        if warm:
            for _ in range(3):
                model.train()(torch.rand(8, *SHAPE))
    return model.train()


def images(count: int = 6, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def labels(count: int = 6, classes: int = CLASSES) -> Tensor:
    return torch.arange(count) % classes


def batch(count: int = 6, seed: int = 0, index: Tensor | None = None) -> Batch:
    return Batch(images(count, seed), labels(count), torch.arange(count) if index is None else index)


def world(samples: int = 32, seed: int = 0) -> World:
    return World(samples=samples, training=samples, classes=CLASSES, image_shape=SHAPE, seed=seed)


def scene(
    model: nn.Module,
    given: Batch | None = None,
    *,
    step: int = 0,
    epochs: int = 10,
    steps_per_epoch: int = 4,
    threat: ThreatModel | None = None,
    attack: Attack | None = None,
    where: World | None = None,
) -> Scene:
    given = batch() if given is None else given
    count = len(given.y)
    return Scene(
        predict=Plain(model) if not isinstance(model, RobustModel) else Predictor(model, torch.device("cpu")),
        batch=given,
        progress=Progress.at(step, epochs, steps_per_epoch),
        threat=threat or Linf(),
        attack=attack,
        world=where or world(),
        part=Part(0, count, count),
    )


def at_epoch(epoch: int, epochs: int, steps_per_epoch: int = 1) -> Progress:
    return Progress.at(epoch * steps_per_epoch, epochs, steps_per_epoch)


class Plain:
    """The plainest `predict`: the module as it is, in whatever precision it has."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, images: Tensor) -> Output:
        return self.model(images)

    @contextmanager
    def using(self, mode: Mode) -> Iterator[Plain]:
        if isinstance(self.model, RobustModel):
            with self.model.using(mode):
                yield self
            return
        was = self.model.training
        self.model.train(mode != "eval")
        try:
            yield self
        finally:
            self.model.train(was)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Weights, gradients, buffers and flags, copied."""
    kept: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        kept[f"state {name}"] = tensor.clone()
    for name, parameter in model.named_parameters():
        kept[f"grad {name}"] = None if parameter.grad is None else parameter.grad.clone()
        kept[f"requires {name}"] = parameter.requires_grad
    for name, module in model.named_modules():
        kept[f"training {name}"] = module.training
        kept[f"tracking {name}"] = getattr(module, "track_running_stats", None)
    return kept


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    changed = [
        name
        for name, value in before.items()
        if not (
            torch.equal(value, after[name])
            if isinstance(value, Tensor) and after[name] is not None
            else value is after[name] or value == after[name]
        )
    ]
    assert changed == []


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """BatchNorm's buffers, copied."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def tracked(model: nn.Module) -> int:
    """How many batches each BatchNorm layer has seen (all must agree)."""
    counts = {int(norm.num_batches_tracked) for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)}
    assert len(counts) == 1
    return counts.pop()


class Always(Plain):
    """A net that stays in eval mode whatever it is asked for, so that images are masked and yet independent."""

    @contextmanager
    def using(self, mode: Mode) -> Iterator[Plain]:
        with super().using("eval"):
            yield self


class Counting(Plain):
    """Notes how many images each forward saw."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.sizes: list[int] = []

    def __call__(self, images: Tensor) -> Output:
        self.sizes.append(len(images))
        return super().__call__(images)
