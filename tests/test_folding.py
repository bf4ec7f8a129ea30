"""Folding: the same function, found in any module, and refused wherever it would not be the same."""

import copy
import threading
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

import robustkit.backbones  # noqa: F401
from robustkit.attacks import PGD
from robustkit.backbones.wide_resnet import WideResNet
from robustkit.core.batch import Budget
from robustkit.core.model import Model, RobustModel
from robustkit.core.parts import fold_backbone
from robustkit.core.rng import whole
from robustkit.core.world import World
from robustkit.engine import Predictor, count_passes
from robustkit.engine.folding import Folding, fold
from robustkit.heads import Linear
from robustkit.threats import Linf


def lively(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters that are not the initial ones; eval mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.5)
    return model.eval()


@register_model
def wrn10_2_silu(pretrained: bool = False, num_classes: int = 10, **kwargs: Any) -> WideResNet:
    """The blocks of WRN-28-10 with SiLU, in a net that a test can afford."""
    return WideResNet(blocks=1, widen=2, silu=True, num_classes=num_classes)


def folded(model: nn.Module, images: Tensor) -> Folding:
    folding = fold(model, images)
    assert folding is not None
    return folding


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("resnet18_cifar_w16", 20),  # all of them
        ("preact_resnet18", 8),  # the inner ones: one in each of eight blocks
        ("preact_resnet18_silu", 8),
        ("wrn10_2_silu", 4),  # the stem's, which a normalisation alone takes, and the inner ones
        ("convnet_small", 3),
        ("resnet18", 20),
        ("mobilenetv3_small_050", 34),  # depthwise convolutions
    ],
)
def test_backbones_give_the_same_logits_and_gradients(name: str, norms: int) -> None:
    size = 64 if name in ("resnet18", "mobilenetv3_small_050") else 32
    model = lively(timm.create_model(name, num_classes=10))
    images = torch.rand(3, 3, size, size)
    folding = folded(model, images)
    assert folding.folded == norms
    other = torch.rand(5, 3, size, size)

    def gradient(inside: bool) -> tuple[Tensor, Tensor]:
        x = other.clone().requires_grad_()
        logits = (folding.twin if inside else model)(x)
        (slope,) = torch.autograd.grad(logits.logsumexp(dim=1).sum(), x)
        return logits.detach(), slope

    (plain, slope), (found, found_slope) = gradient(False), gradient(True)
    assert not torch.equal(plain, found)  # something was folded
    assert (plain - found).norm() <= 1e-4 * plain.norm()
    assert (slope - found_slope).norm() <= 1e-4 * slope.norm()


def test_by_hand() -> None:
    conv, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)
    with torch.no_grad():
        conv.weight.fill_(2)
        conv.bias.fill_(1)
        norm.running_mean.fill_(3)
        norm.running_var.fill_(4 - norm.eps)
        norm.weight.fill_(5)
        norm.bias.fill_(-1)
    model = nn.Sequential(conv, norm, nn.Flatten()).eval()
    x = torch.tensor([0.25, 0.5]).view(2, 1, 1, 1)
    folding = folded(model, x)
    assert folding.twin(x).flatten().tolist() == pytest.approx([5 * (2 * v + 1 - 3) / 2 - 1 for v in (0.25, 0.5)])
    with torch.no_grad():
        norm.weight.fill_(7)
    assert folding.twin(x).flatten().tolist() == pytest.approx([5 * (2 * v + 1 - 3) / 2 - 1 for v in (0.25, 0.5)])
    folding.refresh()
    assert folding.twin(x).flatten().tolist() == pytest.approx([7 * (2 * v + 1 - 3) / 2 - 1 for v in (0.25, 0.5)])


