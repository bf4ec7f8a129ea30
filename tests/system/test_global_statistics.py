"""Batch statistics over two processes are those of one that holds all images, in all derivatives that are taken."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from robustkit.engine.statistics import global_batch_norm

PARTS = (slice(0, 7), slice(7, 10))  # processes may hold different numbers of images
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def case(dtype: torch.dtype, affine: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Images, gradients of the result, and (weight, bias) or nothing. Means are large beside deviations."""
    draws = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(10, 5, 4, 4, generator=draws, dtype=torch.float64) for _ in range(2))
    x = x * torch.arange(1, 6).view(1, -1, 1, 1) + 3
    own = torch.float32 if dtype == torch.bfloat16 else dtype
    parameters = [torch.rand(5, generator=draws).to(own) + 0.5, torch.randn(5, generator=draws).to(own)]
    return x.to(dtype).contiguous(memory_format=torch.channels_last), gradient.to(dtype), parameters if affine else []


def alone(dtype: torch.dtype, affine: bool) -> list[Tensor]:
    """Result, running statistics and gradients of torch's own function on all images."""
    x, gradient, parameters = case(dtype, affine)
    inputs = [tensor.requires_grad_() for tensor in (x, *parameters)]
    running = [torch.zeros(5), torch.ones(5)]
    if dtype == torch.float64:
        running = [tensor.double() for tensor in running]
    out = F.batch_norm(x, *running, *(parameters or [None, None]), True, 0.1, 1e-5)
    return [out, *running, *torch.autograd.grad(out, inputs, gradient)]


def of_part(rank: int, dtype: torch.dtype, affine: bool) -> list[Tensor]:
    """The same of this process's part of the images; gradients of parameters are summed over both."""
    x, gradient, parameters = case(dtype, affine)
    part = PARTS[rank]
    here = x[part].clone().requires_grad_()
    for parameter in parameters:
        parameter.requires_grad_()
    running = [torch.zeros(5), torch.ones(5)]
    if dtype == torch.float64:
        running = [tensor.double() for tensor in running]
    out = global_batch_norm(here, *running, *(parameters or [None, None]), True, 0.1, 1e-5)
    to_x, *to_parameters = torch.autograd.grad(out, [here, *parameters], gradient[part])
    for tensor in to_parameters:
        dist.all_reduce(tensor)
    return [out.detach(), *running, to_x, *to_parameters]


def twice(rank: int) -> Tensor:
    """A function of a gradient with respect to this process's images, differentiated with respect to the weight."""
    x, _, (weight, _) = case(torch.float64, True)
    here, weight = x[PARTS[rank]].clone().requires_grad_(), weight.requires_grad_()
    out = global_batch_norm(here, None, None, weight, None, True, 0.1, 1e-5)
    (to_x,) = torch.autograd.grad(out.pow(3).sum(), here, create_graph=True)
    (to_weight,) = torch.autograd.grad(to_x.square().sum(), weight)
    dist.all_reduce(to_weight)
    return to_weight


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    once = {f"{dtype}-{affine}": of_part(rank, dtype, affine) for dtype in TOLERANCE for affine in (True, False)}
    torch.save((once, twice(rank)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, list[Tensor]], Tensor]]:
    """Of each of two processes: results of all cases, and the gradient of a gradient."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_equal_to_torch_on_all_images(dtype: torch.dtype, affine: bool, found: Any) -> None:
    expected = alone(dtype, affine)
    for part, (once, _) in zip(PARTS, found, strict=True):
        results = once[f"{dtype}-{affine}"]
        assert len(results) == len(expected)
        for number, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
            theirs = theirs[part] if number in (0, 3) else theirs
            assert (ours.double() - theirs.double()).abs().max() <= TOLERANCE[dtype] * theirs.double().abs().max()


def test_a_gradient_may_be_differentiated(found: Any) -> None:
    """As GradAlign does."""
    x, _, (weight, _) = case(torch.float64, True)
    x.requires_grad_(), weight.requires_grad_()
    out = F.batch_norm(x, None, None, weight, None, True, 0.1, 1e-5)
    (to_x,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(to_x.square().sum(), weight)
    for _, to_weight in found:
        assert torch.allclose(to_weight, expected, rtol=1e-10)
