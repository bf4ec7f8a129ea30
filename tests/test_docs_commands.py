"""Every command and every Python block of the documentation runs, page by page, in the order in which it stands there.

A page is worked through in a folder of its own, in which there is what pages speak of: recipes, photographs, a module
of the user's, and runs. A run that a command names and no earlier one has made is trained when it is needed, by the
command that its name tells of (`made_by`).

Commands run in this process, and are made light by these means and no others, so that a page takes seconds:
- data sets, digits too, are a few made-up images of the same shape and classes (`few_images`);
- AutoAttack's four attacks make a few iterations, against two classes (`short_autoattack`);
- `run`, `sweep`, `bench` and `--calibrate-entropy` get recipes with all their strategies, but a small network and one
  epoch (`tiny`); a sweep tries two values of each list, a search two trials (`light`);
- an audit is content with one image that such a network gets right, where it wants ten;
- at the end of a run no curves are drawn, and no page: pages have commands for that.

What cannot be run is read by the command's own parser: see `PARSED`, with the reasons; so is what takes many seconds
all the same (`SLOW`), but in the slow test.

A console block holds commands and nothing else: what they print stands in a `text` block of its own. A command ends
with exit code 0, unless the comment behind it names another, as in `# exit code 75: call it again`.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from pages import PAGES, ROOT, Block, Command, blocks, commands, forget_strategies, plugins_of, spans
from PIL import Image

from robustkit import Recipe, datasets, evolve
from robustkit.cli import outcome
from robustkit.cli.main import COMMANDS, main
from robustkit.cli.options import Parser
from robustkit.core.loop import Fault
from robustkit.core.recipe import load_recipe, load_recipes, save_recipe
from robustkit.data.images import Data
from robustkit.datasets import Digits, Synthetic
from robustkit.evaluation import audit, autoattack
from robustkit.folder import stem_of
from robustkit.reporting import figures
from robustkit.schedules import MultiStep

PARSED = {
    r"--processes \d": "starts processes: tests/system does",
    r"--device cuda": "wants a GPU",
    r"--measures deepfool|--suite ldat": "" if find_spec("foolbox") else "wants foolbox, which is an extra",
    r"--search": "" if find_spec("optuna") else "wants optuna, which is an extra",
    r"--log-with tensorboard": "" if find_spec("tensorboard") else "wants tensorboard",
    r"--print-completion": "" if find_spec("shtab") else "wants shtab, which is an extra",
    r"--workers \d": "starts processes: test_sweep does",
    r"--plugin robustkit-(slow-start|sharpened)|run robustkit-sharpened": "wants it installed: test_scaffold does",
}
"""Commands of robustkit, as regular expressions, that are read but not run, and why. Without a reason they are run."""

SLOW = (
    r"--figure (strength|difference|budgets|iterations|features)",
    r"^audit (?!my_models)(?!runs/quickstart-1$)",
    r"^doctor$",
    r"^sweep (recipes/\S+ ){3}",
    r"las_trades|las_awp",
)
"""Commands that take longer than their page's other ones together."""

OTHERS = {
    "pip install": "extras and folders exist",
    "pytest": "its paths exist",
    "python tests/benchmarks": "the script exists, and has the options",
    "tensorboard": "a server",
    "torchrun": "what it starts is read by robustkit's parser",
    "accelerate launch": "likewise",
    "sbatch": "wants Slurm",
    "mkdocs": "CI builds the site",
    "find": "run, by the shell",
    "rm": "likewise",
    "wait": "waits for those before",
}
"""Other programs that pages call: how the command begins, and what is done about it."""

