"""Everything a strategy may look at, small; and what says whether it was left as it was found."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, cast
from unittest.mock import patch

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.batch import Batch, Budget, Mode, Output, Part, Prepared, Progress
from robustkit.core.model import RobustModel
from robustkit.core.registry import registry
from robustkit.core.rng import Generator, derive
from robustkit.core.strategy import LossRuntime, Predict, Scene, ThreatModel
from robustkit.core.world import World
from robustkit.engine import Predictor
from robustkit.testing.common import same
from robustkit.testing.tiny import BATCH, CLASSES, EPOCHS, SHAPE, STEPS, WIDTH

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
class Stage:
    model: RobustModel
    threat: ThreatModel
    world: World
    x: Tensor
    y: Tensor

    @classmethod
    def set(cls, threat: ThreatModel | None = None) -> Stage:
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
                outputs = forwarded(model, prepared, y)
                terms = loss(outputs, None, scene.batch, prepared.extras, scene.progress)
                value = torch.stack(list(terms.values())).sum()
            gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            torch._foreach_sub_(parameters, gradients, alpha=0.1)
        return Predictor(model.train(), self.world.device)

    def predict(self) -> Watched:
        return Watched(self.model, self.world.device)

    def epsilon(self, batch: Batch) -> Tensor:
        return torch.full((len(batch.y),), self.threat.epsilon)

    def adversarial(self, batch: Batch, step: int = 0) -> Tensor:
        generator = Generator(derive(7, step), Part(0, len(batch.y), len(batch.y)), self.world.device)
        return self.threat.random(batch.x, self.epsilon(batch), generator)


class Stop(Exception):
    """Thrown by a `predict` in the middle."""


class Watched(Predictor):
    """A predictor that notes in which modes it was asked, and gives up after some calls if told to."""

    def __init__(self, model: RobustModel, device: torch.device) -> None:
        super().__init__(model, device)
        self.modes: set[Mode] = set()
        self.calls = 0
        self.gives_up_after: int | None = None

    def __call__(self, images: Tensor, y: Tensor | None = None) -> Output:
        if self.gives_up_after is not None and self.calls >= self.gives_up_after:
            raise Stop
        self.calls += 1
        return super().__call__(images, y)

    @contextmanager
    def using(self, mode: Mode) -> Iterator[Predictor]:
        self.modes.add(mode)
        with super().using(mode):
            yield self


class Draws(Generator):
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


def forwarded(model: RobustModel, prepared: Prepared, y: Tensor) -> dict[str, Output]:
    """Outputs on the views, each by the network that it is for; the same images once."""
    found: dict[tuple[int, int], Output] = {}
    outputs = {}
    for name, images in prepared.views.items():
        network = prepared.networks.get(name, model)
        key = id(images), id(network)
        found[key] = found.get(key) or network(images, y)
        outputs[name] = found[key]
    return outputs


@contextmanager
def elsewhere() -> Iterator[None]:
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
def left_as_found(model: RobustModel, who: str, *, statistics: bool = True) -> Iterator[None]:
    """The model's modes, weights, gradients (and statistics) are the same afterwards, also after a `Stop`."""

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
            assert same(was, after[what]), f"{who} changed {what}; {remedy}"
