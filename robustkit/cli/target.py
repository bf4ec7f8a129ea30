"""What `eval` and `audit` judge: a run, one of its checkpoints, or what a function of the user's returns."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from robustkit.core.errors import UserError
from robustkit.core.registry import hint

if TYPE_CHECKING:
    import torch
    from torch import nn

    from robustkit.core.strategy import ThreatModel

HELP = "the folder of a run, a checkpoint in it, or module:function that returns a torch module"
WORDS = "of module:function: data=cifar10, data.root=..., threat=l2, threat.epsilon=0.5, ..."


@attrs.frozen(eq=False)
class Target:
    """A model with test images to judge it on. `folder` is the run's, None for a function's model."""

    name: str
    model: nn.Module
    images: Any
    threat: ThreatModel
    device: torch.device
    classes: tuple[str, ...]
    folder: Path | None = None


def is_function(target: str) -> bool:
    """Whether it reads module:function, and is no path."""
    return ":" in target and not Path(target).exists()


def run_of(target: str, checkpoint: str | None) -> tuple[Path, str | None]:
    """The run folder and the checkpoint's name that a path means."""
    from robustkit.folder import CHECKPOINTS

    path = Path(target)
    if path.suffix == ".safetensors" and path.parent.name == "checkpoints":
        if checkpoint not in (None, path.stem):
            raise UserError(f"is not the checkpoint '{checkpoint}'", place=target, remedy="leave out --checkpoint")
        if not path.is_file() and path.stem not in CHECKPOINTS:
            raise UserError("no such checkpoint", place=target, remedy=hint(path.stem, CHECKPOINTS))
        return path.parent.parent, path.stem
    return path, checkpoint


def load_target(target: str, words: list[str], *, device: str | None = None, checkpoint: str | None = None) -> Target:
    """The model and its test images.

    Args:
        words: `path=value`, what a function's model is judged on: `data` and `threat`. A run brings its own.
        checkpoint: "last" (also None) or "best" of a run.

    Raises:
        UserError: it is no run and no function, the function fails, or its data are not named.
    """
    return _of_function(target, words, device) if is_function(target) else _of_run(target, words, device, checkpoint)


def _of_run(target: str, words: list[str], device: str | None, checkpoint: str | None) -> Target:
    from robustkit.opening import load_parts, make_world, recipe_of, restore

    if words:
        raise UserError(f"a run brings its own data and threat model, not {words[0]!r}", place=target)
    folder, name = run_of(target, checkpoint)
    name = name or "last"
    recipe = recipe_of(folder, to_build=True)
    parts = load_parts(recipe, make_world(recipe, device))
    restore(parts, folder / "checkpoints" / f"{name}.safetensors", weights_only=True)
    data = parts.data
    return Target(f"{target}, {name}", parts.final, data.test, recipe.threat, parts.world.device, data.classes, folder)


def _of_function(target: str, words: list[str], device: str | None) -> Target:
    from robustkit.core.device import device_of
    from robustkit.core.override import override
    from robustkit.core.processes import join
    from robustkit.core.spec import spec
    from robustkit.core.strategy import Dataset, ThreatModel
    from robustkit.threats.linf import Linf

    @spec
    class Judged:
        """What a function's model is judged on."""

        data: Dataset | None = None
        threat: ThreatModel = Linf()

    Judged.__annotations__ |= {"data": Dataset | None, "threat": ThreatModel}
    judged = override(Judged(), words)
    if judged.data is None:
        remedy = "e.g. data=cifar10, or data=image-folder data.root=FOLDER"
        raise UserError("which images? a function brings none", place=target, remedy=remedy)
    state = join(cpu=device == "cpu")
    where = state.device if device is None or state.num_processes > 1 else device_of(device)
    model = _call(target).to(where)
    data = judged.data.load()
    return Target(target, model, data.test, judged.threat, where, data.classes)


def _call(target: str) -> nn.Module:
    """What the function returns. Modules beside the current folder are found, as by `python -m`."""
    from torch import nn

    module_name, _, name = target.partition(":")
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"cannot import '{module_name}': {error}", place=target, remedy="module:function") from error
    except Exception as error:
        raise UserError(f"'{module_name}' fails: {_last(error)}", place=target) from error
    finally:
        sys.path.remove("")
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"'{module_name}' has no function '{name}'", place=target, remedy="module:function")
    try:
        model = function()
    except Exception as error:
        raise UserError(f"the function fails: {_last(error)}", place=target) from error
    if not isinstance(model, nn.Module):
        fault = f"returns {type(model).__name__}, not a torch module"
        raise UserError(fault, place=target, remedy="return a module that maps images in [0, 1] to logits")
    return model


def _last(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
