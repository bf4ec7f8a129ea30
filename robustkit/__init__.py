"""robustkit: compose, train and judge adversarially robust image classifiers.

    from robustkit import Recipe, Model, px, run
    from robustkit.datasets import Cifar10
    ...

Names are loaded when first used, so that importing robustkit costs nothing.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustkit.core.errors import UserError
    from robustkit.core.model import Model
    from robustkit.core.override import override
    from robustkit.core.recipe import Health, Precision, Recipe, Suite, Validation, load_recipe, px
    from robustkit.core.registry import registry
    from robustkit.core.spec import digest, evolve, setting, spec
    from robustkit.evaluation.audit import audit
    from robustkit.evaluation.evaluate import evaluate
    from robustkit.loading import load
    from robustkit.reporting.comparison import compare
    from robustkit.runs import resume, run

__version__ = "0.1.0"

_HOMES = {
    "UserError": "core.errors",
    "Health": "core.recipe",
    "Model": "core.model",
    "override": "core.override",
    "Precision": "core.recipe",
    "Recipe": "core.recipe",
    "Suite": "core.recipe",
    "Validation": "core.recipe",
    "load_recipe": "core.recipe",
    "px": "core.recipe",
    "registry": "core.registry",
    "digest": "core.spec",
    "evolve": "core.spec",
    "setting": "core.spec",
    "spec": "core.spec",
    "audit": "evaluation.audit",
    "compare": "reporting.comparison",
    "evaluate": "evaluation.evaluate",
    "load": "loading",
    "resume": "runs",
    "run": "runs",
}

__all__ = [
    "Health",
    "Model",
    "Precision",
    "Recipe",
    "Suite",
    "UserError",
    "Validation",
    "audit",
    "compare",
    "digest",
    "evaluate",
    "evolve",
    "load",
    "load_recipe",
    "override",
    "px",
    "registry",
    "resume",
    "run",
    "setting",
    "spec",
]


warnings.filterwarnings("ignore", "IProgress not found")  # of tqdm in a notebook, whose bars we do not use


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"robustkit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'robustkit' has no attribute '{name}'")
