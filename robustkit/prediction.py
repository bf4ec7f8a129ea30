"""What a finished model says of picture files.

model = robustkit.load("runs/quickstart-1")
for said in predict(model, find_pictures(["photos"]), threshold=0.6):
    print(said.to_json())
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import torch
from PIL import Image
from torch import Tensor

from robustkit.core.errors import DataError, UserError
from robustkit.data.loader import make_batch, validation_split
from robustkit.datasets.image_folder import decode, formats
from robustkit.detection import Rejector, scores_of, threshold_for
from robustkit.loading import EXPORTED, Classifier

BATCH = 64
"""Pictures that are decoded and forwarded together."""


@attrs.frozen(kw_only=True)
class Predicted:
    """What a model says of one picture.

    `posteriors` has a share for each class, the most probable one first, `likelihoods` the classes' logarithmic
    densities (see `detection.Said`) in the same order, None where the head has none. `rejected` is None where there is
    no threshold.
    """

    file: Path
    posteriors: dict[str, float]
    likelihoods: dict[str, float] | None
    rejected: bool | None

    @property
    def label(self) -> str:
        return next(iter(self.posteriors))

    @property
    def score(self) -> float:
        """The posterior of the label: what is held against the threshold."""
        return self.posteriors[self.label]

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"file": str(self.file), "label": self.label, "score": self.score}
        if self.rejected is not None:
            data["rejected"] = self.rejected
        data["posteriors"] = self.posteriors
        if self.likelihoods is not None:
            data["log_likelihoods"] = self.likelihoods
        return data


@attrs.frozen
class Unreadable:
    """A file that is no picture, and why."""

    file: Path
    fault: str

    def to_json(self) -> dict[str, str]:
        return {"file": str(self.file), "error": self.fault}


def predict(
    model: Classifier, files: Iterable[Path], *, threshold: float | None = None, batch_size: int = BATCH
) -> Iterator[Predicted | Unreadable]:
    """What the model says of each file, in their order; a batch of them is in memory.

    Pictures are brought to the model's size as `ImageFolder(size=...)` does it: the shorter side resized, the middle
    kept.

    Args:
        model: as `robustkit.load` gives it.
        threshold: posteriors below are rejected.

    Raises:
        UserError: the model takes images of other than one or three channels.
    """
    channels = model.image_shape[0]
    if channels not in (1, 3):
        raise UserError(f"takes images of {channels} channels, not pictures", place="model")
    every, device = list(files), next(model.parameters()).device
    rejector = Rejector(model, threshold or 0.0)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(every), batch_size):
            chunk = every[start : start + batch_size]
            pictures = list(pool.map(lambda file: _read(file, model.image_shape), chunk))
            readable = [picture for picture in pictures if isinstance(picture, Tensor)]
            answers = _answers(rejector, readable, device)
            for file, picture in zip(chunk, pictures, strict=True):
                if isinstance(picture, Unreadable):
                    yield picture
                else:
                    yield _predicted(file, model.classes, threshold, *next(answers))


def find_pictures(paths: Sequence[str | Path]) -> list[Path]:
    """The files among `paths` as they are, and of folders all pictures in them and below, sorted; hidden ones are not.

    Raises:
        UserError: a folder holds no picture.
    """
    endings = {ending for ending, name in Image.registered_extensions().items() if name in formats()}
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in endings
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise UserError("there are no pictures in it", place=str(path), remedy="give another folder, or files")
        found += files
    return found


def held_out_threshold(run: str | Path, model: Classifier, false_rejections: float = 0.05) -> tuple[float, int]:
    """The threshold that rejects at most that share of the training images that a run held out, and how many they are.

    Args:
        run: the folder of a run, whose recipe says where its data are.
        model: one of its checkpoints.

    Raises:
        UserError: it is no run, its data are missing, or no images were held out.
    """
    from robustkit.opening import recipe_of  # here: of all that it brings, predicting needs nothing else

    run = Path(run)
    if (run / EXPORTED).is_file():
        remedy = "find a threshold on its run, and give it with --reject"
        raise UserError("is an exported model, and brings no held-out images", place=str(run), remedy=remedy)
    recipe = recipe_of(run)
    if recipe.validation.images == 0:
        raise UserError("held out no images to find a threshold on", place=str(run), remedy="give one with --reject")
    data = recipe.data.load()
    _, held_out = validation_split(data.own, recipe.validation.images)
    device = next(model.parameters()).device
    batches = (make_batch(data.train, rows, device=device).x for rows in torch.split(held_out, BATCH))
    return threshold_for(scores_of(model, batches), false_rejections), len(held_out)


def _read(file: Path, shape: tuple[int, int, int]) -> Tensor | Unreadable:
    """(C, H, W) uint8, or why there is none."""
    channels, height, width = shape
    try:
        return torch.tensor(decode(file, (height, width), grey=channels == 1))
    except DataError as error:
        return Unreadable(file, error.fault)


def _answers(
    rejector: Rejector, pictures: list[Tensor], device: torch.device
) -> Iterator[tuple[list[float], list[float] | None, bool]]:
    """Posteriors, likelihoods and verdict of each picture (C, H, W) uint8."""
    if pictures:
        said = rejector(torch.stack(pictures).to(device).float().div_(255))
        likelihoods = [None] * len(pictures) if said.likelihoods is None else said.likelihoods.tolist()
        yield from zip(said.posteriors.tolist(), likelihoods, said.rejected.tolist(), strict=True)


def _predicted(
    file: Path,
    classes: tuple[str, ...],
    threshold: float | None,
    posteriors: list[float],
    likelihoods: list[float] | None,
    rejected: bool,
) -> Predicted:
    order = sorted(range(len(classes)), key=posteriors.__getitem__, reverse=True)
    return Predicted(
        file=file,
        posteriors={classes[number]: posteriors[number] for number in order},
        likelihoods=None if likelihoods is None else {classes[number]: likelihoods[number] for number in order},
        rejected=None if threshold is None else rejected,
    )
