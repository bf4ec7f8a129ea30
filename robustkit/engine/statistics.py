"""Batch statistics over the global batch, so that several processes train as one does.

torch's SyncBatchNorm refuses CPU tensors and replaces modules. Here the one function that all batch-normalisation
layers call (torch's, timm's with fused activation, a plugin's) is intercepted while training in several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _SumOverProcesses(torch.autograd.Function):
    """Sum forward; and since every process's loss depends on the sum, sum of gradients backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _sum(gradient)  # differentiable in turn


def _sum(tensor: Tensor) -> Tensor:
    return _SumOverProcesses.apply(tensor)  # type: ignore[no-any-return]


def global_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` in training, with mean and variance over the images of all processes."""
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    values = x.float()
    count = torch.tensor([x.numel() / x.shape[1]], device=x.device)
    dist.all_reduce(count)
    mean = _sum(values.sum(dims)) / count
    centred = values - mean.view(shape)
    variance = _sum(centred.square().sum(dims)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.mul_(1 - momentum).add_(momentum * mean)
            running_var.mul_(1 - momentum).add_(momentum * variance * count / (count - 1))
    out = centred * torch.rsqrt(variance + eps).view(shape)
    if weight is not None:
        out = out * weight.view(shape)
    if bias is not None:
        out = out + bias.view(shape)
    return out.to(x.dtype)


class GlobalStatistics(TorchFunctionMode):
    """Inside, batch normalisation in training uses statistics of the global batch. For several processes only."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            return global_batch_norm(*args, **kwargs)
        return func(*args, **kwargs)
