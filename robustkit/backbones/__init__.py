"""Small-image backbones, registered with timm: `timm.create_model(name, num_classes=K, in_chans=C)`.

Importing this package registers the names

    resnet18_cifar   resnet18_cifar_w16                      CIFAR ResNet-18; the same net at a quarter of the width
    preact_resnet18  preact_resnet18_silu                    pre-activation ResNet-18
    preact_resnet18_raw  preact_resnet18_gradalign           the same as single-step methods have it
    wrn28_10  wrn34_10  wrn28_10_silu  wrn34_10_silu         Wide ResNets
    convnet_small                                            three convolutions, for CPU demos on images of 8x8 upwards

Every backbone maps images (B, in_chans, H, W) to logits (B, num_classes) by `forward_features`, a global average pool
and one linear layer; see `Backbone`. None normalises its input: the caller's wrapper does. None has pretrained weights.
"""

from robustkit.backbones.base import Backbone
from robustkit.backbones.convnet import convnet_small
from robustkit.backbones.preact_resnet import (
    preact_resnet18,
    preact_resnet18_gradalign,
    preact_resnet18_raw,
    preact_resnet18_silu,
)
from robustkit.backbones.resnet import resnet18_cifar, resnet18_cifar_w16
from robustkit.backbones.wide_resnet import wrn28_10, wrn28_10_silu, wrn34_10, wrn34_10_silu

__all__ = [
    "Backbone",
    "convnet_small",
    "preact_resnet18",
    "preact_resnet18_gradalign",
    "preact_resnet18_raw",
    "preact_resnet18_silu",
    "resnet18_cifar",
    "resnet18_cifar_w16",
    "wrn28_10",
    "wrn28_10_silu",
    "wrn34_10",
    "wrn34_10_silu",
]
