"""Batch normalisation folded into the convolutions that feed it.

With fixed statistics, a convolution followed by batch normalisation is a convolution with other weights: the
normalisation and one pass over memory are saved, forwards and backwards. Which convolution feeds which normalisation,
and nothing else, is seen by watching one forward, so that it is found in any network, however it is written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from robustkit.core.batch import Output

TOLERANCE = 1e-4
"""Largest relative error of float32 logits that folding may cause."""


class Folding:
    """A model's twin, which forwards as the model does in eval mode, without the `folded` normalisations.

    It shares all tensors with the model but the folded weights: constants, made by `refresh` from the model's weights
    at that time. Gradients reach images, not folded weights.
    """

    def __init__(
        self,
        twin: nn.Module,
        pairs: list[tuple[nn.Module, Any, Any]],
        others: list[tuple[nn.Module, nn.Module]],
    ) -> None:
        self.twin = twin
        self._pairs = pairs  # (the twin's convolution, the model's convolution, its normalisation)
        self._others = others  # (the twin's module, the model's) of those that share all their tensors
        self.folded = len(pairs)
        self._made: dict[torch.dtype | None, list[tuple[nn.Parameter, nn.Parameter]]] = {}
        self.refresh()

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The twin, with the model's present weights folded, in `dtype` (None: their own).

        Folded weights stay where they are in memory: recorded attacks read them there.
        """
        found = _folded([(convolution, norm) for _, convolution, norm in self._pairs])
        made = self._made.get(dtype)
        if made is None or made[0][0].device != found[0][0].device:
            made = [
                _room(weight, bias, dtype or convolution.weight.dtype)
                for (_, convolution, _), (weight, bias) in zip(self._pairs, found, strict=True)
            ]
            self._made[dtype] = made
        torch._foreach_copy_([tensor for pair in made for tensor in pair], [t for pair in found for t in pair])
        for (twin, _, _), (weight, bias) in zip(self._pairs, made, strict=True):
            twin.weight, twin.bias = weight, bias
        for twin, module in self._others:  # who replaces a tensor rather than changing it is followed
            twin._parameters, twin._buffers = module._parameters, module._buffers
        return self.twin


@torch.no_grad()
def fold(model: nn.Module, images: Tensor) -> Folding | None:
    """The folding of `model`, in eval mode; None where nothing can be folded, or logits would differ by `TOLERANCE`.

    Args:
        model: maps images to logits (B, K), or to an Output.
        images: (B, C, H, W), a few that it may be tried on.
    """
    watching = _Watching()
    with watching:
        plain = _logits(model(images))
    found = watching.pairs(model)
    if not found:
        return None
    shared = [*model.parameters(), *model.buffers()]
    twins: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    try:
        twin = copy.deepcopy(model, twins)
    except (TypeError, RuntimeError, AttributeError):  # it holds something that cannot be copied
        return None
    gone = {id(twins[id(norm)]): _what_remains(twins[id(norm)]) for _, norm in found}
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if id(child) in gone:
                setattr(module, name, gone[id(child)])
    first = {id(convolution) for convolution, _ in found}
    kept = [(twins[id(module)], module) for module in model.modules() if id(module) not in first]
    folding = Folding(twin, [(twins[id(convolution)], convolution, norm) for convolution, norm in found], kept)
    return folding if close(_logits(twin(images)), plain) else None


def close(found: Tensor, plain: Tensor) -> bool:
    """Whether logits agree to `TOLERANCE`, relative to their size."""
    error = (found.float() - plain.float()).norm()
    return bool(error <= TOLERANCE * plain.float().norm().clamp_min(1e-12))


def _logits(output: Tensor | Output) -> Tensor:
    return output.logits if isinstance(output, Output) else output


def _folded(pairs: list[tuple[Any, Any]]) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias), in float32, of a convolution that does what a convolution and its normalisation do, of each pair.

    All of them at once: on a GPU, launching kernels for each takes longer than running them.
    """
    scales = list(torch._foreach_add([norm.running_var.float() for _, norm in pairs], [norm.eps for _, norm in pairs]))
    torch._foreach_rsqrt_(scales)
    _where(torch._foreach_mul_, scales, [norm.weight for _, norm in pairs])
    shifts = list(torch._foreach_neg([norm.running_mean.float() for _, norm in pairs]))
    _where(torch._foreach_add_, shifts, [convolution.bias for convolution, _ in pairs])
    torch._foreach_mul_(shifts, scales)
    _where(torch._foreach_add_, shifts, [norm.bias for _, norm in pairs])
    weights = [pair[0].weight.float() * scale.view(-1, 1, 1, 1) for pair, scale in zip(pairs, scales, strict=True)]
    return list(zip(weights, shifts, strict=True))


def _where(change: Callable[[list[Tensor], list[Tensor]], object], tensors: list[Tensor], others: list[Any]) -> None:
    """Changes those tensors that have another one."""
    both = [(tensor, other.float()) for tensor, other in zip(tensors, others, strict=True) if other is not None]
    if both:
        change([tensor for tensor, _ in both], [other for _, other in both])


def _room(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter]:
    """Constants of their sizes."""
    kernel = torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last)
    return nn.Parameter(kernel, False), nn.Parameter(torch.empty_like(bias, dtype=dtype), False)


def _what_remains(norm: Any) -> nn.Module:
    """What a normalisation does besides normalising."""
    return nn.Identity() if _is_plain(norm) else nn.Sequential(norm.drop, norm.act)


class _Watching(TorchFunctionMode):
    """Notes who takes the result of each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self._convolutions: list[tuple[Tensor, Tensor]] = []  # result, weight
        self._norms: list[tuple[Tensor, Tensor | None]] = []  # what is normalised, and the running mean
        self._takers: dict[int, int] = {}  # how many, by identity of the result

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(made, Tensor) for made in tree_leaves(result)):  # asking for a shape takes nothing
            for tensor in tree_leaves((args, kwargs)):
                if id(tensor) in self._takers:
                    self._takers[id(tensor)] += 1
        if func is F.conv2d and len(args) > 1:
            self._convolutions.append((result, args[1]))
            self._takers[id(result)] = 0
        elif func is F.batch_norm and len(args) > 1:
            self._norms.append((args[0], args[1]))
        return result

    def pairs(self, model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """(Convolution, normalisation), each forwarded once, of which the second alone takes what the first made."""
        owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for tensor in (module._parameters.get("weight"), module._buffers.get("running_mean")):
                if tensor is not None:
                    owners.setdefault(id(tensor), []).append(module)
        weights = [id(weight) for _, weight in self._convolutions]
        means = [id(mean) for _, mean in self._norms]
        found = []
        for result, weight in self._convolutions:
            fed = [mean for tensor, mean in self._norms if tensor is result]
            if len(fed) != 1 or fed[0] is None or self._takers[id(result)] != 1:
                continue
            first, second = owners.get(id(weight), []), owners.get(id(fed[0]), [])
            if weights.count(id(weight)) != 1 or means.count(id(fed[0])) != 1 or len(first) != 1 or len(second) != 1:
                continue
            if "bias" in first[0]._parameters and _is_known(second[0]) and not second[0].training:
                found.append((first[0], second[0]))
        return found


def _is_plain(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and type(norm).forward is nn.BatchNorm2d.forward


def _is_known(norm: nn.Module) -> bool:
    from timm.layers.norm_act import BatchNormAct2d  # it imports much

    return _is_plain(norm) or type(norm) is BatchNormAct2d
