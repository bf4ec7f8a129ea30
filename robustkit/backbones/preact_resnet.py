"""Pre-activation ResNet-18 (He et al. 2016b, Identity Mappings in Deep Residual Networks, arXiv 1603.05027).

Several versions are in use in adversarial training, and they differ in more than their activation: see the two blocks.
All start with a bare 3x3 convolution. But for GradAlign's, they end with BN and activation and keep PyTorch's default
initialisation.
"""

from functools import partial
from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from robustkit.backbones.base import Backbone, SamePad, constructor_arguments

__all__ = [
    "PreActResNet",
    "preact_resnet18",
    "preact_resnet18_gradalign",
    "preact_resnet18_raw",
    "preact_resnet18_silu",
]


class ReluBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv, plus the shortcut: identity, or 1x1 convolution of the *activated* input.

    With `raw_shortcut`, of the input as it is.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, raw_shortcut: bool = False) -> None:
        super().__init__()
        self.raw_shortcut = raw_shortcut
        self.bn1 = nn.BatchNorm2d(inputs)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, ceil(H/stride), ceil(W/stride))."""
        activated = self.act1(self.bn1(x))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(x if self.raw_shortcut else activated)
        residual: Tensor = self.conv1(activated)
        residual = self.conv2(self.act2(self.bn2(residual)))
        return shortcut + residual


class SiluBlock(nn.Module):
    """BN-SiLU-conv-BN-SiLU-conv, plus the shortcut: identity, or 3x3 convolution of the *raw* input.

    "SAME" padding at stride 2; BN momentum 0.01.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        padding = 1 if stride == 1 else 0  # stride 2 pads in self.pad
        self.pad = nn.Identity() if stride == 1 else SamePad()
        self.bn1 = nn.BatchNorm2d(inputs, momentum=0.01)
        self.act1 = nn.SiLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, momentum=0.01)
        self.act2 = nn.SiLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 3, stride, padding, bias=False) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, ceil(H/stride), ceil(W/stride))."""
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(self.pad(x))
        residual: Tensor = self.conv1(self.pad(self.act1(self.bn1(x))))
        residual = self.conv2(self.act2(self.bn2(residual)))
        return shortcut + residual


class PreActResNet(Backbone):
    """Pre-activation ResNet-18, widths 64/128/256/512; features (B, 512, H/8, W/8)."""

    num_features = 512

    def __init__(
        self,
        silu: bool,
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        raw_shortcuts: bool = False,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        block = SiluBlock if silu else partial(ReluBlock, raw_shortcut=raw_shortcuts)
        self.stem = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.stages = nn.Sequential(
            nn.Sequential(block(64, 64, 1), block(64, 64, 1)),
            nn.Sequential(block(64, 128, 2), block(128, 128, 1)),
            nn.Sequential(block(128, 256, 2), block(256, 256, 1)),
            nn.Sequential(block(256, 512, 2), block(512, 512, 1)),
        )
        self.bn = nn.BatchNorm2d(512, momentum=0.01 if silu else 0.1) if final_norm else nn.Identity()
        self.act = (nn.SiLU() if silu else nn.ReLU()) if final_norm else nn.Identity()
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 512, H/8, W/8), sizes rounded up."""
        out: Tensor = self.act(self.bn(self.stages(self.stem(x))))
        return out


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-18 (He et al. 2016b), 1x1 shortcuts on activated inputs; features (B, 512, H/8, W/8).

    11,172,170 parameters for 10 classes, 11,218,340 for 100. `kwargs`: num_classes (10), in_chans (3).
    """
    return PreActResNet(silu=False, **constructor_arguments("preact_resnet18", pretrained, kwargs))


@register_model
def preact_resnet18_raw(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-18 as in the code of RS-FGSM and N-FGSM: 1x1 shortcuts on raw inputs.

    11,172,170 parameters for 10 classes, 11,218,340 for 100. `kwargs`: num_classes (10), in_chans (3).
    """
    return PreActResNet(
        silu=False, raw_shortcuts=True, **constructor_arguments("preact_resnet18_raw", pretrained, kwargs)
    )


@register_model
def preact_resnet18_gradalign(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-18 as in GradAlign's code: 1x1 shortcuts on raw inputs, no last BN and ReLU, He's weights.

    11,171,146 parameters for 10 classes, 11,217,316 for 100. `kwargs`: num_classes (10), in_chans (3).
    """
    arguments = constructor_arguments("preact_resnet18_gradalign", pretrained, kwargs)
    model = PreActResNet(silu=False, raw_shortcuts=True, final_norm=False, **arguments)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return model


@register_model
def preact_resnet18_silu(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-18 with SiLU (Gowal et al. 2020, arXiv 2010.03593; Rebuffi et al. 2021, arXiv 2103.01946).

    3x3 shortcuts on raw inputs; features (B, 512, H/8, W/8). The papers' input normalisation is left to the caller.

    12,548,426 parameters for 10 classes, 12,594,596 for 100. `kwargs`: num_classes (10), in_chans (3).
    """
    return PreActResNet(silu=True, **constructor_arguments("preact_resnet18_silu", pretrained, kwargs))
