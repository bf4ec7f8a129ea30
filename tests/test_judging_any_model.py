"""Any model, any source of images, any kill: the outcomes are those of the package called by hand."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import robustkit.backbones  # noqa: F401
from robustkit.cli.main import main
from robustkit.core.errors import DataError, SpecError, UserError
from robustkit.core.recipe import Suite
from robustkit.core.strategy import Outcomes
from robustkit.datasets import Cifar10, Digits
from robustkit.evaluation import PGD_10, PGD_20, QUICK, SUITES, Attacked, AutoAttack, Clean, Results, evaluate
from robustkit.evaluation.ledger import Entry, Ledger, digest_of_images
from robustkit.threats import L1, L2, Linf

AUTOATTACK = [AutoAttack(slice_size=10)]
GRADIENTS = [AutoAttack(slice_size=10, attacks=("apgd-ce", "apgd-t", "fab-t"))]  # Square takes longest by far


def taught(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 150) -> nn.Module:
    """A few steps of natural training, enough to be right mostly and robust to very little."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A natural model on digits, and sixty test images."""
    torch.manual_seed(0)
    data = Digits().load()
    model = timm.create_model("convnet_small", num_classes=10, in_chans=1)
    model = taught(model, data.train.fetch(torch.arange(len(data.train))) / 255, data.train.labels)
    return model, data.test.fetch(torch.arange(60)) / 255, data.test.labels[:60]


def by_hand(model: nn.Module, x: Tensor, y: Tensor, threat: Any, size: int, seed: int = 0) -> list[bool]:
    """The bare package on each slice."""
    right: list[bool] = []
    for start in range(0, len(x), size):
        package = pyautoattack.AutoAttack(model, norm=threat.norm, eps=threat.epsilon, seed=seed, version="standard")
        package.verbose = False
        part = slice(start, start + size)
        _, predicted = package.run_standard_evaluation(x[part], y[part], batch_size=250)
        right += (predicted == y[part]).tolist()
    for parameter in model.parameters():
        parameter.grad = None
    return right


@pytest.mark.parametrize(
    "threat",
    [
        pytest.param(Linf(epsilon=0.08), id="Linf"),
        pytest.param(L2(epsilon=0.4), id="L2", marks=pytest.mark.slow),
        pytest.param(L1(epsilon=0.8), id="L1", marks=pytest.mark.slow),
    ],
)
def test_exact_outcomes_are_those_of_the_package(threat: Any, digits: Any) -> None:
    model, x, y = digits
    count = 20 if threat.norm == "Linf" else 10  # slices of 10
    x, y = x[:count], y[:count]
    found = evaluate(model, x, y, threat=threat, suite=AUTOATTACK, exact=True, seed=5)
    assert found["autoattack"].outcomes == by_hand(model, x, y, threat, 10, seed=5)
    assert 0 < found["autoattack"].accuracy < 0.9 and found.path == "float32, as given"
    quick = evaluate(model, x, y, threat=threat, suite=AUTOATTACK, seed=5)
    assert "folded" in quick.path
    agreement = [a == b for a, b in zip(quick["autoattack"].outcomes, found["autoattack"].outcomes, strict=True)]
    assert sum(agreement) >= len(agreement) - 1


@pytest.mark.parametrize("version", ["plus", "rand"])
def test_other_versions_are_the_package_s(version: Any, digits: Any) -> None:
    model, x, y = digits
    x, y = x[:4], y[:4]
    found = evaluate(model, x, y, threat=Linf(epsilon=0.2), suite=[AutoAttack(version=version)], exact=True)
    package = pyautoattack.AutoAttack(model, norm="Linf", eps=0.2, seed=0, version=version)
    package.verbose = False
    _, predicted = package.run_standard_evaluation(x, y)
    assert found["autoattack"].outcomes == (predicted == y).tolist()
    assert list(found["autoattack"].breakdown) == package.attacks_to_run