RUNS = {
    "runs/mine": "robustkit run recipes/natural.py seed=1 --out runs/mine",
    "runs/mine-1": "robustkit run faulty.py --out runs/mine-1  # exit code 1",
    "runs/run-1": "robustkit run recipes/quickstart.py seed=1 --out runs/run-1",
    "runs/run-2": "robustkit run recipes/quickstart.py threat.epsilon=0.1 --out runs/run-2",
    "runs/ecas-1": "robustkit run recipes/ecas_table1.py:ecas seed=1 --out runs/ecas-1",
    "runs/uiat-helper-cpu": "robustkit run recipes/cpu/uiat_table1.py:natural --out runs/uiat-helper-cpu",
    "runs/uiat_oneoff_rn18-2": "robustkit run recipes/uiat_oneoff_rn18.py loss.weight=2 --out runs/uiat_oneoff_rn18-2",
    "runs/stranger": "robustkit run recipes/quickstart.py seed=1 --out runs/stranger",
    "runs/three": "robustkit sweep recipes/pgd_at_rn18.py seed=1,2 --out runs/three",
    **{
        f"runs/uiat-{seed}": f"robustkit run recipes/quickstart.py seed={seed} --out runs/uiat-{seed}"
        for seed in (2, 3)
    },
    **{f"runs/plain-{seed}": f"robustkit run runs/plain-1 seed={seed} --out runs/plain-{seed}" for seed in (2, 3)},
    **{
        f"runs/{name}": f"robustkit run recipes/uiat_oneoff_rn18.py loss.weight={weight} --out runs/{name}"
        for weight, name in enumerate("abc", start=1)
    },
}
"""Runs whose names do not tell of their recipe, and the commands that make them."""

NAMES = {"STRANGER": "runs/stranger", "RECIPE": "recipes/quickstart.py", "RUN": "runs/quickstart-1"}
"""Words in capitals that a reader replaces."""

FILES = {"docs/start/own_recipe.md": ("mine.py", "variants.py")}
"""Pages whose Python blocks a reader saves, and under which names."""

ELSEWHERE = {"docs/kinds": "test_docs", "docs/plugins.md": "test_plugins_page"}
"""Pages whose Python blocks run, and are looked at, in another module."""

PREAMBLES = {
    "README.md": """\
from typing import ClassVar

import torch

from robustkit import *
from robustkit.attacks import PGD
from robustkit.core.batch import Budget, Passes
from robustkit.core.strategy import Scene
from robustkit.datasets import Cifar10
from robustkit.epsilons import ECAS
from robustkit.heads import Linear
from robustkit.losses import Align
from robustkit.optimizers import SGD
from robustkit.schedules import MultiStep
from robustkit.targets import Momentum, Universal
from robustkit.threats import Linf

px = 1 / 255
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
""",
    "docs/notebooks.md": """\
from pathlib import Path

import torch

import robustkit
from robustkit.testing import tiny_recipe

recipe = tiny_recipe()
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
Path("my_parts.py").touch()
""",
}
"""What a page's blocks leave out."""

MODELS = """\
from torch import nn


def resnet():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""

FAULTY = '''\
"""A loss that is not a number in the sixth step."""

from robustkit import registry, spec
from robustkit.losses import CrossEntropy
from robustkit.testing import tiny_recipe


@registry("loss").register("faulty")
@spec
class Faulty:
    """Cross-entropy, but for one step."""

    needs_target, detach_target = False, True

    def prepare(self, scene, budget, x_adv):
        return CrossEntropy().prepare(scene, budget, x_adv)

    def passes(self, progress):
        return CrossEntropy().passes(progress)

    def __call__(self, outputs, target, batch, extras, progress):
        terms = CrossEntropy()(outputs, target, batch, extras, progress)
        return terms | {"struck": 0 * sum(terms.values()) + (float("nan") if progress.step == 5 else 0.0)}


recipe = tiny_recipe(loss=Faulty())
'''


ERRORS = {"Fault": Fault}
"""Errors that blocks say they raise."""


def started(page: Path) -> Iterator[list[str]]:
    """All programs that a page's commands start."""
    for block in blocks(page, "console"):
        for command in commands(block):
            yield from programs(command.text.partition("  #")[0])


# What makes a command light


def few_images(dataset: Any) -> Data:
    """A data set's stand-in, of its shape and classes."""
    (channels, size, _), classes = dataset.facts
    return Synthetic(train=max(30, classes), test=12, classes=classes, size=size, channels=channels).load()


def short_autoattack(*arguments: Any) -> Any:
    """The authors' package with its four attacks, of two iterations each, against two of the other classes."""
    package = _package(*arguments)
    for attack in (package.apgd, package.apgd_targeted, package.fab):
        attack.n_iter = 2
    for targeted in (package.apgd_targeted, package.fab):
        targeted.n_target_classes = 2
    package.square.n_queries = 5
    return package


_package = autoattack._package


