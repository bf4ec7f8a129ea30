"""Backbones: sizes as published, timm's interface, and the details in which the variants differ."""

import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit import backbones
from robustkit.backbones.base import SamePad
from robustkit.backbones.preact_resnet import ReluBlock, SiluBlock
from robustkit.backbones.resnet import BasicBlock
from robustkit.backbones.wide_resnet import WideBlock, WideResNet

# name: (parameters for 10 classes, for 100 classes, feature width, total stride)
PUBLISHED = {
    "resnet18_cifar": (11_173_962, 11_220_132, 512, 8),
    "preact_resnet18": (11_172_170, 11_218_340, 512, 8),
    "preact_resnet18_silu": (12_548_426, 12_594_596, 512, 8),
    "preact_resnet18_raw": (11_172_170, 11_218_340, 512, 8),
    "preact_resnet18_gradalign": (11_171_146, 11_217_316, 512, 8),
    "wrn28_10": (36_479_194, 36_536_884, 640, 4),
    "wrn28_10_silu": (36_479_194, 36_536_884, 640, 4),
    "wrn34_10": (46_160_474, 46_218_164, 640, 4),
    "wrn34_10_silu": (46_160_474, 46_218_164, 640, 4),
}
OWN = {
    "resnet18_cifar_w16": (701_466, 713_076, 128, 8),
    "convnet_small": (57_130, 62_980, 64, 4),
}
ALL = PUBLISHED | OWN
SMALL = ["resnet18_cifar", "resnet18_cifar_w16", "preact_resnet18", "preact_resnet18_silu", "convnet_small"]


def on_meta(name: str, **kwargs: int) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shaken(module: nn.Module) -> nn.Module:
    """The module in eval mode, its BatchNorms no longer identities."""
    generator = torch.Generator().manual_seed(0)
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            for tensor in (bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


def normalised(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-5)


def test_timm_lists_every_name() -> None:
    assert set(ALL) <= set(timm.list_models())
    assert set(ALL) == set(backbones.__all__) - {"Backbone"}


@pytest.mark.parametrize("name", ALL)
def test_parameter_counts(name: str) -> None:
    ten, hundred, _, _ = ALL[name]
    assert count(on_meta(name)) == ten
    assert count(on_meta(name, num_classes=100)) == hundred


def test_w16_count_from_layer_shapes() -> None:
    def conv(inputs: int, outputs: int, kernel: int) -> int:
        return inputs * outputs * kernel**2 + 2 * outputs  # with its BatchNorm

    total = conv(3, 16, 3) + 4 * conv(16, 16, 3)
    for width in (32, 64, 128):
        total += conv(width // 2, width, 3) + 3 * conv(width, width, 3) + conv(width // 2, width, 1)
    assert total + 128 * 10 + 10 == OWN["resnet18_cifar_w16"][0]
    assert total + 128 * 100 + 100 == OWN["resnet18_cifar_w16"][1]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [8, 29, 32, 64])
def test_shapes(name: str, size: int) -> None:
    _, _, width, stride = ALL[name]
    model = on_meta(name, num_classes=7)
    x = torch.empty(2, 3, size, size, device="meta")
    assert model.num_features == width
    assert model.forward_features(x).shape == (2, width, math.ceil(size / stride), math.ceil(size / stride))
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize("name", SMALL)
def test_head_is_pool_then_classifier(name: str) -> None:
    torch.manual_seed(0)
    model = shaken(timm.create_model(name))
    with torch.no_grad():
        x = torch.rand(2, 3, 32, 32)
        maps = model.forward_features(x)
        pooled = model.forward_head(maps, pre_logits=True)
        torch.testing.assert_close(pooled, F.adaptive_avg_pool2d(maps, 1).flatten(1))
        logits = model(x)
        assert logits.shape == (2, 10)
        assert torch.equal(model.get_classifier()(pooled), logits)
        if name != "preact_resnet18_silu":
            assert maps.min() == 0  # after the last ReLU

        model.reset_classifier(0)
        assert isinstance(model.get_classifier(), nn.Identity) and model.num_classes == 0
        assert torch.equal(model(x), pooled)
        model.reset_classifier(4)
        assert model(x).shape == (2, 4) and model.num_classes == 4


@pytest.mark.parametrize("name", ALL)
def test_without_classes_it_returns_features(name: str) -> None:
    model = on_meta(name, num_classes=0)
    assert count(model) == ALL[name][0] - 10 * ALL[name][2] - 10
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, ALL[name][2])


