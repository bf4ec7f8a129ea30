"""Recorded attacks: what is replayed is what would have been computed. The recorder here re-runs, as a GPU would."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustkit import Validation
from robustkit.attacks import PGD
from robustkit.core.batch import Budget
from robustkit.core.loop import finish_epoch, train_step
from robustkit.core.model import Model, RobustModel
from robustkit.core.rng import whole
from robustkit.engine import Predictor
from robustkit.engine.folding import fold
from robustkit.engine.graphs import RECORDINGS, Graphs, graphs_for
from robustkit.heads import Linear
from robustkit.losses import Align
from robustkit.objectives import KL
from robustkit.opening import load_parts, make_world
from robustkit.targets import Universal
from robustkit.testing import tiny_recipe
from robustkit.threats import Linf

CPU = torch.device("cpu")


class Recorder:
    """Stands for a GPU: a replay re-runs the function on the memory that it was recorded on."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        result = function().clone()

        def replay() -> None:
            self.replayed += 1
            result.copy_(function())

        return replay, result


@pytest.fixture
def model() -> RobustModel:
    return Model(backbone="convnet_small").build(Linear(), 4, (3, 8, 8), 0).eval()


def test_replays_with_new_inputs() -> None:
    record = Recorder()
    graphs = Graphs(record)
    for number in range(5):
        x, y = torch.full((3,), float(number)), (torch.ones(3), None)
        assert graphs("sum", lambda x, pair: x + pair[0], (x, y)).tolist() == [number + 1] * 3
    assert (record.recorded, record.replayed) == (1, 1 + 3)  # once to compare, then the third call and later


def test_other_shapes_and_keys_are_other_recordings() -> None:
    record = Recorder()
    graphs = Graphs(record)
    for _ in range(3):
        for key, factor in (("one", 1.0), ("two", 2.0)):
            for size in (2, 3):
                assert graphs(key, lambda x, f=factor: f * x, (torch.ones(size),)).tolist() == [factor] * size
    assert record.recorded == 4 == RECORDINGS
    for _ in range(3):
        assert graphs("three", lambda x: 3 * x, (torch.ones(2),)).tolist() == [3, 3]
    assert record.recorded == RECORDINGS  # no more memory than for so many


def test_results_outlive_the_next_replay() -> None:
    graphs = Graphs(Recorder())
    results = [graphs("same", lambda x: 2 * x, (torch.tensor([float(number)]),)) for number in range(6)]
    assert [int(result) for result in results] == [0, 2, 4, 6, 8, 10]


def test_what_cannot_be_recorded_runs_plainly() -> None:
    def refuse(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = Graphs(refuse)
    for number in range(4):
        assert graphs("key", lambda x: x + 1, (torch.tensor([number]),)).item() == number + 1
    assert "capturing" in graphs.trouble


def test_what_differs_from_run_to_run_is_not_replayed() -> None:
    record = Recorder()
    graphs = Graphs(record)
    for _ in range(5):
        graphs("noise", lambda x: x + torch.rand(3), (torch.zeros(3),))
    assert record.recorded == 1 and record.replayed == 1 and "not the same" in graphs.trouble


@pytest.mark.parametrize("attack", [PGD(steps=3), PGD(steps=2, objective=KL(), start="gaussian")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attacks_replay_with_the_weights_of_the_moment(model: RobustModel, attack: PGD, precision: str) -> None:
    threat = Linf(epsilon=0.1)
    folding = fold(model.backbone, torch.rand(2, 3, 8, 8))
    record = Recorder()
    plain = Predictor(model, CPU, precision, folding)
    quick = Predictor(model, CPU, precision, folding, Graphs(record))
    for number in range(5):
        x, y = torch.rand(6, 3, 8, 8), torch.randint(4, (6,))
        budget = Budget(torch.full((6,), 0.02 * (number + 1)))
        found, expected = (attack(p, x, y, budget, threat, whole(x, number)) for p in (quick, plain))
        assert torch.equal(found, expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    assert record.recorded == 1 and record.replayed == 4


def test_training_mode_is_never_recorded(model: RobustModel) -> None:
    record = Recorder()
    predict = Predictor(model, CPU, graphs=Graphs(record))
    attack = PGD(steps=1, mode="train")
    for _ in range(4):
        x = torch.rand(6, 3, 8, 8)
        attack(
            predict, x, torch.zeros(6, dtype=torch.int64), Budget(torch.full((6,), 0.1)), Linf(epsilon=0.1), whole(x, 0)
        )
    assert not record.recorded


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_convolutions_of_attacks_on_a_gpu_are_deterministic(model: RobustModel, device: str) -> None:
    """Else no recording would equal the plain attack. Training passes choose for themselves."""
    predict = Predictor(model, torch.device(device))
    for mode in ("train", "eval"):
        with pytest.raises(KeyError), predict.using(mode):  # type: ignore[arg-type]
            assert torch.backends.cudnn.deterministic is (mode == "eval" and device == "cuda")
            raise KeyError
        assert torch.backends.cudnn.deterministic is False


def test_a_cpu_records_nothing() -> None:
    assert graphs_for(CPU) is None


def test_training_is_the_same() -> None:
    """Attacks and targets of steps, and the attack of the validation, whose batches are shorter at an epoch's end."""
    recipe = tiny_recipe(
        attack=PGD(steps=2),
        target=Universal(radius=0.05),
        loss=Align(weight=1.0),
        validation=Validation(images=20, train_images=8, attack=PGD(steps=3)),
        epochs=3,
    )
    weights, reports, recorders = [], [], [None, Recorder()]
    for record in recorders:
        parts = load_parts(recipe, make_world(recipe, "cpu"))
        parts.graphs = record and Graphs(record)
        parts.folding = parts.folding or fold(parts.model.eval().backbone, torch.rand(4, *parts.world.image_shape))
        while not parts.finished:
            progress, size = parts.progress, recipe.batch_size
            first = parts.step % parts.steps_per_epoch * size
            train_step(parts, parts.order(progress.epoch)[first : first + size])
            if parts.step % parts.steps_per_epoch == 0:
                reports.append(finish_epoch(parts, progress))
        weights.append({name: tensor.clone() for name, tensor in parts.tensors().items()})
    plain, quick = weights
    assert all(torch.equal(plain[name], quick[name]) for name in plain)
    assert reports[:3] == reports[3:]
    assert recorders[1].recorded == RECORDINGS and not parts.graphs.trouble