@pytest.mark.skipif("ROBUSTKIT_CIFAR10_DIR" not in os.environ, reason="needs CIFAR-10")
@pytest.mark.slow
def test_exact_outcomes_on_cifar_are_those_of_the_package() -> None:
    data = Cifar10(per_class=200).load()
    torch.manual_seed(0)
    model = timm.create_model("convnet_small", num_classes=10)
    model = taught(model, data.train.fetch(torch.arange(2000)) / 255, data.train.labels)
    x, y = data.test.fetch(torch.arange(0, 2000, 200)) / 255, data.test.labels[:2000:200]
    threat = Linf(epsilon=0.5 / 255)
    found = evaluate(model, x, y, threat=threat, suite=AUTOATTACK, exact=True)
    assert found["autoattack"].outcomes == by_hand(model, x, y, threat, 10)
    assert 0 < found["autoattack"].accuracy < 0.9


# --- any model, any images --------------------------------------------------------------------------------------------


class Centred(nn.Module):
    def __init__(self, inner: nn.Module, offset: Tensor) -> None:
        super().__init__()
        self.inner, self.offset = inner, offset

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) - self.offset


@pytest.mark.parametrize(
    ("name", "options", "shape", "classes"),
    [
        ("convnet_small", {}, (3, 32, 32), 2),
        ("convnet_small", {}, (3, 32, 32), 3),
        ("convnet_small", {}, (1, 28, 28), 5),
        ("convnet_small", {}, (3, 64, 64), 100),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}, (3, 32, 32), 10),
        ("mobilenetv3_small_050", {}, (3, 64, 64), 5),
    ],
)
def test_classes_shapes_and_families(name: str, options: Any, shape: Any, classes: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes, in_chans=shape[0], **options).eval()
    x = torch.rand(6, *shape)
    with torch.no_grad():
        model = Centred(model, model(x).mean(dim=0))  # no class wins everywhere
        y = model(x).argmax(dim=1)
    suite = [Clean(), PGD_10, AutoAttack(attacks=("apgd-ce", "apgd-t", "fab-t"))]
    found = evaluate(model, x, y, threat=Linf(epsilon=64 / 255), suite=suite)
    assert found["clean"].accuracy == 1 and found["autoattack"].accuracy <= 0.5
    said = " ".join(found["autoattack"].notes)
    assert ("needs 4 classes" in said) == (classes < 4)
    assert ("apgd-t" in found["autoattack"].breakdown) == (classes >= 4)


