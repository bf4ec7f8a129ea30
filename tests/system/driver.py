"""Runs every recipe of a folder, as one process of several: `driver.py <folder of recipes> <folder for runs>`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from timm.models import register_model
from torch import Tensor, nn

from robustkit import registry, spec
from robustkit.core.batch import Batch, Budget, Output, Passes, Prepared, Progress
from robustkit.core.strategy import OuterLoss, Scene
from robustkit.losses import CrossEntropy


class Plain(nn.Module):
    """A net without batch statistics."""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_chans, 16, 3, 2), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Tanh(), nn.Flatten()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Smooth(nn.Module):
    """A net with batch statistics in which nothing turns at 0: under L2 rounding stays rounding, on any processor."""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        widths = ((in_chans, 8, 2), (8, 16, 1))
        layers = [(nn.Conv2d(a, b, 3, stride, bias=False), nn.BatchNorm2d(b), nn.Tanh()) for a, b, stride in widths]
        self.layers = nn.Sequential(*(layer for block in layers for layer in block), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


@register_model
def robustkit_test_smooth(pretrained: bool = False, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    return Smooth(in_chans)


@register_model
def robustkit_test_plain(pretrained: bool = False, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    return Plain(in_chans)


class Infinite(torch.autograd.Function):
    """The same number, with an infinite slope."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


@spec
class Faulty:
    """Another loss, and a term that goes wrong in some steps (counted from 1).

    With "nan" and "inf" the objective alone does: its gradient is finite. `where` is the piece of the batch, and so the
    process, that holds its first or its last image.
    """

    steps: tuple[int, ...] = (6,)
    fault: Literal["nan", "inf", "gradient"] = "nan"
    where: Literal["anywhere", "first", "last"] = "anywhere"
    base: OuterLoss = CrossEntropy()
    accumulates: ClassVar[bool] = True
    detach_target: ClassVar[bool] = True

    @property
    def needs_target(self) -> bool:
        return self.base.needs_target

    def passes(self, progress: Progress) -> Passes:
        return self.base.passes(progress)

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Prepared:
        prepared, part = self.base.prepare(scene, budget, x_adv), scene.part
        there = {"anywhere": True, "first": part.start == 0, "last": part.stop == part.total}[self.where]
        struck = there and scene.progress.step + 1 in self.steps
        return prepared._replace(extras=prepared.extras | {"struck": torch.tensor(struck)})

    def __call__(
        self,
        outputs: dict[str, Output],
        target: Tensor | None,
        batch: Batch,
        extras: dict[str, Tensor],
        progress: Progress,
    ) -> dict[str, Tensor]:
        terms = self.base(outputs, target, batch, extras, progress)
        value = next(iter(outputs.values())).logits.sum() * 0
        if bool(extras["struck"]):
            value = Infinite.apply(value) if self.fault == "gradient" else value + float(self.fault)
        return terms | {"struck": value}


@contextmanager
def faulty_known() -> Iterator[None]:
    """Registered inside, and nowhere else: other tests go through all names there are."""
    names = registry("loss")
    names.register("faulty")(Faulty)
    try:
        yield
    finally:
        names._classes.pop("faulty", None)
        names._names.pop(Faulty, None)


def no_figures() -> ModuleType:
    """What stands in for the drawing of figures."""
    stub = ModuleType("robustkit.reporting.figures")
    stub.draw = lambda *arguments, **options: None  # type: ignore[attr-defined]
    return stub


def free_port() -> int:
    """Of this machine, at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(processes: int, recipes: Path, out: Path, data: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """This file, in so many processes; what they print is in rank-0.txt, ... of `out`. At the end they are gone."""
    port = free_port()
    found: list[subprocess.Popen[bytes]] = []
    out.mkdir()
    try:
        for rank in range(processes):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true",
                "OMP_NUM_THREADS": "1",
                "ROBUSTKIT_DATA_DIR": str(data),
            }
            with (out / f"rank-{rank}.txt").open("w") as log:
                command = [sys.executable, __file__, str(recipes), str(out)]
                found.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait(timeout=30)


def main(recipes: Path, out: Path) -> None:
    from robustkit import load_recipe, resume, run

    sys.modules["robustkit.reporting.figures"] = no_figures()
    torch.set_num_threads(1)
    with faulty_known():
        for path in sorted(recipes.glob("*.json")):
            print(path.stem, flush=True)
            folder = out / path.stem
            if "resumed" in path.stem:
                run(load_recipe(path), out=folder, device="cpu", max_steps=2)
                resume(folder, device="cpu", max_steps=7)
                resume(folder, device="cpu")
            else:
                run(load_recipe(path), out=folder, device="cpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
