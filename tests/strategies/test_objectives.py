"""What attacks climb: values from their definitions, gradients from finite differences in float64."""

import math

import pytest
import torch
from tiny import labels
from torch import Tensor
from torch.nn import functional as F

from robustkit.core.batch import Output
from robustkit.core.strategy import Reference
from robustkit.functional import kl_from_logits, kl_from_probabilities, margin
from robustkit.objectives import KL, CrossEntropyObjective, InverseObjective, Margin

B, K, D = 5, 4, 7


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output(logits: Tensor, features: Tensor | None = None) -> Output:
    return Output(logits, logits, logits if features is None else features, logits.new_zeros(len(logits)))


def probabilities(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    return [weight / sum(weights) for weight in weights]


def difference(function, at: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a scalar function, entry by entry."""
    gradient = torch.zeros_like(at)
    for i in range(at.numel()):
        ends = []
        for sign in (1, -1):
            moved = at.detach().clone()
            moved.view(-1)[i] += sign * step
            ends.append(float(function(moved)))
        gradient.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def gradient_of(function, at: Tensor) -> Tensor:
    at = at.detach().clone().requires_grad_()
    return torch.autograd.grad(function(at), at)[0]


def test_cross_entropy() -> None:
    logits, y = draw(0, B, K), labels(B)
    values = CrossEntropyObjective()(output(logits), y, Reference())
    assert values.shape == (B,)
    wanted = [-math.log(probabilities(logits[i].tolist())[y[i]]) for i in range(B)]
    assert values.tolist() == pytest.approx(wanted, rel=1e-12)
    assert not CrossEntropyObjective().needs_reference


def test_attacks_see_logits_without_a_margin() -> None:
    """`margined` is for the classification loss in training alone."""
    logits, y = draw(0, B, K), labels(B)
    tricky = Output(logits, draw(1, B, K) * 100, logits, logits.new_zeros(B))
    for objective in (CrossEntropyObjective(), KL(), Margin(), InverseObjective()):
        reference = Reference(output(draw(2, B, K)), output(draw(3, B, K)))
        assert torch.equal(objective(tricky, y, reference), objective(output(logits), y, reference))


def test_kl_is_from_the_natural_prediction() -> None:
    natural, logits, y = draw(0, B, K), draw(1, B, K), labels(B)
    values = KL()(output(logits), y, Reference(natural=output(natural)))
    for i in range(B):
        p, q = probabilities(natural[i].tolist()), probabilities(logits[i].tolist())
        wanted = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        assert float(values[i]) == pytest.approx(wanted, rel=1e-5)
    assert KL().needs_reference


def test_kl_has_no_gradient_where_the_predictions_agree() -> None:
    natural = draw(0, B, K)
    gradient = gradient_of(lambda v: KL()(output(v), labels(B), Reference(output(natural))).sum(), natural)
    assert gradient.abs().max() < 1e-6


def test_kl_holds_the_natural_prediction_constant() -> None:
    natural = draw(0, B, K).requires_grad_()
    logits = draw(1, B, K).requires_grad_()
    KL()(output(logits), labels(B), Reference(output(natural))).sum().backward()
    assert natural.grad is None and logits.grad is not None


def test_margin() -> None:
    logits, y = draw(0, B, K), labels(B)
    for i in range(B):
        row = logits[i].tolist()
        wanted = max(value for k, value in enumerate(row) if k != y[i]) - row[y[i]]
        assert float(margin(logits, y)[i]) == pytest.approx(wanted, rel=1e-12)
        assert float(Margin(clamp=False)(output(logits), y, Reference())[i]) == pytest.approx(wanted, rel=1e-12)
        assert float(Margin()(output(logits), y, Reference())[i]) == pytest.approx(min(wanted, 0), rel=1e-12)
    assert (margin(logits, y) > 0).tolist() == (logits.argmax(dim=1) != y).tolist()


def test_a_clamped_margin_stops_at_misclassified_images() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
    y = torch.tensor([0, 0])
    gradient = gradient_of(lambda v: Margin()(output(v), y, Reference()).sum(), logits)
    assert gradient.tolist() == [[-1, 1, 0], [0, 0, 0]]
    gradient = gradient_of(lambda v: Margin(clamp=False)(output(v), y, Reference()).sum(), logits)
    assert gradient.tolist() == [[-1, 1, 0], [-1, 1, 0]]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_inverse_from_the_definition(reduction: str) -> None:
    """-[CE + beta (L1 to the natural features - L1 to the adversarial ones)], image by image."""
    beta, y = 0.7, labels(B)
    logits, features, natural, adversarial = draw(0, B, K), draw(1, B, D), draw(2, B, D), draw(3, B, D)
    reference = Reference(output(draw(4, B, K), natural), output(draw(5, B, K), adversarial))
    values = InverseObjective(beta=beta, reduction=reduction)(output(logits, features), y, reference)
    for i in range(B):
        near = [abs(a - b) for a, b in zip(features[i].tolist(), natural[i].tolist(), strict=True)]
        far = [abs(a - b) for a, b in zip(features[i].tolist(), adversarial[i].tolist(), strict=True)]
        share = 1 / D if reduction == "mean" else 1.0
        cross_entropy = -math.log(probabilities(logits[i].tolist())[y[i]])
        assert float(values[i]) == pytest.approx(-(cross_entropy + beta * share * (sum(near) - sum(far))), rel=1e-12)


def test_inverse_without_features_is_negated_cross_entropy() -> None:
    objective, logits, y = InverseObjective(beta=0), draw(0, B, K), labels(B)
    assert not objective.needs_reference and InverseObjective().needs_reference
    torch.testing.assert_close(objective(output(logits), y, Reference()), -F.cross_entropy(logits, y, reduction="none"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_inverse_feature_gradient(reduction: str) -> None:
    """UIAT sheet 22: beta / D [sign(F - F_n) - sign(F - F_a)], and by finite differences."""
    beta, y = 1.3, labels(B)
    logits, features, natural, adversarial = draw(0, B, K), draw(1, B, D), draw(2, B, D), draw(3, B, D)
    reference = Reference(output(logits, natural), output(logits, adversarial))
    objective = InverseObjective(beta=beta, reduction=reduction)

    def descended(value: Tensor) -> Tensor:
        return -objective(output(logits, value), y, reference).sum()

    gradient = gradient_of(descended, features)
    share = beta / D if reduction == "mean" else beta
    torch.testing.assert_close(gradient, share * ((features - natural).sign() - (features - adversarial).sign()))
    torch.testing.assert_close(gradient, difference(descended, features), atol=1e-6, rtol=1e-5)
    between = (features - natural).sign() != (features - adversarial).sign()
    assert torch.equal(gradient != 0, between) and between.any() and not between.all()


def test_inverse_holds_its_references_constant() -> None:
    natural, adversarial = draw(2, B, D).requires_grad_(), draw(3, B, D).requires_grad_()
    features, logits = draw(1, B, D).requires_grad_(), draw(0, B, K)
    reference = Reference(output(logits, natural), output(logits, adversarial))
    InverseObjective()(output(logits, features), labels(B), reference).sum().backward()
    assert natural.grad is None and adversarial.grad is None and features.grad is not None


# Primitives (UIAT sheet 13 to 15): they serve objectives and losses alike.


def test_kl_gradient_closed_form() -> None:
    """d KL(p || softmax v) / dv = (softmax v - p) / B, for constant p (13)."""
    p, v = draw(0, B, K).softmax(dim=1), draw(1, B, K)
    gradient = gradient_of(lambda w: kl_from_probabilities(p, w).mean(), v)
    torch.testing.assert_close(gradient, (v.softmax(dim=1) - p) / B, atol=1e-7, rtol=1e-5)
    numeric = difference(lambda w: F.kl_div(w.log_softmax(1), p, reduction="batchmean"), v)
    torch.testing.assert_close(gradient, numeric, atol=1e-6, rtol=1e-4)


def test_kl_direction_by_numbers() -> None:
    """KL((0.9, 0.1) || (0.5, 0.5)) = 0.3681, the other way 0.5108 (15)."""
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    assert float(kl_from_probabilities(p, q.log())) == pytest.approx(0.3681, abs=5e-5)
    assert float(kl_from_probabilities(q, p.log())) == pytest.approx(0.5108, abs=5e-5)
    assert float(kl_from_logits(p.log(), q.log())) == pytest.approx(0.3681, abs=5e-5)
    assert float(kl_from_logits(q.log(), p.log())) == pytest.approx(0.5108, abs=5e-5)


def test_kl_limits() -> None:
    """KL(p || p) = 0 with zero gradient; against a one-hot p it is cross-entropy (15)."""
    v, y = draw(0, B, K), labels(B)
    p = v.softmax(dim=1)
    assert kl_from_probabilities(p, v).abs().max() < 1e-6
    assert gradient_of(lambda w: kl_from_probabilities(p, w).sum(), v).abs().max() < 1e-6
    hot = F.one_hot(y, K).double()
    torch.testing.assert_close(
        kl_from_probabilities(hot, v).double(), F.cross_entropy(v, y, reduction="none"), atol=1e-6, rtol=1e-5
    )
    assert torch.isfinite(gradient_of(lambda w: kl_from_probabilities(hot, w).sum(), v)).all()


def test_kl_from_logits_differentiates_both_sides() -> None:
    a, b = draw(0, B, K), draw(1, B, K)
    for at, function in ((a, lambda w: kl_from_logits(w, b).sum()), (b, lambda w: kl_from_logits(a, w).sum())):
        exact = {
            id(a): lambda w: (w.softmax(1) * (w.log_softmax(1) - b.log_softmax(1))).sum(),
            id(b): lambda w: (a.softmax(1) * (a.log_softmax(1) - w.log_softmax(1))).sum(),
        }[id(at)]
        gradient = gradient_of(function, at)
        assert gradient.abs().max() > 1e-2
        torch.testing.assert_close(gradient, difference(exact, at), atol=1e-5, rtol=1e-4)


def test_kl_survives_certainty() -> None:
    """Probabilities that underflow give neither NaN nor infinity, in value or in gradient, on either side."""
    sure, other = torch.tensor([[400.0, -400.0, 0.0]]), torch.tensor([[-300.0, 300.0, 0.0]])
    for function in (
        lambda a, b: kl_from_logits(a, b).sum(),
        lambda a, b: kl_from_probabilities(a.softmax(dim=1), b).sum(),
    ):
        a, b = sure.clone().requires_grad_(), other.clone().requires_grad_()
        value = function(a, b)
        value.backward()
        assert float(value.detach()) == pytest.approx(600)
        assert torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all()
