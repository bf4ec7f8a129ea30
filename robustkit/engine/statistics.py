"""Batch statistics over the global batch, so that several processes train as one does.

torch's SyncBatchNorm refuses CPU tensors and replaces modules. Here the one function that all batch-normalisation
layers call (torch's, timm's with fused activation, a plugin's) is intercepted while training in several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from robustkit.core.processes import all_reduce


class _SumOverProcesses(torch.autograd.Function):
    """Sum forward; and since every process's loss depends on the sum, sum of gradients backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        all_reduce(total)
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
    out, mean, variance, count = _Normalised.apply(x, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.mul_(1 - momentum).add_(momentum * mean)
            running_var.mul_(1 - momentum).add_(momentum * variance * count / (count - 1))
    return out  # type: ignore[no-any-return]


class _Normalised(torch.autograd.Function):
    """Normalised images; mean, variance and number of values over all processes.

    torch's own kernels do the work on this process's images, one collective forwards and one backwards the rest.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels, here = x.shape[1], x.numel() / x.shape[1]
        one = torch.ones(channels, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        mean, inverse = torch.zeros_like(one), one
        if here:  # else all images are elsewhere: nothing is added
            _, mean, inverse = torch.native_batch_norm(x, one, None, None, None, True, 0.0, eps)
        precise = mean.double()  # the mean of squares less the square of the mean: in float32 it would lose digits
        squares = inverse.double().pow(-2) - eps + precise.square()
        sums = torch.cat([here * precise, here * squares, precise.new_full((1,), here)])
        all_reduce(sums)
        count = sums[-1]
        precise = sums[:channels] / count
        variance = (sums[channels:-1] / count - precise.square()).clamp_min(0)
        inverse = torch.rsqrt(variance + eps).to(mean.dtype)
        mean, variance, count = precise.to(mean.dtype), variance.to(mean.dtype), count.to(mean.dtype)
        scale = one if weight is None else weight
        out = torch.empty_like(x)
        if here:
            out, _, _ = torch.native_batch_norm(x, scale, bias, mean, variance, False, 0.0, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse, count)
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.eps = eps
        return out, mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, bias, mean, inverse, count = ctx.saved_tensors
        if torch.is_grad_enabled():  # it will be differentiated in turn
            wanted = [tensor for tensor in (x, weight, bias) if tensor is not None and tensor.requires_grad]
            out = _in_small_steps(x, weight, bias, ctx.eps)
            found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=True))
            x, weight, bias = (
                next(found) if tensor is not None and tensor.requires_grad else None for tensor in (x, weight, bias)
            )
            return x, weight, bias, None
        to_x, to_weight, to_bias = torch.empty_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
        if len(x):
            to_x, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
                gradient,
                x,
                torch.ones_like(mean) if weight is None else weight,
                None,
                None,
                mean,
                inverse,
                True,
                ctx.eps,
                [True] * 3,
            )
        # The kernel has subtracted means over this process's images; those over all are meant.
        here = torch.cat([to_bias, to_weight]).double()
        everywhere = here.clone()
        all_reduce(everywhere)
        gaps = here / (x.numel() / x.shape[1]) - everywhere / count
        constant, slope = gaps.to(mean.dtype).chunk(2)
        factor = inverse if weight is None else inverse * weight
        slope = factor * slope * inverse
        constant = factor * constant - slope * mean
        shape = [1, -1] + [1] * (x.ndim - 2)
        to_x.addcmul_(x, slope.view(shape)).add_(constant.view(shape))
        return to_x, None if weight is None else to_weight, None if bias is None else to_bias, None


def _in_small_steps(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The same of operations that can be differentiated as often as one likes."""
    dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
    values = x.float() if x.dtype == torch.bfloat16 else x
    count = values.new_tensor([x.numel() / x.shape[1]])
    all_reduce(count)
    centred = values - (_sum(values.sum(dims)) / count).view(shape)
    variance = _sum(centred.square().sum(dims)) / count
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