def sooner(part: Any, epochs: int) -> Any:
    """The part, with epochs in which something begins or drops as fractions of training."""
    if isinstance(part, MultiStep):
        return evolve(part, at=tuple(at / epochs if at >= 1 else at for at in part.at))
    if isinstance(start := getattr(part, "start", None), int | float) and start > 1:
        return evolve(part, start=start / epochs)
    if isinstance(inner := getattr(part, "schedule", None), MultiStep):
        return evolve(part, schedule=sooner(inner, epochs))
    return part


def tiny(recipe: Recipe) -> Recipe:
    """All its strategies, with a network of two convolutions, for an epoch of two steps."""
    changes = {name: sooner(getattr(recipe, name), recipe.epochs) for name in attrs.fields_dict(Recipe)}
    changes = {name: part for name, part in changes.items() if part is not getattr(recipe, name)}
    if hasattr(recipe.loss, "teacher"):
        changes["loss"] = evolve(recipe.loss, teacher=evolve(recipe.loss.teacher, backbone="convnet_small"))
    return evolve(
        recipe,
        **changes,
        model=evolve(recipe.model, backbone="convnet_small"),
        epochs=1,
        batch_size=16,
        validation=evolve(recipe.validation, images=8, train_images=min(8, recipe.validation.train_images)),
        control=None if recipe.control is None else tiny(recipe.control),
    )


