"""The model: normalisation, backbone, head. Images in [0, 1] go in; everything else is inside."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from robustkit.core.batch import Mode, Output
from robustkit.core.errors import SpecError
from robustkit.core.rng import derive
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Head

STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Channel means and standard deviations (of the papers' code; ImageNet's usual ones)."""


@spec
class Model:
    """Which network. `backbone` is any timm model name; robustkit's own are registered there too."""

    backbone: str
    normalization: Literal["none", "cifar10", "cifar100", "svhn", "imagenet"] = "none"
    pretrained: bool = False
    patch_size: int | None = setting(default=None, at_least=1)  # for transformers on small images
    batch_norm_momentum: float | None = setting(default=None, above=0, at_most=1)
    adopt_first_batch: bool = False  # the first step's statistics become the running ones, whatever the momentum

    def build(self, head: Head, classes: int, image_shape: tuple[int, int, int], seed: int) -> RobustModel:
        """The network with freshly drawn weights, a function of `seed`.

        Raises:
            SpecError: timm knows no such backbone, or it cannot take images of this shape.
        """
        torch.manual_seed(derive(seed, "weights"))
        channels, height, width = image_shape
        backbone = _create(self, channels, (height, width))
        backbone.eval()
        try:
            with torch.no_grad():
                features = backbone(torch.zeros(1, *image_shape))
        except RuntimeError as error:
            raise SpecError(
                f"'{self.backbone}' cannot take {channels} x {height} x {width} images: {error}",
                place="model",
                remedy="choose another backbone, or set model.patch_size",
            ) from error
        if features.ndim != 2:
            raise SpecError(
                f"'{self.backbone}' gives features of shape {tuple(features.shape)}, not (B, D)",
                place="model.backbone",
                remedy="choose a classifier",
            )
        if self.batch_norm_momentum is not None:
            for module in backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.momentum = self.batch_norm_momentum
        mean, std = STATISTICS.get(self.normalization, ((0.0,) * channels, (1.0,) * channels))
        if len(mean) != channels:
            raise SpecError(
                f"'{self.normalization}' is for {len(mean)} channels, images have {channels}",
                place="model.normalization",
            )
        normalize = Normalize(mean, std) if self.normalization != "none" else None
        return RobustModel(backbone, head.build(features.shape[1], classes), normalize)


class Normalize(nn.Module):
    """(x - mean) / std per channel, inside the model so that attacks and radii live in pixels of [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class RobustModel(nn.Module):
    """Images (B, C, H, W) -> Output. Given labels, the head may apply its margin.

    Given another `backbone`, that is taken instead of its own: a faster one that gives the same features.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, normalize: Normalize | None) -> None:
        super().__init__()
        self.normalize, self.backbone, self.head = normalize, backbone, head
        self._norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def forward(self, x: Tensor, y: Tensor | None = None, backbone: nn.Module | None = None) -> Output:
        features = (backbone or self.backbone)(x if self.normalize is None else self.normalize(x))
        return cast(Output, self.head(features, y))

    @contextmanager
    def using(self, mode: Mode) -> Iterator[None]:
        """The model in `mode` inside, as it was outside, whatever happens."""
        training, tracking = self.training, [norm.track_running_stats for norm in self._norms]
        self.train(mode != "eval")
        for norm in self._norms:
            norm.track_running_stats = mode != "train-frozen"
        try:
            yield
        finally:
            self.train(training)
            for norm, was in zip(self._norms, tracking, strict=True):
                norm.track_running_stats = was

    @contextmanager
    def adopting(self, wanted: bool = True) -> Iterator[None]:
        """Inside, running statistics become those of the batch (momentum 1), where that is `wanted`."""
        momenta = [norm.momentum for norm in self._norms]
        for norm in self._norms:
            norm.momentum = 1.0 if wanted else norm.momentum
        try:
            yield
        finally:
            for norm, momentum in zip(self._norms, momenta, strict=True):
                norm.momentum = momentum


def _create(model: Model, channels: int, size: tuple[int, int]) -> nn.Module:
    import timm

    import robustkit.backbones  # noqa: F401  registers ours

    if not re.fullmatch(r"[\w.]+", model.backbone) or not timm.is_model(model.backbone):  # timm takes any tag
        near = difflib.get_close_matches(model.backbone, timm.list_models(), n=3)
        known = "see `robustkit list backbone`; where a recipe's file defines it, give that FILE.py"
        remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else known
        raise SpecError(f"timm knows no model '{model.backbone}'", place="model.backbone", remedy=remedy)
    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels, "pretrained": model.pretrained}
    if model.patch_size is not None:
        options["patch_size"] = model.patch_size
    try:
        try:
            return timm.create_model(model.backbone, img_size=size, **options)
        except TypeError:  # most convolutional networks take any size and no such argument
            return timm.create_model(model.backbone, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        raise SpecError(
            f"cannot build '{model.backbone}' for {channels} x {size[0]} x {size[1]} images: {error}", place="model"
        ) from error
