"""Targets: natural, inverse, universal, momentum, one-off (UIAT sheet, sections 6 to 8; tests 2 to 7, 16 to 20)."""

from typing import Any

import attrs
import pytest
import torch
from test_graphs import Recorder
from tiny import (
    CLASSES,
    SHAPE,
    Plain,
    assert_same,
    at_epoch,
    images,
    labels,
    scene,
    snapshot,
    tiny_model,
    tracked,
    world,
)
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit.core.batch import Batch, Budget, Output, Progress, start_epoch
from robustkit.core.errors import RecipeError
from robustkit.core.recipe import refuse_late_start
from robustkit.core.strategy import Record, build
from robustkit.engine import Predictor
from robustkit.engine.graphs import Graphs
from robustkit.objectives import InverseObjective
from robustkit.targets import Inverse, Momentum, Natural, OneOff, Universal
from robustkit.threats import L2, Linf

B = 6
BUDGET = Budget(torch.full((B,), 8 / 255))


def adversarial() -> Tensor:
    return (images(B) + 8 / 255 * (2 * images(B, 50) - 1)).clamp(0, 1)


def forward(given: Any, target: Any, found: Tensor) -> Output:
    with torch.no_grad(), given.predict.using(target.mode) as predict:
        return predict(found)


def record(given: Any, target: Tensor | None) -> Record:
    return Record(given.batch, given.progress, BUDGET, given.batch.x, {}, target, {})


def step(target: Any, given: Any, x_adv: Tensor | None = None) -> Tensor:
    """One training step's worth of a target: prepare, forward, read, remember."""
    found = target.prepare(given, BUDGET, adversarial() if x_adv is None else x_adv)
    rows = target(None if found is None else forward(given, target, found), given.batch, given.progress)
    target.observe(record(given, rows))
    return rows


def rows_are_probabilities(rows: Tensor) -> None:
    assert rows.shape == (B, CLASSES) and rows.dtype == torch.float32
    assert rows.sum(dim=1).tolist() == pytest.approx([1.0] * B, abs=1e-5)
    assert rows.min() >= 0 and rows.max() <= 1


class Script(nn.Module):
    """An inner target that says what it was told to, and writes down how it was asked."""

    mode = "eval"

    def __init__(self, rows: dict[int, Tensor]) -> None:
        super().__init__()
        self.rows, self.advanced, self.observed = rows, [], []

    def prepare(self, given: Any, budget: Budget, x_adv: Tensor, *, advance: bool = True) -> Tensor:
        self.advanced.append(advance)
        return given.batch.x

    def __call__(self, output: Output | None, batch: Batch, progress: Progress) -> Tensor:
        return self.rows[progress.epoch][batch.index]

    def observe(self, record: Record) -> None:
        self.observed.append(record.progress.epoch)


def scripted(epochs: int, count: int = 32) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {e: torch.randn(count, CLASSES, generator=generator).mul(2).softmax(dim=1) for e in range(epochs)}


ALL = [
    Natural(),
    Inverse(steps=2),
    Inverse(steps=2, objective=InverseObjective(beta=0)),
    Universal(),
    Universal(objective=InverseObjective(beta=0)),
    Momentum(),
    Momentum(inner=Natural(), start=0.0),
    Momentum(inner=Inverse(steps=1)),
    OneOff(),
    OneOff(inner=Natural()),
    OneOff(freeze="perturbation"),
]


@pytest.mark.parametrize("spec", ALL, ids=str)
@pytest.mark.parametrize("epoch", [0, 6, 7, 8, 9])
def test_a_target_is_rows_of_probabilities_and_leaves_no_trace(spec: Any, epoch: int) -> None:
    """UIAT 27, 29, 30: in `prepare` nothing of the model changes; the rows carry no gradient."""
    model = tiny_model()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    target = build(spec, world())
    given = scene(model, step=4 * epoch)
    before = snapshot(model)
    found = target.prepare(given, BUDGET, adversarial())
    assert_same(before, snapshot(model))
    if found is not None:
        assert found.shape == given.batch.x.shape and not found.requires_grad
        assert found.min() >= 0 and found.max() <= 1
        radius = 4 / 255 + 1e-6
        assert (found - given.batch.x).abs().max() <= radius
    rows = target(None if found is None else forward(given, target, found), given.batch, given.progress)
    rows_are_probabilities(rows)
    assert not rows.requires_grad
    assert all(not tensor.requires_grad for tensor in getattr(target, "buffers", list)())