def in_tiny(address: str) -> str:
    """The file of the tiny recipe, written when it is first asked for; its name gives runs the name they have."""
    path = Path("tiny", Path(address).parent, f"{stem_of(address)}.json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_recipe(tiny(load_recipe(address)), path)
    return str(path)


def is_heavy(words: list[str]) -> bool:
    """Whether the command trains, or times, or forwards a recipe's network."""
    return words[0] in ("run", "sweep", "bench") or "--calibrate-entropy" in words


def light(words: list[str]) -> list[str]:
    """The command with tiny recipes, if it is one that trains; a sweep of two values of each list, or two trials."""
    if not is_heavy(words):
        return words
    saved = "|".join(name for names in FILES.values() for name in names)
    known = re.compile(rf"(plugins/[\w-]+/)?recipes/[^=]*$|({saved})(:|$)")
    words = [in_tiny(word) if known.match(word) else word for word in words]
    if words[0] == "sweep":
        words = [re.sub(r"^([\w.]+=[^,]+,[^,]+),.*", r"\1", word) for word in words]
        words = ["2" if before == "--trials" else word for before, word in pairwise(["", *words])]
    return words


# What there is


@pytest.fixture(scope="module", autouse=True)
def light_world() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CIFAR10", "CIFAR100", "SVHN", "DATA"):
            patch.delenv(f"ROBUSTKIT_{name}_DIR", raising=False)
        for dataset in (Digits, datasets.Cifar10, datasets.Cifar100, datasets.SVHN):
            patch.setattr(dataset, "load", few_images)
        patch.setattr(autoattack, "_package", short_autoattack)
        patch.setattr(audit, "FEWEST", 1)
        patch.setattr(figures, "draw", lambda *arguments, **options: None)
        patch.setattr(outcome, "write_page", lambda folder: None)
        patch.setattr(os, "fsync", lambda descriptor: None)
        with torch.random.fork_rng(devices=[]):
            yield


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in the folder in which pages are read; `runs` fills as pages need them."""
    folder = tmp_path_factory.mktemp("things")
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "plugins").symlink_to(ROOT / "plugins")
    (folder / "tests").symlink_to(ROOT / "tests")
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / "tiny").mkdir()
    (folder / "runs").mkdir()
    (folder / "my_models.py").write_text(MODELS)
    (folder / "faulty.py").write_text(FAULTY)
    generator = torch.Generator().manual_seed(0)
    for name in ("cats", "ships", "trucks"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(12):
            pixels = torch.randint(256, (40, 48, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "photos" / name / f"{number}.png")
    (folder / "images").mkdir()
    made_up = torch.randint(256, (30, 32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
    np.savez(folder / "images" / "cifar10_ddpm.npz", image=made_up, label=np.arange(30) % 10)
    for name in ("photo.png", "new_photo.jpg"):
        Image.fromarray(pixels.numpy()).save(folder / name)
    return folder


@pytest.fixture
def folder(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of one page."""
    for path in things.iterdir():
        if path.name != "runs":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def made_by(name: str) -> str:
    """The command that makes the run of that name: runs/uiat_rn18-1 is the first of recipes/uiat_rn18.py."""
    if name in RUNS:
        return RUNS[name]
    files = [*Path("recipes").rglob("*.py"), *Path().glob("plugins/*/recipes/*.py")]
    for path in sorted(files, key=lambda path: len(path.parts)):
        for recipe in load_recipes(path):
            address = f"{path}:{recipe}" if recipe else str(path)
            if found := re.fullmatch(rf"runs/{re.escape(stem_of(address))}(?:-(\d+))?", name):
                return f"robustkit run {address} seed={found[1] or 1} --out {name}"
    raise AssertionError(f"no recipe makes {name}: mend the page, or say in RUNS how it is made")


class Reader:
    """Works through a page: does what it says, and sees that it went as it says."""

    def __init__(self, things: Path, capsys: pytest.CaptureFixture[str], *, patient: bool) -> None:
        self.things, self.capsys, self.patient = things, capsys, patient

    def perform(self, command: Command) -> None:
        """Each program of a line, which knows of no Python block. The exit code is 0, or what the comment names."""
        forget_strategies("page")
        text, _, comment = command.text.partition("  #")
        codes = {0, *map(int, re.findall(r"exit code (\d+)", comment))}
        for words in programs(text):
            assert kind_of(words), f"{command.place}: what program is '{words[0]}'? say so in OTHERS"
            try:
                if words[0] == "robustkit":
                    self.robustkit(words[1:], codes)
                else:
                    self.provide(" ".join(words))
                    other(words)
            except BaseException as error:
                error.add_note(f"{command.place}: {command.text}")
                raise

    def robustkit(self, words: list[str], codes: set[int]) -> None:
        if reason(words) or (is_slow(words) and not self.patient):
            if words[0] in COMMANDS:
                parse(words)
            return
        self.provide(" ".join(words))
        words = [each for word in words for each in (sorted(glob.glob(word)) if "*" in word else [word])]
        if words[0] in ("audit", "doctor"):
            codes = codes | {1}  # what they look at here is not all in order; they say so, and that is their work
        self.capsys.readouterr()
        code = main(light(words))
        out, err = self.capsys.readouterr()
        assert code in codes, f"exit code {code}: {err}"
        assert out.strip() or err.strip(), "nothing is said"
        assert "Traceback" not in out + err, err

    def provide(self, text: str) -> None:
        """The runs that a text names, where they are not there yet and it does not make them."""
        for name in re.findall(r"\bruns/[\w.-]+\*?", re.sub(r"\bout[= ]\S+", "", text)):
            for run in [f"{name[:-1]}{number}" for number in (1, 2)] if name.endswith("*") else [name]:
                if Path(run).exists():
                    continue
                how = made_by(run)
                kept = self.things / "runs" / re.sub(r"\W+", "-", how.partition(" --out")[0])
                if not kept.exists():
                    self.perform(Command(f"made for {name}", how))
                    shutil.copytree(run, kept)
                else:
                    shutil.copytree(kept, run)

    def execute(self, block: Block, namespace: dict[str, Any]) -> None:
        """A block of Python. Where it says that it raises an error, it does."""
        text = block.text
        if re.search(r"\b(run|make_sweep)\(", text):
            text = re.sub(r"recipes/[\w/]+\.py(:[\w.-]+)?", lambda match: in_tiny(match[0]), text)
        self.provide(text)
        code = compile("\n" * block.line + text, block.place, "exec")
        if raised := re.search(r"#.*\braises (\w+)", text):
            with pytest.raises(ERRORS[raised[1]]):
                exec(code, namespace)
        else:
            exec(code, namespace)
        assert ("print(" not in text) or self.capsys.readouterr().out


def programs(text: str) -> list[list[str]]:
    """The programs that a line starts, in words, without what the shell does for them."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    skipped = False
    for word in lexer:
        if word in ("&&", "&", ";"):
            found.append([])
        elif word == ">" or skipped:
            skipped = word == ">"
        elif found[-1] or not re.match(r"[A-Z_]+=", word):
            found[-1].append(replaced(word))
    return [words for words in found if words]


def replaced(word: str) -> str:
    """With what a reader puts in place of a word in capitals."""
    name, slash, rest = word.partition("/")
    return NAMES.get(name, name) + slash + rest


def kind_of(words: list[str]) -> str:
    """How a program that pages call begins; "" for one that is not known."""
    text = " ".join(words)
    return next(
        (known for known in ("robustkit", *OTHERS) if text == known or text.startswith((f"{known} ", f"{known}/"))), ""
    )


def reason(words: list[str]) -> str:
    """Why the command is read and not run; "" for those that are run."""
    return next((why for pattern, why in PARSED.items() if re.search(pattern, " ".join(words))), "")


def is_slow(words: list[str]) -> bool:
    return any(re.search(pattern, " ".join(words)) for pattern in SLOW)


def parse(words: list[str]) -> argparse.Namespace:
    """By the command's own parser."""
    command = COMMANDS[words[0]]
    parser = Parser(prog=f"robustkit {words[0]}", description="", examples="")
    command.add_arguments(parser)
    return parser.parse(words[1:])


def other(words: list[str]) -> None:
    """Another program's command: see OTHERS."""
    match kind_of(words):
        case "find" | "rm":
            assert not any(word.startswith(("/", "~", "..")) for word in words)
            subprocess.run(words, check=True)
        case "torchrun" | "accelerate launch":
            assert words[words.index("-m") + 1] == "robustkit"
            parse(words[words.index("robustkit") + 1 :])
        case "pip install":
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            for word in words[2:]:
                name, _, extras = word.rstrip("]").partition("[")
                if name in (".", "robustkit"):
                    assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"])
                elif name.startswith("."):
                    assert (ROOT / name).is_dir()
        case "pytest":
            options = re.sub(r"-\w+ \w+|--\w+ \w+", "", " ".join(words[1:]))
            assert all(Path(path).exists() for path in options.split())
        case "python tests/benchmarks":
            source = Path(words[1]).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in words if word.startswith("--"))


