"""Wide ResNets, ten times widened (Zagoruyko & Komodakis 2016, Wide Residual Networks, arXiv 1605.07146).

WRN-d-10 has three groups of (d - 4) / 6 pre-activation blocks, no dropout, and He initialisation by fan-out.
The SiLU versions pad as TensorFlow does at stride 2 and have BN momentum 0.01; shortcuts are the same in both.
"""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from robustkit.backbones.base import Backbone, SamePad, constructor_arguments

__all__ = ["WideResNet", "wrn28_10", "wrn28_10_silu", "wrn34_10", "wrn34_10_silu"]


class WideBlock(nn.Module):
    """BN-act-conv-BN-act-conv, plus the shortcut: identity, or 1x1 convolution of the *activated* input."""

    def __init__(self, inputs: int, outputs: int, stride: int, silu: bool) -> None:
        super().__init__()
        same = silu and stride == 2
        momentum = 0.01 if silu else 0.1
        self.bn1 = nn.BatchNorm2d(inputs, momentum=momentum)
        self.act1 = nn.SiLU() if silu else nn.ReLU()
        self.pad = SamePad() if same else nn.Identity()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=0 if same else 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, momentum=momentum)
        self.act2 = nn.SiLU() if silu else nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, ceil(H/stride), ceil(W/stride))."""
        activated = self.act1(self.bn1(x))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(activated)
        residual: Tensor = self.conv1(self.pad(activated))
        residual = self.conv2(self.act2(self.bn2(residual)))
        return shortcut + residual


class WideResNet(Backbone):
    """WRN-d-`widen` with d = 6 `blocks` + 4; groups `widen` times 16, 32, 64 wide; features (B, 64 widen, H/4, W/4)."""

    def __init__(self, blocks: int, widen: int, silu: bool, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_features = 64 * widen
        self.stem = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.groups = nn.Sequential(
            _group(blocks, 16, 16 * widen, stride=1, silu=silu),
            _group(blocks, 16 * widen, 32 * widen, stride=2, silu=silu),
            _group(blocks, 32 * widen, 64 * widen, stride=2, silu=silu),
        )
        self.bn = nn.BatchNorm2d(self.num_features, momentum=0.01 if silu else 0.1)
        self.act = nn.SiLU() if silu else nn.ReLU()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # N(0, 2 / (k k outputs))
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H/4, W/4), sizes rounded up."""
        out: Tensor = self.act(self.bn(self.groups(self.stem(x))))
        return out

    def reset_classifier(self, num_classes: int) -> None:
        """As in `Backbone`, with the bias at zero."""
        super().reset_classifier(num_classes)
        if isinstance(self.classifier, nn.Linear):
            nn.init.zeros_(self.classifier.bias)


def _group(blocks: int, inputs: int, outputs: int, stride: int, silu: bool) -> nn.Sequential:
    first = WideBlock(inputs, outputs, stride, silu)
    return nn.Sequential(first, *(WideBlock(outputs, outputs, 1, silu) for _ in range(blocks - 1)))


@register_model
def wrn28_10(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-28-10 (Zagoruyko & Komodakis 2016), widths 160/320/640; features (B, 640, H/4, W/4).

    36,479,194 parameters for 10 classes, 36,536,884 for 100. `kwargs`: num_classes (10), in_chans (3).
    """
    return WideResNet(blocks=4, widen=10, silu=False, **constructor_arguments("wrn28_10", pretrained, kwargs))


@register_model
def wrn34_10(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-34-10 (Zagoruyko & Komodakis 2016), widths 160/320/640; features (B, 640, H/4, W/4).

    46,160,474 parameters for 10 classes, 46,218,164 for 100. `kwargs`: num_classes (10), in_chans (3).
    """
    return WideResNet(blocks=5, widen=10, silu=False, **constructor_arguments("wrn34_10", pretrained, kwargs))


@register_model
def wrn28_10_silu(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-28-10 with SiLU (Gowal et al. 2020, arXiv 2010.03593; Rebuffi et al. 2021, arXiv 2103.01946).

    Features (B, 640, H/4, W/4). The papers' input normalisation is left to the caller.

    36,479,194 parameters for 10 classes, 36,536,884 for 100. `kwargs`: num_classes (10), in_chans (3).
    """
    return WideResNet(blocks=4, widen=10, silu=True, **constructor_arguments("wrn28_10_silu", pretrained, kwargs))


@register_model
def wrn34_10_silu(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-34-10 with SiLU (Gowal et al. 2020, arXiv 2010.03593; Rebuffi et al. 2021, arXiv 2103.01946).

    Features (B, 640, H/4, W/4). The papers' input normalisation is left to the caller.

    46,160,474 parameters for 10 classes, 46,218,164 for 100. `kwargs`: num_classes (10), in_chans (3).
    """
    return WideResNet(blocks=5, widen=10, silu=True, **constructor_arguments("wrn34_10_silu", pretrained, kwargs))
