"""What all backbones share: timm's model interface, builder arguments, TensorFlow's "SAME" padding."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Backbone", "SamePad", "constructor_arguments"]

# create_model hands these to every builder; they describe stored weights, of which we have none.
_ABOUT_WEIGHTS = frozenset({"pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir"})


def constructor_arguments(name: str, pretrained: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what a timm builder got, less what only concerns pretrained weights.

    Raises:
        ValueError: if pretrained weights are asked for.
    """
    if pretrained:
        raise ValueError(f"{name} has no pretrained weights: use pretrained=False")
    return {key: value for key, value in kwargs.items() if key not in _ABOUT_WEIGHTS}


class Backbone(nn.Module, ABC):
    """Feature map, global average pool, linear classifier.

    A subclass sets `num_features`, builds its layers, ends its constructor with `reset_classifier(num_classes)` and
    defines `forward_features`.
    """

    num_features: int
    num_classes: int
    classifier: nn.Module

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the feature map (B, num_features, h, w) after the last activation."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map a feature map (B, D, h, w) to logits (B, num_classes), or to pooled features (B, D) if `pre_logits`."""
        features = x.mean(dim=(2, 3))
        if pre_logits:
            return features
        logits: Tensor = self.classifier(features)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes); to pooled features (B, D) if num_classes is 0."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the layer from pooled features to logits; an identity if num_classes is 0."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh classifier in place, where the other weights live; 0 classes leave pooled features."""
        like = next(self.parameters())
        self.num_classes = num_classes
        self.classifier = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )


class SamePad(nn.Module):
    """TensorFlow's "SAME" zero padding for a 3x3 convolution of stride 2, whose output is then ceil(H/2) x ceil(W/2).

    One row below and one column to the right; an odd height also gets a row above, an odd width a column on the left.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pad (B, C, H, W)."""
        height, width = x.shape[-2:]
        return F.pad(x, (width % 2, 1, height % 2, 1))
