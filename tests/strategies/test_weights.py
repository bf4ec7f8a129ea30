"""Adversarial weight perturbation (ECAS sheet 5, tests 18 and 19) and the average of weights (UIAT sheet 10.3)."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny import assert_same, at_epoch, images, labels, snapshot, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit.core.batch import Passes
from robustkit.core.errors import RecipeError, SpecError
from robustkit.weights import AWP, Exponential, Still

B = 6
PURE = Passes(forward=1, parameter_backward=1)


def objective(model: nn.Module) -> Tensor:
    """Cross-entropy in train mode with statistics left alone."""
    with model.using("train-frozen"):
        return F.cross_entropy(model(images(B, 5)).logits, labels(B))


def gradients_of(model: nn.Module, log: list[int] | None = None) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
        if log is not None:
            log.append(len(parameters))
        with torch.enable_grad():
            return list(torch.autograd.grad(objective(model), list(parameters)))

    return gradients


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def eligible(name: str, tensor: Tensor) -> bool:
    return "weight" in name and tensor.ndim > 1


def displaced_weights(model: nn.Module, spec: AWP, gradients: Any = None) -> dict[str, Tensor]:
    with spec.displaced(model, gradients or gradients_of(model), at_epoch(0, 10)):
        return weights_of(model)


@pytest.mark.parametrize("gamma", [0.005, 0.01, 0.3])
def test_awp_moves_each_weight_tensor_by_gamma_of_its_length_along_the_gradient(gamma: float) -> None:
    model = tiny_model()
    before = weights_of(model)
    gradient = dict(zip(before, torch.autograd.grad(objective(model), list(model.parameters())), strict=True))
    moved = displaced_weights(model, AWP(gamma=gamma))
    names = [name for name, tensor in before.items() if eligible(name, tensor)]
    assert len(names) == 3  # two convolutions and the head
    for name, tensor in before.items():
        shift = moved[name] - tensor
        if name not in names:
            assert torch.equal(moved[name], tensor)
            continue
        assert float(shift.norm() / tensor.norm()) == pytest.approx(gamma, rel=1e-3)
        cosine = F.cosine_similarity(shift.flatten(), gradient[name].flatten(), dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("lr", [0.01, 0.1])
def test_awp_equals_the_proxy_network(lr: float) -> None:
    """The reference's way: a second network, one plain SGD step up the loss, the difference rescaled per tensor."""
    model, proxy = tiny_model(), tiny_model()
    proxy.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(proxy.parameters(), lr=lr)
    (-F.cross_entropy(proxy.train()(images(B, 5)).logits, labels(B))).backward()
    optimizer.step()
    moved = displaced_weights(model, AWP(gamma=0.02))
    for (name, w), stepped in zip(weights_of(model).items(), proxy.parameters(), strict=True):
        if eligible(name, w):
            u = stepped.detach() - w
            wanted = w + 0.02 * (w.norm() / (u.norm() + 1e-20)) * u
            torch.testing.assert_close(moved[name], wanted, atol=1e-5, rtol=1e-4)


def test_awp_makes_the_batch_harder() -> None:
    """19: to first order the loss rises, on the same batch statistics."""
    model = tiny_model()
    plain = objective(model).item()
    for gamma in (0.001, 0.01):
        with AWP(gamma=gamma).displaced(model, gradients_of(model), at_epoch(0, 10)):
            assert objective(model).item() > plain
    assert objective(model).item() == pytest.approx(plain, abs=1e-5)


def test_awp_returns_and_leaves_no_trace() -> None:
    """18: without a step inside, weights are back to 1e-7; statistics, gradients and flags never changed."""
    model = tiny_model()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before, weights = snapshot(model), weights_of(model)
    with AWP(gamma=0.01).displaced(model, gradients_of(model), at_epoch(0, 10)):
        inside = snapshot(model)
    assert_same(
        {k: v for k, v in before.items() if k.removeprefix("state ") not in weights},
        {k: v for k, v in inside.items() if k.removeprefix("state ") not in weights},
    )
    after = snapshot(model)
    for name, tensor in weights.items():
        torch.testing.assert_close(after[f"state {name}"], tensor, atol=1e-7, rtol=0)
    assert_same(
        {k: v for k, v in before.items() if k.removeprefix("state ") not in weights},
        {k: v for k, v in after.items() if k.removeprefix("state ") not in weights},
    )


