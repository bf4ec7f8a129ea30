"""Batch normalisation folded into the convolutions that feed it.

With fixed statistics, a convolution followed by batch normalisation is a convolution with other weights: the
normalisation and one pass over memory are saved, forwards and backwards. Like batch statistics (`engine.statistics`),
this is done where all layers meet, in `F.conv2d` and `F.batch_norm`: torch's layers, timm's with fused activation and
a plugin's are folded alike, and no module is replaced or touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

TOLERANCE = 1e-4
"""Largest relative error of float32 logits that folding may cause."""


class Folding(TorchFunctionMode):
    """Inside, a model in eval mode forwards with folded weights: constants, made from those it had in `fold`.

    Gradients reach images, not weights. `folded` counts the batch normalisations that are gone.
    """

    def __init__(self, kernels: dict[int, tuple[Tensor, Tensor, Tensor]], skipped: dict[int, Tensor]) -> None:
        super().__init__()
        self._kernels = kernels  # by identity of the weight: it, and the weight and bias to take instead
        self._skipped = skipped  # by identity of the running mean
        self.folded = len(skipped)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and len(args) > 1:
            found = self._kernels.get(id(args[1]))
            if found is not None:
                kwargs.pop("bias", None)
                return func(args[0], found[1], found[2], *args[3:], **kwargs)
        elif func is F.batch_norm and len(args) > 1 and id(args[1]) in self._skipped:
            return args[0]
        return func(*args, **kwargs)


class _Watching(TorchFunctionMode):
    """Notes who takes the result of each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: list[tuple[Tensor, Tensor, Tensor | None]] = []  # result, weight, bias
        self.takers: dict[int, list[Callable[..., Any]]] = {}  # by identity of the result
        self.norms: list[tuple[Tensor, dict[str, Any]]] = []  # what is normalised, and how

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.takers and getattr(func, "__name__", "") != "__get__":  # reading a shape takes nothing
            for tensor in tree_leaves((args, kwargs)):
                if id(tensor) in self.takers:
                    self.takers[id(tensor)].append(func)
        result = func(*args, **kwargs)
        if func is F.conv2d and len(args) > 1:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            self.convolutions.append((result, args[1], bias))
            self.takers[id(result)] = []
        elif func is F.batch_norm:
            names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            given = {"weight": None, "bias": None, "training": False, "eps": 1e-5}
            self.norms.append((args[0], given | dict(zip(names, args, strict=False)) | kwargs))
        return result


@torch.no_grad()
def fold(model: nn.Module, images: Tensor) -> Folding | None:
    """The folding of `model`, in eval mode; None where nothing can be folded, or logits would differ by `TOLERANCE`.

    Args:
        model: maps images to logits (B, K).
        images: (B, C, H, W), a few that it may be tried on.
    """
    watching = _Watching()
    with watching:
        plain = model(images)
    weights = [id(weight) for _, weight, _ in watching.convolutions]
    means = [id(how["running_mean"]) for _, how in watching.norms]
    kernels: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    skipped: dict[int, Tensor] = {}
    for result, weight, bias in watching.convolutions:
        fed = [how for tensor, how in watching.norms if tensor is result]
        if len(fed) != 1 or len(watching.takers[id(result)]) != 1 or weights.count(id(weight)) != 1:
            continue
        how = fed[0]
        mean, variance = how["running_mean"], how["running_var"]
        if how["training"] or mean is None or means.count(id(mean)) != 1 or not isinstance(weight, nn.Parameter):
            continue
        scale = torch.rsqrt(variance.float() + how["eps"])
        if how["weight"] is not None:
            scale = scale * how["weight"].float()
        shift = (0 if bias is None else bias.float()) - mean.float()
        shift = shift * scale + (0 if how["bias"] is None else how["bias"].float())
        kernel = (weight.float() * scale.view(-1, 1, 1, 1)).to(weight.dtype)
        kernels[id(weight)] = (weight, kernel.contiguous(memory_format=torch.channels_last), shift.to(weight.dtype))
        skipped[id(mean)] = mean
    if not kernels:
        return None
    folding = Folding(kernels, skipped)
    with folding:
        found = model(images)
    return folding if close(found, plain) else None


def close(found: Tensor, plain: Tensor) -> bool:
    """Whether logits agree to `TOLERANCE`, relative to their size."""
    error = (found.float() - plain.float()).norm()
    return bool(error <= TOLERANCE * plain.float().norm().clamp_min(1e-12))