@pytest.mark.parametrize(
    "spec", [Inverse(), Inverse(objective=InverseObjective(beta=0)), Universal(), Momentum(), OneOff()], ids=str
)
def test_an_exception_leaves_the_model_as_it_was(spec: Any) -> None:
    model = tiny_model()
    target = build(spec, world())
    given = scene(model, step=4 * 7)  # one-off's epoch T'
    before = snapshot(model)

    class Broken(Plain):
        def __call__(self, given: Tensor) -> Output:
            raise FloatingPointError("in the middle")

    with pytest.raises(FloatingPointError):
        target.prepare(attrs.evolve(given, predict=Broken(model)), BUDGET, adversarial())
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("mode", ["train", "train-frozen", "eval"])
@pytest.mark.parametrize("make", [Natural, Inverse, Universal])
def test_a_targets_mode_is_that_of_its_reading_pass(make: Any, mode: Any) -> None:
    spec = make(mode=mode)
    target = build(spec, world())
    assert spec.mode == target.mode == mode
    assert Momentum(inner=spec).mode == OneOff(inner=spec).mode == mode
    model = tiny_model()
    given, seen = scene(model), tracked(model)
    step(target, given)
    assert tracked(model) == seen + (mode == "train")


def test_natural_is_the_prediction_on_the_image() -> None:
    model = tiny_model()
    given = scene(model)
    assert Natural().prepare(given, BUDGET, adversarial()) is given.batch.x
    rows = step(Natural(mode="eval"), given)
    torch.testing.assert_close(rows, model.eval()(given.batch.x).logits.softmax(dim=1).detach())


# Inverse


def inverse_by_hand(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    beta: float,
    start: Tensor,
    steps: int,
    step_size: float,
    radius: float,
) -> Tensor:
    """IAT's algorithm, image by image: descent of CE + beta (L1 to natural - L1 to adversarial features)."""
    model = model.eval()
    found = []
    for i in range(len(x)):
        with torch.no_grad():
            natural, attacked = model(x[i : i + 1]).features, model(x_adv[i : i + 1]).features
        current = start[i : i + 1].clone()
        for _ in range(steps):
            current = current.detach().requires_grad_()
            output = model(current)
            loss = F.cross_entropy(output.logits, y[i : i + 1])
            loss = loss + beta * (F.l1_loss(output.features, natural) - F.l1_loss(output.features, attacked))
            (gradient,) = torch.autograd.grad(loss, current)
            moved = current.detach() - step_size * gradient.sign()
            moved = torch.min(torch.max(moved, x[i : i + 1] - radius), x[i : i + 1] + radius)
            current = moved.clamp(0, 1)
        found.append(current.detach())
    return torch.cat(found)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_inverse_by_the_algorithm(beta: float) -> None:
    model = tiny_model().double()
    given = scene(model)
    given = attrs.evolve(given, predict=Plain(model), batch=given.batch._replace(x=given.batch.x.double()))
    x, y, x_adv = given.batch.x, given.batch.y, adversarial().double()
    target = Inverse(steps=5, objective=InverseObjective(beta=beta), noise=0.01)
    ours = target.prepare(given, BUDGET, x_adv)
    start = x + 0.01 * given.generator("inverse").normal(x)
    theirs = inverse_by_hand(model, x, x_adv, y, beta, start, 5, 2 / 255, 4 / 255)
    torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=0)  # radii are float32
    easier, plain = (F.cross_entropy(model(v).logits, y, reduction="none") for v in (ours, x))
    assert (easier < plain).all() or beta > 0