class Taken(nn.Module):
    """A convolution whose result somebody else takes, too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.again, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if self.how == "added":
            return (self.norm(out) + out).flatten(1)
        if self.how == "viewed":
            return torch.cat([self.norm(out).flatten(1), out.view(len(x), -1)], dim=1)
        if self.how == "conv twice":
            return (self.norm(out) + self.conv(x.flip(0))).flatten(1)
        if self.how == "norm twice":
            return (self.norm(out) + self.norm(self.again(x))).flatten(1)
        if self.how == "batch statistics":
            return F.batch_norm(out, None, None, training=True).flatten(1)
        return F.conv2d(x, self.conv.weight * 2).flatten(1) + self.norm(x[:, :1].expand(-1, 4, -1, -1)).sum()


@pytest.mark.parametrize("how", ["added", "viewed", "conv twice", "norm twice", "batch statistics", "computed weight"])
def test_what_is_taken_elsewhere_is_not_folded(how: str) -> None:
    assert fold(lively(Taken(how)), torch.rand(2, 3, 6, 6)) is None


def test_shapes_may_be_asked_for() -> None:
    class Asks(Taken):
        def forward(self, x: Tensor) -> Tensor:
            out = self.conv(x)
            assert out.shape[1] == out.size(1) == 4 and out.dim() == 4 and out.is_floating_point()
            return self.norm(out).flatten(1)

    assert folded(lively(Asks("")), torch.rand(2, 3, 6, 6)).folded == 1


def test_a_function_that_jumps_is_left_alone() -> None:
    class Jumps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())

        def forward(self, x: Tensor) -> Tensor:
            return torch.rand(len(x), 2) + self.inner(x)[:, :2]

    assert fold(lively(Jumps()), torch.rand(2, 3, 6, 6)) is None


def test_nothing_is_touched() -> None:
    model = lively(timm.create_model("resnet18_cifar_w16", num_classes=10))
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(2, 3, 32, 32)
    plain = model(x)
    folding = folded(model, x)
    folding.twin(x)
    assert torch.equal(model(x), plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 20
    shared = {id(parameter) for parameter in folding.twin.parameters()} & {id(p) for p in model.parameters()}
    assert len(shared) == 2  # the linear layer's


def test_what_cannot_be_copied_is_left_alone() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()))
    assert fold(model, torch.rand(2, 3, 6, 6)) is not None
    model.lock = threading.Lock()
    assert fold(model, torch.rand(2, 3, 6, 6)) is None


# --- in the prediction path -------------------------------------------------------------------------------------------


def robust_model(name: str = "resnet18_cifar_w16") -> RobustModel:
    model = Model(backbone=name, normalization="cifar10").build(Linear(), 10, (3, 32, 32), seed=1)
    lively(model)
    return model.to(memory_format=torch.channels_last)


def predictors(model: RobustModel, precision: str = "fp32") -> tuple[Predictor, Predictor]:
    folding = fold_backbone(model, World(samples=1, training=1, classes=10, image_shape=(3, 32, 32)))
    assert folding is not None
    device = torch.device("cpu")
    return Predictor(model, device, precision), Predictor(model, device, precision, folding)


def test_the_prediction_path_takes_it_in_eval_mode_only() -> None:
    model = robust_model().train()
    plain, quick = predictors(model)
    x = torch.rand(6, 3, 32, 32)
    with torch.no_grad():
        for mode in ("train-frozen", "eval"):
            with plain.using(mode) as forward:
                expected = forward(x).logits
            with quick.using(mode) as forward:
                found = forward(x).logits
            assert torch.equal(found, expected) == (mode != "eval") and model.training
            assert (found - expected).norm() <= 1e-4 * expected.norm()
        with quick.using("eval"), quick.using("train-frozen") as forward:
            assert torch.equal(forward(x).logits, plain(x).logits)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_those_of_the_moment(precision: str) -> None:
    model = robust_model()
    plain, quick = predictors(model, precision)
    x = torch.rand(16, 3, 32, 32)
    for _ in range(2):
        with torch.no_grad(), plain.using("eval") as slow, quick.using("eval") as fast:
            expected, found = slow(x).logits, fast(x).logits
        assert (found - expected).norm() <= (1e-4 if precision == "fp32" else 3e-2) * expected.norm()
        model.train()
        model(torch.rand(16, 3, 32, 32)).logits.square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad  # statistics moved, too
        model.eval()


def test_the_fast_attack_is_as_strong() -> None:
    """bfloat16 and folded: most signs are the same, and the loss reached, judged the plain way, is within 1 %."""
    model = robust_model()
    model.head.linear.weight.data *= 100  # of untrained features: logits that an attack can move
    plain, _ = predictors(model)
    _, quick = predictors(model, "bf16")
    x, y = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10
    budget = Budget(torch.full((32,), 8 / 255))

    def slope(predict: Predictor) -> Tensor:
        image = x.clone().requires_grad_()
        with predict.using("eval") as forward:
            (gradient,) = torch.autograd.grad(F.cross_entropy(forward(image).logits, y, reduction="sum"), image)
        return gradient.sign()

    def loss(images: Tensor) -> float:
        with torch.no_grad(), plain.using("eval") as forward:
            return float(F.cross_entropy(forward(images).logits, y))

    assert (slope(plain) == slope(quick)).float().mean() > 0.95
    attacked = {predict: PGD(steps=10)(predict, x, y, budget, Linf(), whole(x, 0)) for predict in (plain, quick)}
    gains = [loss(attacked[predict]) - loss(x) for predict in (plain, quick)]
    assert gains[0] > 0.1 and gains[1] == pytest.approx(gains[0], rel=0.01)


def test_gradients_reach_images_and_passes_are_counted() -> None:
    model = robust_model()
    plain, quick = predictors(model)
    slopes = []
    for predict in (plain, quick):
        x = torch.linspace(0, 1, 4 * 3072).view(4, 3, 32, 32).requires_grad_()
        with count_passes(model) as count, predict.using("eval") as forward:
            slopes.append(torch.autograd.grad(forward(x).logits.logsumexp(dim=1).sum(), x)[0])
        assert (count.forward, count.input_backward, count.parameter_backward) == (4, 4, 0)
    assert (slopes[0] - slopes[1]).norm() <= 1e-4 * slopes[0].norm()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_who_replaces_a_tensor_is_followed() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)))
    x = torch.rand(2, 3, 6, 6)
    folding = folded(model, x)
    model[3].weight = nn.Parameter(torch.ones(2, 64))
    assert torch.allclose(folding.refresh()(x), model(x), rtol=1e-4)
