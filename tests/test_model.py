"""The model: normalisation inside, any timm backbone by name, modes that come back."""

import pytest
import torch

from robustkit.core.errors import SpecError
from robustkit.core.model import STATISTICS, Model, RobustModel
from robustkit.heads import GaussianMixture, Linear

SHAPE = (3, 32, 32)


def build(**settings: object) -> RobustModel:
    return Model(**settings).build(Linear(), 10, SHAPE, seed=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [("mobilenetv3_small_050", {}), ("vit_tiny_patch16_224", {"patch_size": 4}), ("resnet10t", {})],
)
def test_other_timm_models_take_small_images(backbone: str, settings: dict[str, int]) -> None:
    model = build(backbone=backbone, **settings).eval()
    x = torch.rand(2, *SHAPE, requires_grad=True)
    output = model(x)
    assert output.logits.shape == (2, 10) and output.features.ndim == 2
    (gradient,) = torch.autograd.grad(output.logits.logsumexp(1).sum(), x)
    assert gradient.isfinite().all() and gradient.abs().amax(dim=(1, 2, 3)).gt(0).all()


def test_normalisation_is_inside() -> None:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in STATISTICS["cifar10"])
    inside = build(backbone="convnet_small", normalization="cifar10").eval()
    outside = build(backbone="convnet_small").eval()  # the same seed, so the same weights
    x = torch.rand(4, *SHAPE)
    torch.testing.assert_close(inside(x).logits, outside((x - mean) / std).logits)


def test_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (
        Model(backbone="convnet_small").build(GaussianMixture(), 10, SHAPE, seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.centres"], other["head.centres"])


@pytest.mark.parametrize("mode", ["eval", "train", "train-frozen"])
@pytest.mark.parametrize("training", [True, False])
def test_modes_come_back(mode: str, training: bool) -> None:
    model = build(backbone="convnet_small").train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), model.using(mode):  # type: ignore[arg-type]
        model(torch.rand(4, *SHAPE))
        _ = 1 / 0
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.training is training and m.track_running_stats for m in norms)
    moved = any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert moved is (mode == "train")


def test_mistakes_name_the_remedy() -> None:
    with pytest.raises(SpecError, match="did you mean 'resnet18_cifar"):
        build(backbone="resnet18_cifra")
    with pytest.raises(SpecError, match="3 channels"):
        Model(backbone="convnet_small", normalization="cifar10").build(Linear(), 10, (1, 8, 8), seed=1)
    with pytest.raises(SpecError, match="cannot build"):
        build(backbone="convnet_small", patch_size=4)
