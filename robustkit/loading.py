"""Finished models as plain modules: images in, logits out. Neither their data nor their training is needed.

model = robustkit.load("runs/quickstart-1", checkpoint="best")
model(images).argmax(dim=1)
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core import checkpoint as checkpoints
from robustkit.core.device import device_of
from robustkit.core.errors import CheckpointError, RegistryError, SpecError, UserError
from robustkit.core.model import Model, RobustModel
from robustkit.core.reading import read_json
from robustkit.core.recipe import execute, learn_backbone, meant, runs_beside
from robustkit.core.registry import hint
from robustkit.core.spec import evolve, from_json
from robustkit.core.strategy import Dataset, Head
from robustkit.data.images import describe
from robustkit.folder import CHECKPOINTS, not_known_here

EXPORTED = "model.safetensors"
"""The file that makes a folder an exported model; `model.json` beside it holds its facts once more, to be read."""
LARGEST_IMAGE = 1 << 22
"""Numbers in an image (3 x 1182 x 1182); a file that asks for more is no classifier's."""


class Classifier(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> logits (B, K) float32; normalisation is inside.

    `network` is the trained network, `classes` the K names in the order of the logits, `image_shape` is (C, H, W),
    `recipe` the recipe as JSON data, and `facts` all that the file says of itself (epoch, version, digest, ...).
    """

    def __init__(self, network: RobustModel, facts: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.facts = network, facts
        self.recipe: dict[str, Any] = facts["recipe"]
        self.classes: tuple[str, ...] = tuple(facts["classes"])
        channels, height, width = facts["image_shape"]
        self.image_shape: tuple[int, int, int] = channels, height, width

    def _repr_html_(self) -> str:
        """What a notebook shows; printed, it is all its layers."""
        from robustkit.reporting.tables import as_html, plain_table

        parts, (channels, height, width) = self.recipe, self.image_shape
        table = plain_table("Classifier", "")
        for name, value in {
            "Network": f"{parts['model']['backbone']}, {sum(p.numel() for p in self.parameters()):,} parameters",
            "Head": parts["head"]["name"],
            "Images": f"(B, {channels}, {height}, {width}) in [0, 1], normalisation inside",
            "Classes": f"{len(self.classes)}: {', '.join(self.classes)}",
            "Checkpoint": f"{self.facts.get('checkpoint')}, after epoch {self.facts.get('epoch')}",
            "Recipe": self.facts.get("digest"),
        }.items():
            table.add_row(name, textwrap.shorten(str(value), 100))
        return as_html(table)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.contiguous(memory_format=torch.channels_last)).logits
        return logits.float()


def load(path: str | Path, checkpoint: str | None = None, device: str | torch.device | None = None) -> Classifier:
    """The model of a run, or of a folder that `robustkit export --to safetensors` wrote.

    It is in eval mode, and its parameters require gradients, so that it can be attacked and trained on. Where the
    recipe averages weights, these are the averaged ones. Weights are safetensors, which hold nothing that runs; but
    where a run's own recipe.py defines its head or backbone, that file is executed, as `resume` and `eval` do. Nothing
    in an exported folder is.

    Args:
        path: the folder.
        checkpoint: "last" (None: this) or "best" of a run; an exported folder holds one.
        device: where to put it (None: the CPU).

    Raises:
        UserError: there is no such model, it is damaged, or its head or backbone is not installed.
    """
    path = Path(path)
    state, facts = read(path, checkpoint)
    source = None if (path / EXPORTED).is_file() else path / "recipe.py"
    refuse_another_size(state, facts, path, source)
    network = build(facts, source)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        fault = f"its weights do not fit its recipe: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(fault, place=str(path)) from error
    model = Classifier(network, facts).to(memory_format=torch.channels_last).eval()
    return model if device is None else model.to(device_of(device))


def read(path: Path, checkpoint: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of the network that is kept, on the CPU, and the facts: recipe, classes and image_shape among them.

    Raises:
        UserError: as `load`.
    """
    if checkpoint is not None and checkpoint not in CHECKPOINTS:
        raise UserError(f"there is no checkpoint '{checkpoint}'", place=str(path), remedy=hint(checkpoint, CHECKPOINTS))
    exported = (path / EXPORTED).is_file()
    try:
        state, facts = _read_export(path, checkpoint) if exported else _read_run(path, checkpoint or "last")
        _ = facts["recipe"]["model"], facts["recipe"]["head"], facts["digest"]
        classes, image_shape = facts["classes"], facts["image_shape"]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"lacks what a model needs: {error}", place=str(path)) from error
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise CheckpointError("does not say the names of its classes", place=str(path))
    if len(set(classes)) < len(classes):
        raise CheckpointError("has two classes of one name", place=str(path))
    if not isinstance(image_shape, list) or [type(size) for size in image_shape] != [int, int, int]:
        raise CheckpointError("does not say the (channels, height, width) of its images", place=str(path))
    if min(image_shape) < 1 or math.prod(image_shape) > LARGEST_IMAGE:
        raise CheckpointError(f"is for images of {describe(tuple(image_shape))}", place=str(path))
    return state, facts


