"""Heads: the affine one, and the Gaussian mixture (ECAS and LDAT sheet, 9.1 to 9.4, tests 22 to 25)."""

import math

import pytest
import torch
from tiny import WIDTH, at_epoch, images, labels, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit.heads import GaussianMixture, Linear

B, D, K = 12, 7, 5


def mixture(margin: float = 0.1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return GaussianMixture(margin=margin).build(D, K)


def features(seed: int = 1, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(B, D, generator=torch.Generator().manual_seed(seed))


def distances(f: Tensor, centres: Tensor) -> Tensor:
    """(B, K) squared distances in float64, from the definition."""
    return torch.stack([((row - centres.double()) ** 2).sum(dim=1) for row in f.double()])


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """The difference-of-logits ratio (Croce and Hein 2020)."""
    ordered = logits.sort(dim=1, descending=True).values
    true = logits.gather(1, y[:, None]).squeeze(1)
    other = torch.where(logits.argmax(dim=1) == y, ordered[:, 1], ordered[:, 0])
    return -(true - other) / (ordered[:, 0] - ordered[:, 2])


def test_linear_is_affine() -> None:
    torch.manual_seed(0)
    head = Linear().build(D, K)
    weight, bias = (dict(head.named_parameters())[f"linear.{name}"] for name in ("weight", "bias"))
    f, y = features(), labels(B, K)
    for given in (None, y):
        output = head(f, given)
        torch.testing.assert_close(output.logits, f @ weight.T + bias)
        assert torch.equal(output.margined, output.logits) and torch.equal(output.features, f)
        assert torch.equal(output.penalty, torch.zeros(B))
    assert Linear().penalty_weight(at_epoch(3, 10)) == 0 and Linear().parameter_options() == {}


def test_zero_bias_starts_at_zero_and_can_learn() -> None:
    assert Linear().build(D, K).linear.bias.abs().max() > 0
    bias = Linear(zero_bias=True).build(D, K).linear.bias
    assert torch.equal(bias, torch.zeros(K)) and bias.requires_grad


def test_mixture_logits_are_half_squared_distances() -> None:
    head, f = mixture(), features()
    output = head(f)
    torch.testing.assert_close(output.logits.double(), -distances(f, head.centres) / 2, atol=1e-4, rtol=1e-5)
    assert torch.equal(output.margined, output.logits)
    assert torch.equal(output.penalty, torch.zeros(B)) and torch.equal(output.features, f)


def test_mixture_without_margin_is_a_linear_layer() -> None:
    """22: weight mu, bias -|mu|^2 / 2; same argmax, cross-entropy and DLR."""
    head, f, y = mixture(), features(scale=3), labels(B, K)
    centres = head.centres.detach()
    plain = F.linear(f, centres, -centres.square().sum(dim=1) / 2)
    logits = head(f).logits
    torch.testing.assert_close(
        logits - logits.mean(dim=1, keepdim=True), plain - plain.mean(dim=1, keepdim=True), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(logits.argmax(dim=1), plain.argmax(dim=1))
    torch.testing.assert_close(F.cross_entropy(logits, y), F.cross_entropy(plain, y), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dlr(logits, y), dlr(plain, y), atol=1e-3, rtol=1e-3)


def test_margin_touches_the_true_logit_of_labelled_images_alone() -> None:
    """22, 23: zt_y = (1 + alpha) z_y; evaluation never sees it."""
    f, y = features(), labels(B, K)
    for margin in (0.0, 0.1, 2.5):
        head = mixture(margin)
        assert torch.equal(head(f).logits, mixture(0.0)(f).logits)
        output = head(f, y)
        assert torch.equal(output.logits, head(f).logits)
        for i in range(B):
            for k in range(K):
                share = 1 + margin * (k == int(y[i]))
                wanted = share * output.logits[i, k].item()
                assert output.margined[i, k].item() == pytest.approx(wanted, rel=1e-5)


def test_margin_gradient() -> None:
    """23: dL/df = sum_k (softmax(zt)_k - [k = y]) (1 + alpha [k = y]) (mu_k - f), L summed over images."""
    alpha, y = 0.3, labels(B, K)
    head, f = mixture(alpha), features().requires_grad_()
    F.cross_entropy(head(f, y).margined, y, reduction="sum").backward()
    centres = head.centres.detach().double()
    share = 1 + alpha * F.one_hot(y, K).double()
    probability = (-share * distances(f.detach(), centres) / 2).softmax(dim=1)
    for i in range(B):
        wanted = sum(
            (probability[i, k] - float(k == y[i])) * share[i, k] * (centres[k] - f.detach()[i].double())
            for k in range(K)
        )
        torch.testing.assert_close(f.grad[i].double(), wanted, atol=1e-4, rtol=1e-4)


def test_margin_makes_it_harder_except_at_the_centre() -> None:
    f, y = features(), labels(B, K)
    losses = [F.cross_entropy(mixture(alpha)(f, y).margined, y).item() for alpha in (0.0, 0.05, 0.1, 0.5)]
    assert losses == sorted(losses) and len(set(losses)) == 4
    head = mixture(5.0)
    output = head(head.centres.detach()[y], y)
    torch.testing.assert_close(output.margined, output.logits, atol=1e-4, rtol=0)


def test_likelihood() -> None:
    """24: no one half; zero at the centres only; gradient of mu_k is -(2 / N) sum over its images (f - mu_k)."""
    head, f, y = mixture(), features(), labels(B, K)
    output = head(f, y)
    wanted = [((f[i] - head.centres[y[i]]).double() ** 2).sum().item() for i in range(B)]
    assert output.penalty.tolist() == pytest.approx(wanted, rel=1e-4)
    output.penalty.mean().backward()
    for k in range(K):
        members = f[y == k].double()
        theirs = -2 / B * (members - head.centres[k].detach().double()).sum(dim=0)
        torch.testing.assert_close(head.centres.grad[k].double(), theirs, atol=1e-5, rtol=1e-4)
    at_centres = head(head.centres.detach()[y], y).penalty
    assert at_centres.abs().max() < 1e-4
    twice = head(torch.cat([f, f]), torch.cat([y, y])).penalty.mean()  # a mean: the batch's size does not matter
    assert twice.item() == pytest.approx(output.penalty.mean().item(), rel=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("weight", [0.05, 1.0])
def test_what_leads_away_from_one_point(margin: float, weight: float) -> None:
    """Where all features and centres are one: what correlates with the class by more than docs/methods/ldat.md says."""
    count, classes = 20_000, 10
    y = torch.arange(count) % classes
    corners = torch.eye(classes, dtype=torch.float64) - 1 / classes
    corners /= corners.norm(dim=1, keepdim=True)
    noise = torch.randn(count, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise /= noise.square().sum(dim=1).mean().sqrt()
    heavy = weight + margin * (1 - 1 / classes) / 2
    least = 2 * heavy / (1 + 2 * heavy)
    for correlation in (least - 0.02, least + 0.02):
        found = torch.cat([correlation * corners[y], (1 - correlation**2) ** 0.5 * noise], dim=1)
        head = GaussianMixture(margin=margin).build(50, classes)
        with torch.no_grad():
            head.centres.copy_(0.05 * F.pad(corners, (0, 40)))
            output = head((0.05 * found).float(), y)
        objective = F.cross_entropy(output.margined.double(), y) + weight * output.penalty.double().mean()
        assert (objective < math.log(classes)) == (correlation > least)


def test_likelihood_schedules() -> None:
    """25: "up" is t / T, "down" reversed, t counted from 1."""
    epochs = 8
    up = [GaussianMixture(likelihood=2.0).penalty_weight(at_epoch(t, epochs)) for t in range(epochs)]
    down = [
        GaussianMixture(likelihood=2.0, likelihood_schedule="down").penalty_weight(at_epoch(t, epochs))
        for t in range(epochs)
    ]
    assert up == pytest.approx([2 * t / 8 for t in range(1, 9)])
    assert down == pytest.approx(up[::-1])
    constant = GaussianMixture(likelihood=0.5, likelihood_schedule="constant")
    assert {constant.penalty_weight(at_epoch(t, epochs)) for t in range(epochs)} == {0.5}
    assert GaussianMixture(likelihood=0).penalty_weight(at_epoch(3, epochs)) == 0


def test_centres_start_small() -> None:
    """Xavier, not N(0, 1), which saturates the softmax at the start (sheet 9.2)."""
    torch.manual_seed(0)
    head = GaussianMixture().build(512, 10)
    limit = (6 / (512 + 10)) ** 0.5
    assert 0.99 * limit < head.centres.abs().max().item() <= limit
    assert head.centres.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)
    assert head.centres.square().sum(dim=1).mean().item() == pytest.approx(1.96, rel=0.1)


def test_centre_options() -> None:
    assert GaussianMixture().parameter_options() == {"lr_scale": 1.0}
    options = GaussianMixture(centre_lr_scale=2, centre_weight_decay=0).parameter_options()
    assert options == {"lr_scale": 2.0, "weight_decay": 0.0}


def test_distances_are_float32_under_autocast() -> None:
    """Three large terms cancel: bfloat16 would leave nothing of them."""
    head, f, y = mixture(), features(scale=30), labels(B, K)
    with torch.autocast("cpu", torch.bfloat16):
        output = head(f, y)
    wanted = head(f, y)
    assert output.logits.dtype == output.penalty.dtype == torch.float32
    assert torch.equal(output.logits, wanted.logits) and torch.equal(output.margined, wanted.margined)


def test_the_model_hands_labels_to_its_head() -> None:
    model = tiny_model(mixture=True).eval()
    x, y = images(6), labels(6)
    plain, labelled = model(x), model(x, y)
    assert torch.equal(plain.margined, plain.logits) and torch.equal(plain.logits, labelled.logits)
    assert not torch.equal(labelled.margined, labelled.logits)
    assert plain.features.shape == (6, WIDTH)