def test_reset_classifier_keeps_the_dtype() -> None:
    model = timm.create_model("convnet_small").double()
    model.reset_classifier(3)
    assert model(torch.rand(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", SMALL)
def test_gradient_reaches_small_grey_images(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, in_chans=1, num_classes=3)
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    gradient.square().sum().backward()  # and again: gradient regularisers need second derivatives
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    first = next(model.parameters()).grad
    assert first is not None and first.abs().sum() > 0


@pytest.mark.parametrize("name", ALL)
def test_misuse_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'drop_rate'"):
        on_meta(name, drop_rate=0)
    with pytest.raises(ValueError, match=f"{name} has no pretrained weights"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", ALL)
def test_modules_are_plain(name: str) -> None:
    momentum = 0.01 if name.endswith("silu") else 0.1
    activation = nn.SiLU if name.endswith("silu") else nn.ReLU
    for module in on_meta(name).modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert type(module) is nn.BatchNorm2d and module.momentum == momentum
        if isinstance(module, nn.ReLU | nn.SiLU):
            assert type(module) is activation and not module.inplace
        assert not isinstance(module, nn.Conv2d) or module.bias is None
        assert not isinstance(module, nn.MaxPool2d | nn.Dropout)


def test_same_padding() -> None:
    weight = torch.randn(5, 3, 3, 3)
    for size in (2, 8, 32):
        x = torch.randn(2, 3, size, size)
        assert torch.equal(F.conv2d(SamePad()(x), weight, stride=2), F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2))
    assert SamePad()(torch.empty(1, 1, 7, 8)).shape == (1, 1, 9, 9)  # an odd height is padded on both sides


def test_basic_block() -> None:
    block = shaken(BasicBlock(4, 6, stride=2))
    x = torch.randn(2, 4, 8, 8)
    out = F.relu(normalised(block.bn1, F.conv2d(x, block.conv1.weight, stride=2, padding=1)))
    out = normalised(block.bn2, F.conv2d(out, block.conv2.weight, padding=1))
    conv, bn = block.shortcut
    out = F.relu(out + normalised(bn, F.conv2d(x, conv.weight, stride=2)))
    torch.testing.assert_close(block(x), out)


def test_relu_block_takes_its_shortcut_from_the_activated_input() -> None:
    block = shaken(ReluBlock(4, 6, stride=2))
    x = torch.randn(2, 4, 8, 8)
    a = F.relu(normalised(block.bn1, x))
    out = F.relu(normalised(block.bn2, F.conv2d(a, block.conv1.weight, stride=2, padding=1)))
    out = F.conv2d(out, block.conv2.weight, padding=1) + F.conv2d(a, block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(x), out)


def test_relu_block_with_a_raw_shortcut() -> None:
    block = shaken(ReluBlock(4, 6, stride=2, raw_shortcut=True))
    x = torch.randn(2, 4, 8, 8)
    out = F.conv2d(F.relu(normalised(block.bn1, x)), block.conv1.weight, stride=2, padding=1)
    out = F.conv2d(F.relu(normalised(block.bn2, out)), block.conv2.weight, padding=1)
    torch.testing.assert_close(block(x), out + F.conv2d(x, block.shortcut.weight, stride=2))


def test_networks_of_the_single_step_methods() -> None:
    """UIAT sheet 9.1 and 11.2: raw shortcuts; GradAlign's without the last norm, He's weights."""
    torch.manual_seed(0)
    plain, raw, bare = (timm.create_model(f"preact_resnet18{name}") for name in ("", "_raw", "_gradalign"))
    for model, expected in ((plain, False), (raw, True), (bare, True)):
        assert all(block.raw_shortcut == expected for stage in model.stages for block in stage)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(bare.forward_features(x), bare.stages(bare.stem(x))) and bare.forward_features(x).min() < 0
        assert raw.forward_features(x).min() == 0
    assert not any(isinstance(module, nn.BatchNorm2d) for module in (bare.bn, bare.act))
    for block, outputs in zip((stage[0] for stage in bare.stages), (64, 128, 256, 512), strict=True):
        assert block.conv2.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * outputs)), rel=0.03)
    assert bare.classifier.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.05)
    assert not bare.classifier.bias.any()


def test_silu_block_takes_its_shortcut_from_the_raw_input() -> None:
    block = shaken(SiluBlock(4, 6, stride=2))
    x = torch.randn(2, 4, 8, 8)
    a = F.pad(F.silu(normalised(block.bn1, x)), (0, 1, 0, 1))
    out = F.silu(normalised(block.bn2, F.conv2d(a, block.conv1.weight, stride=2)))
    shortcut = F.conv2d(F.pad(x, (0, 1, 0, 1)), block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(x), F.conv2d(out, block.conv2.weight, padding=1) + shortcut)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_wide_block(silu: bool, stride: int) -> None:
    act = F.silu if silu else F.relu
    block = shaken(WideBlock(4, 6, stride, silu))
    x = torch.randn(2, 4, 8, 8)
    a = act(normalised(block.bn1, x))
    padded = F.pad(a, (0, 1, 0, 1) if silu and stride == 2 else (1, 1, 1, 1))
    out = act(normalised(block.bn2, F.conv2d(padded, block.conv1.weight, stride=stride)))
    out = F.conv2d(out, block.conv2.weight, padding=1) + F.conv2d(a, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), out)


@pytest.mark.parametrize("block", [ReluBlock(4, 4, 1), SiluBlock(4, 4, 1), WideBlock(4, 4, 1, silu=True)])
def test_identity_shortcut_is_the_raw_input(block: nn.Module) -> None:
    nn.init.zeros_(shaken(block).conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_wide_resnet_initialisation() -> None:
    torch.manual_seed(0)
    model = WideResNet(blocks=1, widen=4, silu=False)
    assert model.stem.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 16)), rel=0.15)
    for group, outputs in zip(model.groups, (64, 128, 256), strict=True):
        block = group[0]
        assert block.conv2.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * outputs)), rel=0.03)
        assert block.shortcut.weight.std().item() == pytest.approx(math.sqrt(2 / outputs), rel=0.1)
    assert not model.classifier.bias.any()
    model.reset_classifier(5)
    assert not model.classifier.bias.any() and model.classifier.weight.any()