def test_a_step_inside_survives() -> None:
    """w += gamma v; step at the displaced weights; w -= gamma v."""
    model = tiny_model()
    before = weights_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    with AWP(gamma=0.05).displaced(model, gradients_of(model), at_epoch(0, 10)):
        shifted = weights_of(model)
        objective(model).backward()
        gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    for name, p in model.named_parameters():
        step = -0.05 * (gradient[name] + 0.01 * shifted[name])  # decay acts on the displaced weights
        torch.testing.assert_close(p.detach(), before[name] + step, atol=1e-6, rtol=0)


def test_awp_comes_back_after_an_exception() -> None:
    model = tiny_model()
    before = weights_of(model)
    with (
        pytest.raises(FloatingPointError),
        AWP(gamma=0.1).displaced(model, gradients_of(model), at_epoch(0, 10)),
    ):
        raise FloatingPointError("inside")
    for name, tensor in weights_of(model).items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=0)

    def broken(parameters: Sequence[Tensor]) -> list[Tensor]:
        raise FloatingPointError("while probing")

    kept = weights_of(model)
    with pytest.raises(FloatingPointError), AWP().displaced(model, broken, at_epoch(0, 10)):
        pass
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights_of(model).items())


def test_without_gradient_a_tensor_stays() -> None:
    model = tiny_model()
    before = weights_of(model)
    moved = displaced_weights(model, AWP(gamma=0.1), lambda parameters: [torch.zeros_like(p) for p in parameters])
    assert all(torch.equal(tensor, before[name]) for name, tensor in moved.items())


def test_awp_leaves_frozen_weights_out() -> None:
    model = tiny_model()
    model.backbone.layers[0].weight.requires_grad_(False)
    before, log = weights_of(model), []
    moved = displaced_weights(model, AWP(gamma=0.1), gradients_of(model, log))
    assert log == [2]
    assert torch.equal(moved["backbone.layers.0.weight"], before["backbone.layers.0.weight"])


def test_awp_off() -> None:
    """18: gamma = 0, or an epoch before its start, is an ordinary step without a probing pass."""
    model = tiny_model()
    before = weights_of(model)
    for spec, epoch in ((AWP(gamma=0), 5), (AWP(start=10), 8), (AWP(start=0.5), 3)):
        log: list[int] = []
        with spec.displaced(model, gradients_of(model, log), at_epoch(epoch, 10)):
            assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())
        assert log == []
        assert spec.passes(at_epoch(epoch, 10), PURE) == Passes()
    for spec, epoch in ((AWP(), 0), (AWP(start=10), 9), (AWP(start=0.5), 4)):
        log = []
        with spec.displaced(model, gradients_of(model, log), at_epoch(epoch, 10)):
            pass
        assert log == [3]
        assert spec.passes(at_epoch(epoch, 10), PURE) == PURE


def test_awp_late_start_is_refused() -> None:
    class Ten:
        epochs = 10

    AWP(start=10).check(Ten)
    with pytest.raises(RecipeError, match=r"weights\.start"):
        AWP(start=12).check(Ten)


def test_still() -> None:
    model, log = tiny_model(), []
    before = snapshot(model)
    with Still().displaced(model, gradients_of(model, log), at_epoch(0, 10)):
        assert_same(before, snapshot(model))
    assert log == [] and Still().passes(at_epoch(0, 10), PURE) == Passes()
    assert Still().accumulates and not AWP().accumulates


# The average


def test_decay_sequence_of_the_sheet() -> None:
    """UIAT 23: 0.18182, 0.25, 0.55, 0.918 at s = 1, 2, 10, 100; 0.995 from s = 1,790 on."""
    average = Exponential()
    for step, wanted in ((1, 0.18182), (2, 0.25), (10, 0.55), (100, 0.91818)):
        assert average.decay(step, 39100) == pytest.approx(wanted, abs=1e-5)
    assert average.decay(1789, 39100) < 0.995 and average.decay(1790, 39100) == average.decay(39100, 39100) == 0.995
    values = [average.decay(step, 39100) for step in range(1, 3000)]
    assert values == sorted(values)


def test_decay_waits_for_the_warm_up() -> None:
    """UIAT 12: nothing of the old average is kept while s < w = 0.025 of all steps; a rate of 0 keeps nothing ever."""
    average = Exponential(warm_up=0.025)
    assert {average.decay(step, 4000) for step in range(1, 100)} == {0.0}
    assert average.decay(100, 4000) == pytest.approx(0.1) and average.decay(101, 4000) == pytest.approx(2 / 11)
    assert {Exponential(rate=0.0).decay(step, 4000) for step in range(1, 200)} == {0.0}


def test_refused() -> None:
    for make in (lambda: Exponential(rate=1.0), lambda: Exponential(warm_up=2), lambda: AWP(gamma=-0.1)):
        with pytest.raises(SpecError):
            make()