# The tests


def test_every_recipe_has_a_tiny_form() -> None:
    """So that a page may train any of them."""
    for path in sorted((ROOT / "recipes").rglob("*.py")):
        for recipe in load_recipes(path).values():
            assert tiny(recipe).epochs == 1


LONG = [page for page in PAGES if any(words[0] == "robustkit" and is_slow(words[1:]) for words in started(page))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_says_can_be_done(
    page: Path, things: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work_through(page, Reader(things, capsys, patient=False), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG, ids=name_of)
def test_what_a_page_says_can_be_done_with_patience(
    page: Path, things: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work_through(page, Reader(things, capsys, patient=True), monkeypatch)


def work_through(page: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order; the Python blocks share their names."""
    for plugin in plugins_of(page):
        pytest.importorskip(plugin)
    name, module = name_of(page), ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    exec(PREAMBLES.get(name, ""), module.__dict__)
    files = iter(FILES.get(name, ()))
    for block in blocks(page):
        if block.language == "python" and (file := next(files, None)):
            Path(file).write_text(block.text, encoding="utf-8")
        if block.language == "console":
            for command in commands(block):
                reader.perform(command)
        elif block.language == "python" and not name.startswith(tuple(ELSEWHERE)):
            reader.execute(block, module.__dict__)
    forget_strategies("page")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_within_sentences_are_read(page: Path) -> None:
    """Of one with arguments, all is; of one that is named with options alone, the options."""
    for place, text in spans(page):
        words = [word for word in shlex.split(text)[1:] if word != "--help"]
        assert words[0] in COMMANDS, f"{place}: {text}"
        try:
            if any(not word.startswith("-") for word in words[1:]):
                parse(words)
            for word in words[1:]:
                if word.startswith("-"):
                    parser = Parser(prog="", description="", examples="")
                    COMMANDS[words[0]].add_arguments(parser)
                    assert word in parser._option_string_actions, f"{place}: {text}"
        except SystemExit as error:
            raise AssertionError(f"{place}: {text}") from error


def test_few_commands_are_not_run() -> None:
    """So that the list of exceptions cannot grow unnoticed."""
    counts: Counter[str] = Counter()
    reasons = set()
    for page in PAGES:
        for words in started(page):
            if words[0] != "robustkit":
                counts["other programs"] += 1
            elif why := reason(words[1:]):
                counts["read"] += 1
                reasons.add(why)
            elif is_slow(words[1:]):
                counts["slow"] += 1
            else:
                counts["light" if is_heavy(words[1:]) else "as it stands"] += 1
    ours = counts.total() - counts["other programs"]
    assert ours >= 150, counts
    assert reasons == set(filter(None, PARSED.values()))
    assert counts["read"] <= 0.08 * ours and counts["slow"] <= 0.08 * ours, counts
    assert counts["as it stands"] >= counts["light"], counts