def build(facts: dict[str, Any], source: Path | None = None) -> RobustModel:
    """The network that the facts describe, with weights that mean nothing; torch's random state stays as it was.

    Where its head or backbone is not installed, the file `source` may define it, and is executed.

    Raises:
        UserError: its head or backbone is not installed.
    """
    channels, height, width = facts["image_shape"]
    return fresh(*_strategies(facts["recipe"], source), len(facts["classes"]), (channels, height, width))


def refuse_another_size(
    state: dict[str, Tensor], facts: dict[str, Any], path: Path, source: Path | None = None
) -> None:
    """Before `build` asks for memory: facts may describe a network thousands of times as large as the weights.

    Raises:
        UserError: they do; or its head or backbone is not installed.
    """
    model, head = _strategies(facts["recipe"], source)
    channels, height, width = facts["image_shape"]
    try:
        with torch.device("meta"), torch.random.fork_rng(()):
            network = evolve(model, pretrained=False).build(head, len(facts["classes"]), (channels, height, width), 0)
    except (RuntimeError, SpecError) as error:
        if "meta" in str(error.__cause__ if isinstance(error, SpecError) else error):
            return  # some networks cannot be built without numbers
        raise CheckpointError(f"describes no network: {' '.join(str(error).split())}", place=str(path)) from error
    wanted, held = (sum(tensor.numel() for tensor in found.values()) for found in (network.state_dict(), state))
    if wanted > 2 * held + 1_000_000:
        fault = f"its weights do not fit its recipe: they are {held:,} numbers, it describes {wanted:,}"
        raise CheckpointError(fault, place=str(path))


def fresh(model: Model, head: Head, classes: int, image_shape: tuple[int, int, int]) -> RobustModel:
    """An untrained network on the CPU; torch's random state stays as it was."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):  # not pretrained, or timm would download weights
        return evolve(model, pretrained=False).build(head, classes, image_shape, seed=0)


def _strategies(recipe: dict[str, Any], source: Path | None) -> tuple[Model, Head]:
    run = None if source is None else source.parent
    source = source if source is not None and source.is_file() else None
    try:
        model, head = _parsed(recipe)
    except RegistryError as error:
        if source is None:
            raise (None if run is None else not_known_here(run)) or error from error.__cause__
        execute(source)
        return _parsed(recipe)
    learn_backbone(source, model)
    return model, head


def _parsed(recipe: dict[str, Any]) -> tuple[Model, Head]:
    model: Model = from_json(Model, recipe["model"], "model")
    head: Head = from_json(Head, recipe["head"], "head")
    return model, head


def _read_run(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    held = sorted(path.stem for path in (folder / "checkpoints").glob("*.safetensors") if "." not in path.stem)
    if not held and not checkpoints.previous(folder / "checkpoints" / f"{name}.safetensors").is_file():
        remedy = meant(folder, runs_beside(folder)) or f"give a folder with checkpoints/, or with {EXPORTED}"
        raise CheckpointError("is neither a run nor an exported model", place=str(folder), remedy=remedy)
    if name not in held and "last" in held:
        raise CheckpointError(f"has no checkpoint '{name}'", place=str(folder), remedy=f"it has: {', '.join(held)}")
    tensors, facts = checkpoints.read(folder / "checkpoints" / f"{name}.safetensors")
    prefix = "model." if facts["recipe"].get("average") is None else "average."
    state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return state, facts | _of_the_data(facts) | {"checkpoint": name}


def _of_the_data(facts: dict[str, Any]) -> dict[str, Any]:
    """Classes and image shape; checkpoints written before these were noted ask the recipe's data."""
    if "classes" in facts:
        return {}
    dataset: Dataset = from_json(Dataset, facts["recipe"]["data"], "data")
    shape, count = dataset.facts
    if shape is not None and count is not None:
        return {"classes": [str(number) for number in range(count)], "image_shape": list(shape)}
    data = dataset.load()
    return {"classes": list(data.classes), "image_shape": list(data.train.shape)}


def _read_export(folder: Path, name: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state, facts = checkpoints.read(folder / EXPORTED)
    if name is not None and name != facts["checkpoint"]:
        fault = f"holds the checkpoint '{facts['checkpoint']}', not '{name}'"
        raise CheckpointError(fault, place=str(folder), remedy="export the other one too")
    readable = (folder / EXPORTED).with_suffix(".json")
    try:
        same = not readable.is_file() or read_json(readable) == facts
    except UserError:
        same = False
    if not same:
        remedy = "put back the file that was exported, or remove it: only a copy for reading is in it"
        raise CheckpointError(f"does not say what {EXPORTED} says", place=str(readable), remedy=remedy)
    return state, facts
