"""Runs every recipe of a folder, as one process of several: `driver.py <folder of recipes> <folder for runs>`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn


class Plain(nn.Module):
    """A net without batch statistics."""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_chans, 16, 3, 2), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Tanh(), nn.Flatten()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


@register_model
def robustkit_test_plain(pretrained: bool = False, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    return Plain(in_chans)


def no_figures() -> ModuleType:
    """What stands in for the drawing of figures."""
    stub = ModuleType("robustkit.reporting.figures")
    stub.draw = lambda *arguments, **options: None  # type: ignore[attr-defined]
    return stub


def main(recipes: Path, out: Path) -> None:
    from robustkit import load_recipe, resume, run

    sys.modules["robustkit.reporting.figures"] = no_figures()
    torch.set_num_threads(1)
    for path in sorted(recipes.glob("*.json")):
        print(path.stem, flush=True)
        folder = out / path.stem
        if "resumed" in path.stem:
            run(load_recipe(path), out=folder, device="cpu", max_steps=2)
            resume(folder, device="cpu", max_steps=7)
            resume(folder, device="cpu")
        else:
            run(load_recipe(path), out=folder, device="cpu")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
