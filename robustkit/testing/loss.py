"""What an outer loss must do."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.batch import Batch, Budget, Prepared
from robustkit.core.strategy import OuterLoss, build
from robustkit.engine import count_passes
from robustkit.testing.common import CHARGE, DRAW, cut_rows, mode_of, name_of, same, same_state, state_of
from robustkit.testing.spec import check_spec
from robustkit.testing.stage import Stage, elsewhere, forwarded, left_as_found
from robustkit.testing.tiny import BATCH, CLASSES, tiny_recipe


class _Views(dict[str, Any]):
    """Outputs or extras by name; asking for what was not prepared is a fault of the loss."""

    def __missing__(self, key: str) -> Any:
        raise AssertionError(f"the loss asks for '{key}', but prepared only {', '.join(map(repr, self)) or 'nothing'}")


def check_loss(loss: OuterLoss) -> None:
    """Named terms, each a mean over the batch with a gradient, from the views that `prepare` names."""
    check_spec(loss)
    who, stage = name_of(loss), Stage.set()
    runtime = build(loss.rehearsed(tiny_recipe()) if hasattr(loss, "rehearsed") else loss, stage.world)
    batch, progress = stage.batch(), stage.progress()
    x_adv, budget = stage.adversarial(batch), Budget(stage.epsilon(batch), weight=torch.ones(BATCH))
    stage.model.train()
    again: Prepared | None = None
    if not isinstance(runtime, nn.Module):
        weights = deepcopy(stage.model.state_dict())
        with elsewhere():
            again = runtime.prepare(stage.scene(), budget, x_adv.clone())
        stage.model.load_state_dict(weights)
    with count_passes(stage.model) as count:
        with left_as_found(stage.model, f"{who}.prepare", statistics=mode_of(loss) != "train"):
            scene = stage.scene()
            arguments = [scene.batch.x.clone(), x_adv.clone()]
            prepared: Prepared = runtime.prepare(scene, budget, x_adv)
        for was, tensor in zip(arguments, (scene.batch.x, x_adv), strict=True):
            assert torch.equal(was, tensor), f"{who}.prepare changes its images; work on a copy"
        if again is not None:
            for first, second in ((prepared.views, again.views), (prepared.extras, again.extras)):
                assert same_state(first, second), f"{who}.prepare gives something else when asked again; {DRAW}"
        assert prepared.views, f"{who}.prepare names no images to forward"
        for name, images in prepared.views.items():
            assert images.shape == batch.x.shape, f"{who}: view '{name}' has shape {tuple(images.shape)}"
            assert bool(images.isfinite().all()), f"{who}: view '{name}' is not finite"
        unknown = set(prepared.shares) - set(prepared.views)
        assert not unknown, f"{who}: shares of views that are not prepared: {', '.join(sorted(unknown))}"
        if prepared.shares:
            total = sum(prepared.shares.values())
            assert set(prepared.shares) == set(prepared.views), f"{who}: give every view a share, or none"
            assert math.isclose(total, 1, abs_tol=1e-6), f"{who}: shares of the head's penalty sum to {total:g}"
        outputs = _Views(forwarded(stage.model, prepared, batch.y))
        extras = _Views(prepared.extras)
        state = state_of(runtime)
        targets: list[Tensor | None] = [None]
        if loss.needs_target:
            soft = torch.rand(BATCH, CLASSES, generator=torch.Generator().manual_seed(5)).softmax(dim=1)
            targets = [F.one_hot(batch.y, CLASSES).float(), soft]
        for target in targets:
            terms: dict[str, Tensor] = runtime(outputs, target, batch, extras, progress)
            assert terms, f"{who} gives no terms"
            for name, term in terms.items():
                assert isinstance(term, Tensor) and term.ndim == 0, (
                    f"{who}: the term '{name}' must be a scalar tensor; give the mean over the batch"
                )
                assert bool(term.isfinite()), f"{who}: the term '{name}' is {term.item()}"
            with elsewhere():
                twice = runtime(outputs, target, batch, extras, progress)
            assert all(same(term, twice[name]) for name, term in terms.items()), (
                f"{who}: two calls give two values; it is called twice in a step that perturbs weights"
            )
        assert same_state(state, state_of(runtime)), f"{who}: calling it changes its state; do that in observe"
        weight = stage.model.backbone.layers[0].weight  # type: ignore[union-attr, index]
        objective = torch.stack(list(terms.values())).sum()
        assert objective.requires_grad, f"{who}: no term has a gradient; do not detach the outputs"
        (gradient,) = torch.autograd.grad(objective, weight)
        assert bool(gradient.isfinite().all()) and bool((gradient != 0).any()), f"{who}: no gradient for the weights"
    declared, counted = loss.passes(progress), count.per_batch(BATCH)
    if hasattr(loss, "preparation"):
        declared += loss.preparation(progress)
    if isinstance(runtime, nn.Module) and list(runtime.parameters()):  # a companion's passes cannot be seen here
        assert declared.units >= counted.units, f"{who} declares {declared}, but makes {counted}; {CHARGE}"
    else:
        assert declared == counted, f"{who} declares {declared}, but makes {counted}; {CHARGE}"
    if not isinstance(runtime, nn.Module):
        whole = {name: term.item() for name, term in terms.items()}
        sums = dict.fromkeys(whole, 0.0)
        for rows in (slice(0, 4), slice(4, BATCH)):
            part = Batch(*(value[rows] for value in batch))
            cut = _Views({name: cut_rows(output, rows) for name, output in outputs.items()})
            held = _Views({name: v[rows] if len(v) == BATCH else v for name, v in extras.items()})
            pieces = runtime(cut, None if target is None else target[rows], part, held, progress)
            for name, term in pieces.items():
                sums[name] += term.item() * len(part.y) / BATCH
        for name, value in whole.items():
            assert math.isclose(value, sums[name], rel_tol=1e-4, abs_tol=1e-6), (
                f"{who}: the term '{name}' is no mean over the batch: {value:g} at once, {sums[name]:g} in two pieces; "
                "reduce by the mean over all images of the call"
            )
