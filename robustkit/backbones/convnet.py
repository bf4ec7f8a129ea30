"""A convolutional net small enough to train adversarially on a CPU in seconds."""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from robustkit.backbones.base import Backbone, constructor_arguments

__all__ = ["ConvNet", "convnet_small"]


class ConvNet(Backbone):
    """Three times conv3x3-BN-ReLU, widths 32/64/64, strides 1/2/2; features (B, 64, H/4, W/4)."""

    num_features = 64

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _layer(in_chans, 32, stride=1),
            _layer(32, 64, stride=2),
            _layer(64, 64, stride=2),
        )
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 64, H/4, W/4), sizes rounded up."""
        out: Tensor = self.layers(x)
        return out


def _layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


@register_model
def convnet_small(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Small conv net of our own for demos, on images of 8x8 upwards; features (B, 64, H/4, W/4).

    57,130 parameters for 10 classes, 56,554 with one input channel. `kwargs`: num_classes (10), in_chans (3).
    """
    return ConvNet(**constructor_arguments("convnet_small", pretrained, kwargs))