@pytest.mark.parametrize("threat", [Linf(), L2()], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_inverse_stays_close(threat: Any, steps: int) -> None:
    given = scene(tiny_model(), threat=threat)
    found = Inverse(steps=steps, noise=0.5, radius=0.02).prepare(given, BUDGET, adversarial())
    assert (threat.size(found - given.batch.x) <= 0.02 + 1e-6).all()
    assert found.min() >= 0 and found.max() <= 1


def test_inverse_draws_fresh_noise_each_step() -> None:
    model = tiny_model()
    target = Inverse(steps=0)
    found = [target.prepare(scene(model, step=s), BUDGET, adversarial()) for s in (0, 1, 1)]
    assert not torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    assert float((found[0] - images(B)).std()) == pytest.approx(0.001, rel=0.2)


def test_without_radius_inverse_and_universal_are_natural() -> None:
    """UIAT 2: eps' = 0 makes UIAT and IAT one-off's first phase."""
    model = tiny_model()
    for spec in (Inverse(radius=0.0), Inverse(steps=0, noise=0.0), Universal(radius=0.0)):
        target = build(spec, world())
        for position in range(3):
            given = scene(model, step=position)
            torch.testing.assert_close(target.prepare(given, BUDGET, adversarial()), given.batch.x, atol=0, rtol=0)
        if isinstance(spec, Universal):
            assert torch.equal(target.z, torch.zeros_like(target.z))


# Universal


def universal(**settings: Any) -> Any:
    return build(Universal(**settings), world())


def test_universal_starts_small_and_by_seed() -> None:
    z = universal().z
    assert z.shape == (CLASSES, *SHAPE) and z.dtype == torch.float32
    assert float(z.std()) == pytest.approx(0.001, rel=0.1) and abs(float(z.mean())) < 3e-4
    assert torch.equal(z, universal().z)
    assert not torch.equal(z, build(Universal(), world(seed=1)).z)
    assert list(dict(universal().named_buffers())) == ["z"] and not list(universal().parameters())


def z_gradient(model: nn.Module, z: Tensor, given: Batch, x_adv: Tensor, beta: float, mean: bool = False) -> Tensor:
    """The gradient of the inverse loss with respect to z, class by class and image by image."""
    model = model.eval()
    gradient = torch.zeros_like(z)
    for k in range(len(z)):
        members = [i for i in range(len(given.y)) if int(given.y[i]) == k]
        for i in members:
            one = z[k].detach().clone().requires_grad_()
            output = model((given.x[i] + one).clamp(0, 1)[None])
            with torch.no_grad():
                natural, attacked = model(given.x[i][None]).features, model(x_adv[i][None]).features
            loss = F.cross_entropy(output.logits, given.y[i][None])
            loss = loss + beta * (F.l1_loss(output.features, natural) - F.l1_loss(output.features, attacked))
            gradient[k] += torch.autograd.grad(loss, one)[0] / (len(members) if mean else 1)
    return gradient


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("step_size", [None, 0.001])
def test_universal_step_by_the_per_class_loop(beta: float, step_size: float | None) -> None:
    """UIAT 16, 18: the gather's gradient is the loop over classes; sum or mean over a class gives the same step."""
    torch.manual_seed(3)
    model = tiny_model().double()
    y = torch.tensor([0, 0, 0, 2, 2, 1])  # class 3 is absent
    given = scene(model, Batch(images(B).double(), y, torch.arange(B)))
    given = attrs.evolve(given, predict=Plain(model))
    target = build(Universal(step_size=step_size, objective=InverseObjective(beta=beta)), world()).double()
    z, x_adv = target.z.clone(), adversarial().double()
    found = target.prepare(given, BUDGET, x_adv)
    for mean in (False, True):
        gradient = z_gradient(model, z, given.batch, x_adv, beta, mean)
        wanted = (z - (step_size or 4 / 255) * gradient.sign()).clamp(-4 / 255, 4 / 255)
        present = torch.tensor([0, 1, 2])
        torch.testing.assert_close(target.z[present], wanted[present], atol=1e-12, rtol=0)
    assert torch.equal(target.z[3], z[3])  # bit for bit, even where z was beyond the radius
    torch.testing.assert_close(found, (given.batch.x + target.z[y]).clamp(0, 1), atol=0, rtol=0)  # of the moved z


def test_absent_classes_stay_bit_for_bit() -> None:
    model = tiny_model()
    target = universal()
    before = target.z.clone()
    given = scene(model, Batch(images(B), torch.full((B,), 2), torch.arange(B)))
    target.prepare(given, BUDGET, adversarial())
    for k in range(CLASSES):
        assert torch.equal(target.z[k], before[k]) == (k != 2)
    assert torch.isfinite(target.z).all()


def test_universal_histogram() -> None:
    """UIAT 17: one update leaves |z| >= eps' - |z0|, later ones the three values -eps', 0 and eps'."""
    model, radius = tiny_model(), 4 / 255
    target = universal()
    start = target.z.clone()
    given = scene(model, Batch(images(B), labels(B), torch.arange(B)))
    gradient = z_gradient(model, start.clone(), given.batch, adversarial(), 1.0)
    model.train()
    target.prepare(given, BUDGET, adversarial())
    moved = gradient != 0
    assert moved.any()
    assert (target.z.abs() >= radius - start.abs() - 1e-7)[moved].all()
    assert target.z.abs().max() <= radius
    clipped = target.z.abs() == target.z.abs().max()
    for position in range(1, 6):
        target.prepare(
            scene(model, Batch(images(B, position), labels(B), torch.arange(B)), step=position), BUDGET, adversarial()
        )
        assert target.z.abs().max() <= radius
        levels = (target.z[clipped] / radius).abs()
        assert ((levels - 1).abs().min(levels) < 1e-5).all()


def test_universal_without_features_ignores_the_attack() -> None:
    """UIAT 6: at beta = 0 the step does not look at x_adv, and F(x), F(x_adv) are not worked out."""
    model = tiny_model()
    z = {}
    for seed in (1, 2):
        for beta in (0.0, 1.0):
            target = universal(objective=InverseObjective(beta=beta))
            given, calls = scene(model), []
            handle = model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            target.prepare(given, BUDGET, images(B, seed))
            handle.remove()
            z[seed, beta] = target.z.clone()
            assert len(calls) == (3 if beta else 1)
    assert torch.equal(z[1, 0.0], z[2, 0.0]) and not torch.equal(z[1, 1.0], z[2, 1.0])


def test_universal_of_lone_classes_is_one_step_of_inverse() -> None:
    """UIAT 7: one image per class, z anew each step: IAT with n = 1 and alpha' = 4/255, the noise apart."""
    model = tiny_model().double()
    y = torch.tensor([2, 0, 3, 1])
    given = scene(model, Batch(images(4).double(), y, torch.arange(4)))
    given = attrs.evolve(given, predict=Plain(model))
    x_adv = adversarial()[:4].double()
    budget = Budget(torch.full((4,), 8 / 255))
    target = build(Universal(noise=0.0), world()).double()
    ours = target.prepare(given, budget, x_adv)
    theirs = Inverse(steps=1, step_size=4 / 255, noise=0.0).prepare(given, budget, x_adv)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_universal_recorded_is_the_same(beta: float) -> None:
    """With the images, perturbations and weights of the moment."""
    model, recorder = tiny_model(), Recorder()
    plain, recorded = (build(Universal(objective=InverseObjective(beta=beta)), world()) for _ in range(2))
    recording = Predictor(model, torch.device("cpu"), graphs=Graphs(recorder))
    for number in range(5):
        given = scene(model, Batch(images(B, number), torch.randperm(B) % CLASSES, torch.arange(B)))
        wanted = plain.prepare(given, BUDGET, adversarial())
        found = recorded.prepare(attrs.evolve(given, predict=recording), BUDGET, adversarial())
        assert torch.equal(found, wanted) and torch.equal(recorded.z, plain.z)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert (recorder.recorded, recorder.replayed) == (1, 1 + 3)


def test_universal_is_not_advanced_where_told_not_to() -> None:
    model = tiny_model()
    target = universal()
    before = target.z.clone()
    found = target.prepare(scene(model), BUDGET, adversarial(), advance=False)
    assert torch.equal(target.z, before)
    torch.testing.assert_close(found, (images(B) + before[labels(B)]).clamp(0, 1), atol=0, rtol=0)


# Momentum


def test_start_epoch() -> None:
    """Epochs are counted from 1; a fraction means the sheet's T = 75, T' = 80 of 100, 23 and 24 of 30."""
    assert [start_epoch(0.75, n) for n in (100, 400, 30, 110)] == [75, 300, 23, 83]
    assert [start_epoch(0.8, n) for n in (100, 400, 30)] == [80, 320, 24]
    assert start_epoch(350, 400) == 350 and start_epoch(1, 50) == 50
    for epochs in range(1, 60):
        for start in (0.0, 0.01, 0.3, 0.75, 0.8, 1.0):
            assert 1 <= start_epoch(start, epochs) <= epochs  # every run has such an epoch


@pytest.mark.parametrize("gamma", [0.9, 0.5])
def test_momentum_closed_form(gamma: float) -> None:
    """UIAT 19: p = gamma^(k+1) f_(T-1) + (1 - gamma) sum_j gamma^(k-j) f_(T+j), rows on the simplex."""
    epochs, start = 12, 5  # T = 5: index 4
    rows = scripted(epochs)
    target = build(Momentum(gamma=gamma, start=start), world())
    target.inner = Script(rows)
    given = scene(tiny_model())
    for epoch in range(epochs):
        now = attrs.evolve(given, progress=at_epoch(epoch, epochs))
        found = step(target, now)
        rows_are_probabilities(found)
        k = epoch + 1 - start
        if k < 0:
            wanted = rows[epoch][:B]
        else:
            wanted = gamma ** (k + 1) * rows[start - 2][:B] + (1 - gamma) * sum(
                gamma ** (k - j) * rows[start - 1 + j][:B] for j in range(k + 1)
            )
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
        if epoch + 1 >= start - 1:
            torch.testing.assert_close(target.memory.values[:B], found)
    assert target.inner.observed == list(range(epochs))


def test_momentum_writes_from_the_epoch_before_its_start() -> None:
    target = build(Momentum(start=5), world())
    target.inner = Script(scripted(12))
    for epoch in range(6):
        assert int(target.memory.visited.sum()) == (B if epoch > 3 else 0)
        step(target, attrs.evolve(scene(tiny_model()), progress=at_epoch(epoch, 12)))


def test_momentum_limits() -> None:
    """UIAT 3, 4: gamma = 0 is off; gamma = 1 freezes what was stored in epoch T - 1, as one-off does."""
    epochs, rows = 9, scripted(9)
    off, frozen = build(Momentum(gamma=0, start=4), world()), build(Momentum(gamma=1, start=4), world())
    once = build(OneOff(start=3), world())
    for target in (off, frozen, once):
        target.inner = Script(rows)
    once_from_3 = []
    for epoch in range(epochs):
        now = attrs.evolve(scene(tiny_model()), progress=at_epoch(epoch, epochs))
        torch.testing.assert_close(step(off, now), rows[epoch][:B])
        kept = step(frozen, now)
        torch.testing.assert_close(kept, rows[min(epoch, 2)][:B])
        if epoch >= 2:
            # All training images must have been seen for one-off to need no forward: here it may fall back.
            once_from_3.append(step(once, now))
            torch.testing.assert_close(once_from_3[-1], kept)


def test_memory_follows_the_image_not_its_place() -> None:
    """UIAT 20: two images swapped between epochs keep their own histories; a new one keeps its own q."""
    epochs, rows = 3, scripted(3)
    target = build(Momentum(gamma=0.9, start=2), world())
    target.inner = Script(rows)
    orders = [torch.tensor([4, 9, 2, 7, 0, 30]), torch.tensor([9, 4, 30, 11, 0, 2])]
    for epoch, index in enumerate(orders):
        given = scene(tiny_model(), Batch(images(B), labels(B), index))
        found = step(target, attrs.evolve(given, progress=at_epoch(epoch, epochs)))
    for place, i in enumerate(orders[1].tolist()):
        wanted = rows[1][i] if i == 11 else 0.9 * rows[0][i] + 0.1 * rows[1][i]
        torch.testing.assert_close(found[place], wanted)


# One-off


def phases(spec: OneOff, epochs: int = 5, samples: int = B) -> tuple[Any, list[Tensor], list[int]]:
    """Rows and numbers of forwards of each epoch, on data whose images are all in the batch."""
    model = tiny_model().eval()
    target = build(spec, attrs.evolve(world(samples), training=samples))
    found, forwards = [], []
    for epoch in range(epochs):
        given = scene(model, step=epoch, epochs=epochs, steps_per_epoch=1, where=target_world(samples))
        calls: list[int] = []
        handle = model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append(step(target, given))
        handle.remove()
        forwards.append(len(calls))
    return target, found, forwards


def target_world(samples: int) -> Any:
    return attrs.evolve(world(samples), training=samples)


def test_one_off_phases() -> None:
    """f(x) before T', the inner target in T', the row kept after it without another forward (UIAT sheet 8)."""
    spec = OneOff(inner=Universal(mode="eval"), start=3)
    target, found, forwards = phases(spec)
    assert forwards == [1, 1, 4, 0, 0]
    assert forwards == [spec.passes(at_epoch(epoch, 5)).forward for epoch in range(5)]
    natural = tiny_model().eval()(images(B)).logits.softmax(dim=1).detach()
    for epoch in (0, 1):
        torch.testing.assert_close(found[epoch], natural)
    assert not torch.allclose(found[2], natural, atol=1e-4)
    assert torch.equal(found[3], found[2]) and torch.equal(found[4], found[2])
    reference = build(Universal(mode="eval"), world(B))
    given = scene(tiny_model(), step=2, epochs=5, steps_per_epoch=1)
    torch.testing.assert_close(found[2], step(reference, given))
    assert torch.equal(target.inner.z, reference.z)  # one step of z, in T' alone


def test_one_off_may_freeze_the_perturbation() -> None:
    spec = OneOff(inner=Universal(mode="eval"), start=3, freeze="perturbation")
    _, found, forwards = phases(spec)
    assert forwards == [1, 1, 4, 1, 1]
    assert forwards == [spec.passes(at_epoch(epoch, 5)).forward for epoch in range(5)]
    assert torch.equal(found[2], found[4])  # the model did not change here, and z must not


def test_one_off_beyond_the_end_touches_nothing() -> None:
    """UIAT 5, first half."""
    target = build(OneOff(inner=Universal(mode="eval"), start=50), world(B))
    before = target.inner.z.clone()
    for epoch in range(5):
        step(target, scene(tiny_model(), step=epoch, epochs=5, steps_per_epoch=1))
    assert torch.equal(target.inner.z, before)
    assert not target.memory.visited.any() and not target.memory.values.any()


@pytest.mark.parametrize("start", [0.0, 0.05, 0.2])
def test_one_off_from_the_first_epoch_never_reads_natural_targets(start: float) -> None:
    """UIAT 5, second half: T' = 1, however it is spelt."""
    spec = OneOff(inner=Universal(mode="eval"), start=start)
    _, found, forwards = phases(spec)
    assert forwards == [4, 0, 0, 0, 0]
    assert forwards == [spec.passes(at_epoch(epoch, 5)).forward for epoch in range(5)]
    natural = tiny_model().eval()(images(B)).logits.softmax(dim=1).detach()
    for rows in found:
        assert not torch.allclose(rows, natural, atol=1e-4)


def test_one_off_falls_back_for_images_it_has_not_seen() -> None:
    """They get the frozen perturbation's prediction; the others their own row."""
    model = tiny_model().eval()
    target = build(OneOff(inner=Universal(mode="eval"), start=1.0), world())
    kept = step(target, attrs.evolve(scene(model), progress=at_epoch(1, 2)))
    z = target.inner.z.clone()
    index = torch.tensor([0, 20, 2, 21, 4, 22])
    later = attrs.evolve(scene(model, Batch(images(B, 7), labels(B), index)), progress=at_epoch(2, 2))
    found = step(target, later)
    assert torch.equal(target.inner.z, z)
    fresh = model((images(B, 7) + z[labels(B)]).clamp(0, 1)).logits.softmax(dim=1).detach()
    for place in range(B):
        torch.testing.assert_close(found[place], fresh[place] if place % 2 else kept[place])
    assert int(target.memory.visited.sum()) == B  # what it fell back on is not remembered


def test_a_start_beyond_the_end_is_refused() -> None:
    class Ten:
        epochs = 10

    for start in (0.0, 0.5, 1, 10):
        refuse_late_start(start, Ten, "target.start")
    with pytest.raises(RecipeError, match=r"target\.start"):
        refuse_late_start(11, Ten, "target.start")
    for spec in (Momentum(start=11), OneOff(start=11)):
        with pytest.raises(RecipeError, match="fraction"):
            spec.check(Ten)


@pytest.mark.parametrize("spec", [Momentum(), OneOff(), Momentum(inner=OneOff(start=0.5))], ids=str)
def test_state_is_saved_and_restored(spec: Any) -> None:
    model = tiny_model()
    target, other = build(spec, world()), build(spec, world(seed=8))
    for epoch in range(10):
        step(target, scene(model, step=4 * epoch))
    other.load_state_dict(target.state_dict())
    for name, tensor in target.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    given = scene(model, step=4 * 9 + 1)
    model.eval()
    first = target.prepare(given, BUDGET, adversarial())
    second = other.prepare(given, BUDGET, adversarial())
    assert first is second is None or torch.equal(first, second)
