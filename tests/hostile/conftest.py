"""A finished run, made once, for spoiling."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from robustkit import Validation
from robustkit.core.recipe import Recipe, Suite
from robustkit.datasets import Synthetic
from robustkit.evaluation.clean import Clean
from robustkit.runs import run
from robustkit.testing import tiny_recipe


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return tiny_recipe(
        data=Synthetic(train=70, test=16, classes=4, size=8, channels=3),
        epochs=1,
        validation=Validation(images=20, train_images=0),
        evaluation=(Suite(measures=(Clean(),)),),
    )


@pytest.fixture(scope="session")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    stub = ModuleType("robustkit.reporting.figures")
    stub.draw = lambda *arguments: None  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setitem(sys.modules, "robustkit.reporting.figures", stub)  # drawing takes longer than all else
        run(recipe, out=folder, device="cpu")
    return folder


@pytest.fixture
def spoilt(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "spoilt"))
