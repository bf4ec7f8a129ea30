"""`robustkit doctor`: what it says of a machine, and of plugins, however broken; never a traceback."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from robustkit import UserError
from robustkit.cli.main import main
from robustkit.core.registry import FOLDERS, registry
from robustkit.doctor import diagnose, libraries, machine, plugins
from robustkit.doctor.finding import Finding
from robustkit.doctor.images import data_sets

HEAD = """
import os, random, socket
import numpy as np
import torch
from typing import Any, ClassVar
from robustkit import registry, setting, spec
from robustkit.core.batch import Budget, Mode, Passes, Prepared


def attack(name):
    return registry("attack").register(name)


class Base:
    reach: ClassVar[float] = 1.0

    def passes(self, progress):
        return Passes()
"""

ATTACKS = {
    "shape": ("return x[:1]", "must give (6, 3, 8, 8), gave (1, 3, 8, 8)", "for each of `x`"),
    "type": ("return x.double()", "must give torch.float32, gave torch.float64", "of its shape and type"),
    "nothing": ("return None", "must give a tensor, gave NoneType", "an image for each"),
    "in-place": ("return x.mul_(0.99)", "changes its argument x", "work on a copy"),
    "gradients": (
        "images = x.clone().requires_grad_()\n"
        "        with torch.enable_grad(), predict.using('eval') as predict:\n"
        "            predict(images).logits.sum().backward()\n"
        "        return x.clone()",
        "changed the gradient of",
        "torch.autograd.grad",
    ),
    "mode": (
        "predict.model.train(not predict.model.training)\n        return x.clone()",
        "changed the mode (training or not)",
        "predict.using(mode)",
    ),
    "torch": ("return threat.project(x + torch.randn_like(x), x, budget.epsilon)", "under the same seed", "generator"),
    "numpy": (
        "return (x + budget.epsilon.view(-1, 1, 1, 1) * np.random.rand()).clamp(0, 1)",
        "under the same seed",
        "generator",
    ),
    "python": (
        "return (x + budget.epsilon.view(-1, 1, 1, 1) * random.random()).clamp(0, 1)",
        "under the same seed",
        "generator",
    ),
    "hostname": (
        "draws = torch.Generator().manual_seed(sum(socket.gethostname().encode()))\n"
        "        noise = torch.rand(x.shape, generator=draws)\n"
        "        return threat.project(x + noise, x, budget.epsilon)",
        "different results under the same seed",
        "nothing else",
    ),
    "process": (
        "return threat.project(x + (os.getpid() % 97) / 1000, x, budget.epsilon)",
        "different results under the same seed",
        "nothing else",
    ),
    "rank": (
        "return threat.project(x + int(os.environ.get('RANK', '0')) / 100, x, budget.epsilon)",
        "different results under the same seed",
        "nothing else",
    ),
    "far": ("return (x + 0.2).clamp(0, 1)", "left the ball", "threat.project"),
    "box": ("return x - budget.epsilon.view(-1, 1, 1, 1)", "left the box [0, 1]", "clamp last"),
    "undeclared": (
        "with torch.no_grad(), predict.using('eval') as predict:\n            predict(x)\n        return x.clone()",
        "but makes Passes(forward=1",
        "let `passes` say",
    ),
    "key": ("return {}['no']", "it raises KeyError: 'no' (", "robustkit new attack NAME"),
    "bare": ("assert x is None\n        return x", "fails an assertion", "core.strategy.Attack"),
    "exit": ("raise SystemExit(3)", "it raises SystemExit: 3", "core.strategy.Attack"),
}
"""Name -> the body of an attack, and what is said of it."""


def body(name: str, text: str) -> str:
    arguments = "self, predict, x, y, budget, threat, generator"
    cls = f"A{name.title().replace('-', '')}"
    return f'\n\n@attack("bad-{name}")\n@spec\nclass {cls}(Base):\n    def __call__({arguments}):\n        {text}\n'


OTHERS = """

@attack("bad-signature")
@spec
class Signature(Base):
    def __call__(self, model, x, y):
        return x


@attack("bad-members")
@spec
class Members:
    pass


@attack("bad-settings")
@spec
class Settings(Base):
    steps: int

    def __call__(self, predict, x, y, budget, threat, generator):
        return x.clone()


class Plain:
    pass


@attack("bad-plain")
class Registered:
    pass


