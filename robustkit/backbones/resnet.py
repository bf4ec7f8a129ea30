"""ResNet-18 for 32x32 images (He et al. 2016, Deep Residual Learning for Image Recognition, arXiv 1512.03385).

A 3x3 stem of stride 1 without max-pool, four stages of two basic blocks, PyTorch's default initialisation.
"""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from robustkit.backbones.base import Backbone, constructor_arguments

__all__ = ["ResNet", "resnet18_cifar", "resnet18_cifar_w16"]


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut, then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, ceil(H/stride), ceil(W/stride))."""
        residual = self.act1(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        out: Tensor = self.act2(self.shortcut(x) + residual)
        return out


class ResNet(Backbone):
    """ResNet-18 whose stages are `width` times 1, 2, 4, 8 wide; features (B, 8 width, H/8, W/8)."""

    def __init__(self, width: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_features = 8 * width
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.stages = nn.Sequential(
            _stage(width, width, stride=1),
            _stage(width, 2 * width, stride=2),
            _stage(2 * width, 4 * width, stride=2),
            _stage(4 * width, 8 * width, stride=2),
        )
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H/8, W/8), sizes rounded up."""
        out: Tensor = self.stages(self.stem(x))
        return out


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 (He et al. 2016), widths 64/128/256/512; features (B, 512, H/8, W/8).

    11,173,962 parameters for 10 classes, 11,220,132 for 100. `kwargs`: num_classes (10), in_chans (3).
    """
    return ResNet(width=64, **constructor_arguments("resnet18_cifar", pretrained, kwargs))


@register_model
def resnet18_cifar_w16(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 (He et al. 2016) for CPUs, widths 16/32/64/128; features (B, 128, H/8, W/8).

    701,466 parameters for 10 classes, 713,076 for 100. `kwargs`: num_classes (10), in_chans (3).
    """
    return ResNet(width=16, **constructor_arguments("resnet18_cifar_w16", pretrained, kwargs))