def test_a_folder_of_the_user_s_own_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    for part in ("train", "test"):
        for number, kind in enumerate(("cat", "dog", "owl")):
            folder = tmp_path / "photos" / part / kind
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (20, 16), (80 * number, 60, 20 * index)).save(folder / f"{index}.png")
    (tmp_path / "own_models.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def linear():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["data=image-folder", "data.root=photos", "data.size=16", "threat.epsilon=4/255", "--suite", "quick"]
    assert main(["eval", "own_models:linear", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["results"]["autoattack"]["n"] == 12 and told["stopped"] == ""
    assert json.loads(Path("runs/eval-linear/results.json").read_text())["model"].keys() == told["results"].keys()
    assert set(told["results"]) == {"clean", "pgd-20", "cw", "autoattack"}


def same(first: Results, second: Results) -> bool:
    return all(first[key].outcomes == second[key].outcomes for key in first) and first.keys() == second.keys()


def test_sources_are_alike(digits: Any) -> None:
    model, x, y = digits
    options: Any = {"threat": Linf(epsilon=0.05), "suite": [Clean(), PGD_10], "batch_size": 16}
    expected = evaluate(model, x, y, **options)
    pairs = TensorDataset(x, y)
    assert same(evaluate(model, pairs, **options), expected)
    assert same(evaluate(model, list(zip(x, y.tolist(), strict=True)), **options), expected)
    assert same(evaluate(model, DataLoader(pairs, batch_size=7, shuffle=True, drop_last=True), **options), expected)
    assert same(evaluate(model, x.numpy(), y.numpy(), **options), expected)
    assert same(evaluate(model, x, y, device="cpu", **options), expected)
    assert expected["clean"].images == expected["pgd-10"].images != ""
    part = evaluate(model, pairs, limit=10, **options)
    assert part["clean"].n == 10 and part["clean"].images != expected["clean"].images


def test_only_a_slice_is_in_memory(digits: Any) -> None:
    model, x, y = digits
    held: list[int] = []

    class Lazy:
        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, row: int) -> tuple[Tensor, int]:
            held.append(row)
            return x[row], int(y[row])

    evaluate(model, Lazy(), suite=[Clean()], batch_size=16)
    assert held[-60:] == list(range(60)) and len(held) <= 60 + 16 + 32  # and a few that the model is tried on


def test_suites_by_name_and_value(digits: Any) -> None:
    model, x, y = digits
    assert set(SUITES) == {"quick", "standard", "uiat", "ecas", "ldat", "detection"} and QUICK.images == 1000
    own = Suite(measures=(Clean(), Attacked(key="strong", steps=3, restarts=2)), images=12, threat=L2(epsilon=0.3))
    found = evaluate(model, x, y, suite=own)
    assert list(found) == ["clean", "strong"] and found["strong"].n == 12 and found.threat == L2(epsilon=0.3)
    assert str(found).count("of 12 images") == 2
    with pytest.raises(UserError, match="did you mean 'standard'"):
        evaluate(model, x, y, suite="standart")


class Faulty(nn.Module):
    def __init__(self, inner: nn.Module, fault: str) -> None:
        super().__init__()
        self.inner, self.fault = inner, fault

    def forward(self, x: Tensor) -> Any:
        logits = self.inner(x)
        if self.fault == "probabilities":
            return logits.softmax(dim=1)
        if self.fault == "nan":
            return logits * torch.nan
        return {"logits": logits}


def test_bad_input_takes_one_line(digits: Any) -> None:
    model, x, y = digits
    cases: list[tuple[list[str], Any]] = [
        (["[0, 1]", "divide 8-bit pixels by 255"], lambda: evaluate(model, x * 255, y)),
        (["[0, 1]", "normalisation inside"], lambda: evaluate(model, TensorDataset((x - 0.5) / 0.25, y))),
        (["label 10 of image 3"], lambda: evaluate(model, x, y.index_fill(0, torch.tensor(3), 10))),
        (["label 77 of image 59"], lambda: evaluate(model, x, y.index_fill(0, torch.tensor(59), 77), suite=[Clean()])),
        (["probabilities", "softmax"], lambda: evaluate(Faulty(model, "probabilities"), x, y)),
        (["NaN"], lambda: evaluate(Faulty(model, "nan"), x, y)),
        (["logits", "dict"], lambda: evaluate(Faulty(model, "dict"), x, y)),
        (["images", "N >= 1"], lambda: evaluate(model, x[:0], y[:0])),
        (["no images"], lambda: evaluate(model, TensorDataset(x[:0], y[:0]))),
        (["labels are missing"], lambda: evaluate(model, x)),
        (["row number"], lambda: evaluate(model, DataLoader(Endless()))),
        (["1 x 8 x 8", "for these data"], lambda: evaluate(timm.create_model("convnet_small", num_classes=3), x, y)),
        (["Linf.epsilon", "at most 1", "8/255"], lambda: evaluate(model, x, y, threat=Linf(epsilon=8))),
    ]
    if not torch.cuda.is_available():
        cases.append((["device 'cuda'", "--device cpu"], lambda: evaluate(model, x, y, device="cuda")))
    for words, act in cases:
        with pytest.raises((DataError, SpecError, UserError)) as caught:
            act()
        assert all(word in str(caught.value) for word in words), (words, str(caught.value))
        assert "\n" not in str(caught.value)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere:model", "data=digits"], "cannot import 'nowhere'"),
        (["timm:nothing", "data=digits"], "has no function 'nothing'"),
        (["torch.nn:Identity"], "which images?"),
        (["torch:seed", "data=digits"], "returns int, not a torch module"),
        (["timm:create_model", "data=digits"], "the function fails"),
        (["torch.nn:Identity", "data=digits", "--suite", "fast"], "there is no suite 'fast'"),
        (["torch.nn:Identity", "data=digits", "--measures", "pgd"], "there is no measure 'pgd'"),
        (["runs/nowhere"], "not a run folder"),
        (["runs/x/checkpoints/best.safetensors", "--checkpoint", "last"], "is not the checkpoint 'last'"),
        (["runs/x/checkpoints/bets.safetensors"], "no such checkpoint; did you mean 'best'?"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# --- killed, and gone on ----------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch, timm, json
import robustkit.backbones
from robustkit.evaluation import evaluate, AutoAttack, PGD_10
from robustkit.threats import Linf
torch.set_num_threads(1)
folder, model, images, labels, *attacks = sys.argv[1:]
net = timm.create_model("convnet_small", num_classes=10, in_chans=1)
net.load_state_dict(torch.load(model, weights_only=True))
x, y = torch.load(images, weights_only=True), torch.load(labels, weights_only=True)
suite = [PGD_10, AutoAttack(slice_size=10, attacks=attacks)]
found = evaluate(net, x, y, threat=Linf(epsilon=0.05), suite=suite, folder=folder)
print(json.dumps({key: [r.outcomes, r.breakdown, r.n] for key, r in found.items()}))
"""


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["gradients", "standard"])
def test_killed_five_times_and_gone_on(whole: bool, digits: Any, tmp_path: Path) -> None:
    model, x, y = digits
    if not whole:
        x, y = x[:40], y[:40]
    for name, value in (("model", model.state_dict()), ("images", x), ("labels", y)):
        torch.save(value, tmp_path / name)
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        "FOLDER",
        *(str(tmp_path / name) for name in ("model", "images", "labels")),
    ]
    command += [] if whole else ["apgd-ce", "apgd-t", "fab-t"]

    def begin(folder: str) -> "subprocess.Popen[str]":
        words = [str(tmp_path / folder) if word == "FOLDER" else word for word in command]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)

    def lines() -> int:
        return sum(len(path.read_text().splitlines()) for path in (tmp_path / "killed").glob("*.jsonl"))

    undisturbed = begin("whole")
    expected = undisturbed.communicate(timeout=300)[0]
    assert undisturbed.returncode == 0
    moments = random.Random(0)
    for _ in range(5):
        known, process = lines(), begin("killed")
        while lines() == known and process.poll() is None:  # imports take longest: not there
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # else it was done before
    (tmp_path / "killed" / "autoattack-other.0.jsonl").write_text("{")  # of another evaluation
    last = begin("killed")
    assert last.communicate(timeout=300)[0] == expected


def test_every_stage_can_be_the_last_before_a_kill(digits: Any, tmp_path: Path) -> None:
    model, x, y = digits
    x, y = x[:30], y[:30]
    options: Any = {"threat": Linf(epsilon=0.05), "suite": GRADIENTS}
    expected = evaluate(model, x, y, **options)["autoattack"]
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return True  # after each stage

    found: Any = {}
    while "autoattack" not in found:
        found = evaluate(model, x, y, folder=tmp_path, should_stop=stop, **options)
        for path in tmp_path.glob("*.jsonl"):
            path.write_text(path.read_text() + '{"slice": 0, "ri')  # a line cut short
        assert calls <= 9
    assert calls == 9  # three slices of three stages, each once
    assert found["autoattack"].outcomes == expected.outcomes and found["autoattack"].breakdown == expected.breakdown


def test_a_finished_evaluation_is_not_done_again(digits: Any, tmp_path: Path) -> None:
    model, x, y = digits
    stages: list[str] = []

    def once() -> Any:
        stages.clear()
        options: Any = {"threat": Linf(epsilon=0.05), "suite": [PGD_20], "batch_size": 20}
        return evaluate(model, x, y, folder=tmp_path, watch=lambda key, _: stages.append(key), **options)["pgd-20"]

    first = once()
    assert stages
    assert once() == first and not stages
    with torch.no_grad():
        model[0].bias.add_(0) if isinstance(model, nn.Sequential) else next(iter(model.parameters())).mul_(1.0001)
    once()
    assert stages  # another model
    with torch.no_grad():
        next(iter(model.parameters())).div_(1.0001)


def test_other_images_are_judged_anew(digits: Any, tmp_path: Path) -> None:
    model, x, y = digits
    options: Any = {"suite": [Clean()], "batch_size": 20, "folder": tmp_path}
    evaluate(model, x, y, **options)
    wrong = (y + 1) % 10
    found = evaluate(model, torch.cat([x[:20], x[20:40], x[40:]]), torch.cat([y[:20], wrong[20:40], y[40:]]), **options)
    fresh = evaluate(model, x, torch.cat([y[:20], wrong[20:40], y[40:]]), suite=[Clean()], batch_size=20)
    assert found["clean"].outcomes == fresh["clean"].outcomes


def test_ledger_by_hand(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "deep" / "folder", "key", rank=1)
    assert ledger.read() == {}
    right = torch.tensor([True, False])
    entry = Entry("0" * 16, Outcomes(right, {"a": 0.5}, ("note",)), False, 1.5)
    ledger.write(3, entry)
    with (tmp_path / "deep" / "folder" / "key.1.jsonl").open("a") as file:
        file.write('{"slice": 3, "images"')
    later = Entry("0" * 16, Outcomes(~right, {"a": 0.5, "b": 0.0}, ()), True, 2.0)
    Ledger(tmp_path / "deep" / "folder", "key", rank=0).write(4, entry)
    ledger.write(3, later)
    found = Ledger(tmp_path / "deep" / "folder", "key").read()
    assert found[3].finished and found[3].outcomes.right.tolist() == [False, True] and found[3].seconds == 2.0
    assert found[4].outcomes.breakdown == {"a": 0.5} and found[4].outcomes.notes == ("note",)
    ledger.remove()
    assert not (tmp_path / "deep" / "folder").exists()
    x = torch.rand(2, 1, 2, 2)
    assert digest_of_images(x, torch.tensor([0, 1])) != digest_of_images(x, torch.tensor([0, 2]))
    assert len(digest_of_images(x, torch.tensor([0, 1]))) == 16


# --- many processes ---------------------------------------------------------------------------------------------------


def launched(words: list[str], folder: Path, processes: int) -> None:
    """`robustkit eval` in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-m", "robustkit", "eval", *words]
        with (folder / f"log-{processes}-{rank}").open("w") as log:
            running.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log))
    for rank, process in enumerate(running):
        assert process.wait(timeout=240) == 0, (folder / f"log-{processes}-{rank}").read_text()


def test_processes_share_the_slices(tmp_path: Path, digits: Any) -> None:
    torch.save(digits[0].state_dict(), tmp_path / "weights")
    (tmp_path / "own_models.py").write_text(
        "import timm, torch\n"
        "import robustkit.backbones\n"
        "def digits():\n"
        "    model = timm.create_model('convnet_small', num_classes=10, in_chans=1)\n"
        "    model.load_state_dict(torch.load('weights', weights_only=True))\n"
        "    return model\n"
    )
    words = ["own_models:digits", "data=digits", "threat.epsilon=0.05", "--suite", "ldat", "--device", "cpu"]
    words += ["--measures", "clean,pgd-40,apgd-dlr", "--json", "--quiet"]
    launched([*words, "--out", "alone"], tmp_path, 1)
    launched([*words, "--out", "shared"], tmp_path, 2)
    alone, shared = ((tmp_path / name / "outcomes.json").read_text() for name in ("alone", "shared"))
    assert alone == shared and "apgd-dlr" in alone
    writers = {path.name.split(".")[-2] for path in (tmp_path / "shared" / "evaluation").glob("apgd-dlr*.jsonl")}
    assert writers == {"0", "1"}
    told = json.loads((tmp_path / "log-2-0").read_text())["results"]
    assert told["clean"]["n"] == 360 and (tmp_path / "log-2-1").read_text() == ""