@attack("bad-range")
@spec
class Range(Base):
    steps: int = setting(default=0, at_least=1)


@registry("epsilon").register("bad-epsilon")
@spec
class Epsilon:
    sets_step_size: ClassVar[bool] = False

    def __call__(self, scene):
        scene.batch.x.add_(1)
        return Budget(scene.batch.x.new_full((len(scene.batch.x),), 0.1))

    def passes(self, progress):
        return Passes()


@registry("loss").register("bad-loss")
@spec
class Loss:
    needs_target: ClassVar[bool] = False
    detach_target: ClassVar[bool] = True

    def prepare(self, scene, budget, x_adv):
        return Prepared({"adversarial": (x_adv + 0.01 * torch.rand_like(x_adv)).clamp(0, 1)})

    def __call__(self, outputs, target, batch, extras, progress):
        return {"mean": outputs["adversarial"].logits.mean()}

    def passes(self, progress):
        return Passes(forward=1, parameter_backward=1)


@registry("weights").register("bad-weights")
@spec
class Weights:
    accumulates: ClassVar[bool] = True

    def displaced(self, model, gradients, progress):
        from contextlib import contextmanager

        @contextmanager
        def inside():
            moves = [0.01 * torch.randn_like(p) for p in model.parameters()]
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves):
                    p.add_(move)
            try:
                yield
            finally:
                with torch.no_grad():
                    for p, move in zip(model.parameters(), moves):
                        p.sub_(move)

        return inside()

    def passes(self, progress, pure):
        return Passes()
"""

SAID = {
    "bad-signature": (
        "Signature.__call__ is called with (predict, x, y, budget, threat, generator), but takes (model, x, y)",
        "core.strategy.Attack",
    ),
    "bad-members": ("has no reach, passes, __call__", "core.strategy.Attack"),
    "bad-plain": ("Registered is no spec", "@spec"),
    "bad-range": ("SpecError: Range.steps: must be at least 1, got 0", "robustkit new attack NAME"),
    "bad-epsilon": ("changes the batch's x", "work on a copy"),
    "bad-loss": ("prepare gives something else when asked again", "generator"),
    "bad-weights": ("three displacements", "progress.step"),
    "unregistered": ("broken_plugin:Plain does not register it", '.register("unregistered")'),
    "absent": ("AttributeError", "mend the module"),
    "no-module": ("ModuleNotFoundError: No module named 'nosuch_module'", "mend the module"),
    "syntax": ("SyntaxError", "mend the module"),
    "quits": ("SystemExit: 3", "mend the module"),
    "renamed": ("is not what registers 'pgd'", "announce the class that does"),
}


def announced(folder: Path, package: str, points: dict[str, dict[str, str]], requires: str = "robustkit") -> None:
    """Installs a package as pip leaves it: a folder that says what it announces."""
    info = folder / f"{package.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires.splitlines())
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n{needs}")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in found.items()) for group, found in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that does everything wrong."""
    text = HEAD + "".join(body(name, words) for name, (words, _, _) in ATTACKS.items()) + OTHERS
    (tmp_path / "broken_plugin.py").write_text('print("hello from the plugin")\n' + text)
    (tmp_path / "broken_import.py").write_text("import nosuch_module\n")
    (tmp_path / "broken_syntax.py").write_text("x = (\n")
    (tmp_path / "broken_exit.py").write_text("import sys\nsys.exit(3)\n")
    attacks = {f"bad-{name}": f"broken_plugin:A{name.title().replace('-', '')}" for name in ATTACKS}
    attacks |= {
        f"bad-{name.lower()}": f"broken_plugin:{name}" for name in ("Signature", "Members", "Settings", "Range")
    }
    attacks |= {"bad-plain": "broken_plugin:Registered", "unregistered": "broken_plugin:Plain"}
    attacks |= {"absent": "broken_plugin:Nothing", "no-module": "broken_import:X", "syntax": "broken_syntax:X"}
    attacks |= {"quits": "broken_exit:X", "pgd": "broken_plugin:AShape"}
    points = {
        "robustkit.attacks": attacks,
        "robustkit.attack": {"singular": "broken_plugin:AShape"},
        "robustkit.epsilons": {"bad-epsilon": "broken_plugin:Epsilon"},
        "robustkit.losses": {"bad-loss": "broken_plugin:Loss"},
        "robustkit.weights": {"bad-weights": "broken_plugin:Weights"},
        "console_scripts": {"other": "broken_plugin:main"},
    }
    announced(tmp_path, "broken-plugin", points, "torch>=99\nnosuch-package; extra == 'test'")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "Broken.Plugin"
    for name in [name for name in sys.modules if name.startswith("broken_")]:
        del sys.modules[name]


def test_a_broken_plugin_yields_findings(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--plugin", broken, "--json"]) == 1
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert "Traceback" not in captured.err and "hello from the plugin" in captured.err
    found = {finding["subject"]: finding for finding in data["findings"]}
    assert found["broken-plugin needs torch"]["verdict"] == "problem"
    assert ">=99" in found["broken-plugin needs torch"]["found"]
    assert found["broken-plugin"]["verdict"] == "warning"  # it does not say that it needs robustkit
    assert "'robustkit.attacks'" in found["broken-plugin: singular"]["remedy"]
    said = {f"bad-{name}": (fault, remedy) for name, (_, fault, remedy) in ATTACKS.items()} | SAID
    del said["renamed"]
    of = {subject.rpartition("'")[0].rpartition("'")[2]: finding for subject, finding in found.items()}
    for name, (fault, remedy) in {**said, "pgd": SAID["renamed"]}.items():
        assert of[name]["verdict"] == "problem", of[name]
        assert fault in of[name]["found"] and remedy in of[name]["remedy"], of[name]
        assert "\n" not in of[name]["found"] + of[name]["remedy"]
    assert "(broken_plugin.py:" in of["bad-key"]["found"]  # the place in the plugin's own file
    assert "(broken_syntax.py:1)" in of["syntax"]["found"]
    assert of["bad-settings"]["verdict"] == "warning" and "no default for steps" in of["bad-settings"]["found"]
    assert len(found) == len(said) + 5 and data["counts"]["problem"] == len(said) + 3


def test_a_healthy_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("robustkit_nfgsm")
    assert main(["doctor", "--plugin", "robustkit_nfgsm"]) == 0
    out = capsys.readouterr().out
    assert "ok      robustkit-nfgsm: attack 'n-fgsm': loads, and keeps its contract" in out
    assert out.splitlines()[-1] == "2 ok, 0 warning, 0 problem"


def test_a_name_that_two_packages_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = (
        plugins.EntryPoint("twin", "a:A", "robustkit.attacks"),
        plugins.EntryPoint("twin", "b:B", "robustkit.attacks"),
    )
    monkeypatch.setattr("robustkit.core.registry._points", lambda kind: points)
    (tmp_path / "a.py").write_text("class A:\n    pass\n")
    announced(tmp_path, "twins", {"robustkit.attacks": {"twin": "a:A"}})
    monkeypatch.syspath_prepend(str(tmp_path))
    (_, finding) = plugins.examine("twins")
    assert finding.verdict == "problem" and "claimed by" in finding.found and "uninstall" in finding.remedy
    sys.modules.pop("a", None)


def test_packages_that_are_no_plugins() -> None:
    with pytest.raises(UserError, match="no-such-plugin: is not installed"):
        list(plugins.examine("no-such-plugin"))
    with pytest.raises(UserError, match=r"attrs: announces no strategy; .*entry-points"):
        list(plugins.examine("attrs"))


# The machine


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder, no data anywhere, and no plugins."""
    for name in [name for name in os.environ if name.startswith("ROBUSTKIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(plugins, "packages", lambda: [])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_subject(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_a_machine(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    found = {finding["subject"]: finding for finding in data["findings"]}
    assert found["torch"]["found"] == version("torch")
    for subject in ("Python", "robustkit", "torchvision", "timm", "accelerate", "imports", "CPU", "disk at runs"):
        assert found[subject]["verdict"] == "ok", found[subject]
    assert "--precision auto means" in found["bfloat16 on cpu"]["found"]
    assert found["processes"]["verdict"] == "ok"
    assert found["data=cifar10"]["verdict"] == "warning" and "downloaded" in found["data=cifar10"]["remedy"]
    assert "extra foolbox" in found and data["counts"]["problem"] == 0
    assert not torch.distributed.is_initialized() and not list(bare.iterdir())


def test_data_sets_and_where_they_are_looked_for(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "data" / "cifar-10-batches-py").mkdir(parents=True)
    monkeypatch.setenv("ROBUSTKIT_CIFAR100_DIR", str(bare / "elsewhere"))
    (bare / "elsewhere" / "train").mkdir(parents=True)
    monkeypatch.setenv("ROBUSTKIT_SVHN_DIR", str(bare / "nowhere"))
    found = by_subject(data_sets())
    assert (found["data=cifar10"].verdict, found["data=cifar10"].found) == ("ok", "the original files, in data")
    assert found["data=cifar100"].found == f"an image folder, in {bare / 'elsewhere'}"
    assert found["data=svhn"].verdict == "problem" and "ROBUSTKIT_SVHN_DIR names" in found["data=svhn"].found
    assert "train_32x32.mat" in found["data=svhn"].remedy
    assert "data=digits" not in found
    monkeypatch.setenv("ROBUSTKIT_DATA_DIR", str(bare / "nothing"))
    assert by_subject(data_sets())["ROBUSTKIT_DATA_DIR"].verdict == "problem"
    assert main(["doctor"]) == 1


def test_the_files_of_published_data_are_torchvision_s() -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    from robustkit.datasets import Cifar10, Cifar100

    assert Cifar10().sought.files == (CIFAR10.base_folder,) and Cifar100().sought.files == (CIFAR100.base_folder,)


def test_a_torch_that_cannot_be_imported(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.import_module

    def fails(name: str, *rest: Any) -> Any:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return known(name, *rest)

    monkeypatch.setattr(libraries.importlib, "import_module", fails)
    *_, last = diagnose()
    assert last.subject == "import torchvision" and last.verdict == "problem" and "nms" in last.found


def test_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert libraries.fits(libraries.Requirement("torch>=99")).verdict == "problem"
    missing = libraries.fits(libraries.Requirement("nosuch-package>=1"))
    assert (missing.found, missing.remedy) == ("not installed", "pip install 'nosuch-package>=1'")
    monkeypatch.setattr(libraries.robustkit, "__version__", "9.9")
    assert by_subject(libraries.versions())["robustkit"].verdict == "problem"


def test_no_room_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (finding,) = machine.disk(tmp_path / "file" / "runs")
    assert finding.verdict == "problem" and "--out" in finding.remedy
    for free, verdict in ((int(1e8), "problem"), (int(2e9), "warning"), (int(9e9), "ok")):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        (finding,) = machine.disk(tmp_path / "new" / "runs")
        assert finding.verdict == verdict


def test_processes_that_cannot_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*words: Any, **options: Any) -> None:
        raise RuntimeError("no interface")

    monkeypatch.setattr(machine.dist, "init_process_group", fails)
    finding = next(machine.processes())
    assert finding.verdict == "problem" and "no interface" in finding.found and "GLOO_SOCKET_IFNAME" in finding.remedy


def test_a_driver_without_a_gpu_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert by_subject(machine.devices())["GPU"].verdict == "warning"


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one: what torch would say is made up, and the products are the CPU's."""
    facts = SimpleNamespace(name="Some GPU", major=9, minor=0)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(machine.torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(machine.torch.cuda, "mem_get_info", lambda device: (int(40e9), int(80e9)))
    monkeypatch.setattr(machine, "has_fast_bfloat16", lambda device: device.type == "cuda")
    ones = torch.ones
    monkeypatch.setattr(machine.torch, "ones", lambda *shape, device=None: ones(*shape))
    found = by_subject(machine.devices())
    assert found["cuda:0"].found == "Some GPU, capability 9.0, 40.0 of 80.0 GB free" and found["cuda:0"].verdict == "ok"
    assert (
        "auto means bf16" in found["bfloat16 on cuda:0"].found and "auto means fp32" in found["bfloat16 on cpu"].found
    )

    def fails(*words: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(machine.torch, "ones", fails)
    finding = by_subject(machine.devices())["cuda:0"]
    assert finding.verdict == "problem" and "no kernel image" in finding.found and "--device" in finding.remedy
    monkeypatch.setattr(machine.torch.cuda, "mem_get_info", fails)
    assert by_subject(machine.devices())["cuda:0"].verdict == "problem"


def test_every_kind_has_a_group() -> None:
    assert set(plugins.KINDS.values()) == set(FOLDERS) == {registry(kind).kind for kind in FOLDERS}
