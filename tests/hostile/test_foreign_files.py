"""Whatever stands where a file of ours should: refused in one line, at once, and nothing in it is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import THINGS, Bomb, in_time, mark_of, put

from robustkit import load
from robustkit.cli.main import main
from robustkit.core import checkpoint
from robustkit.core.errors import CheckpointError, DataError, RecipeError, SpecError, UserError
from robustkit.core.model import Model
from robustkit.core.recipe import Recipe, load_recipe
from robustkit.core.spec import digest, to_json
from robustkit.data.stored import Stored
from robustkit.datasets import SVHN, Cifar10, Cifar100
from robustkit.datasets.image_folder import decode
from robustkit.datasets.npz import read_npz
from robustkit.evaluation.ledger import Ledger
from robustkit.export import export
from robustkit.folder import noted, read_metrics, read_outcomes, read_results
from robustkit.helper import Helper
from robustkit.opening import load_parts, make_world, recipe_of, restore
from robustkit.reporting.curves import stored
from robustkit.runs import resume

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "recipe": ("recipe.json", load_recipe),
    "results": ("results.json", lambda path: read_results(path.parent)),
    "outcomes": ("outcomes.json", lambda path: read_outcomes(path.parent)),
    "metrics": ("metrics.jsonl", lambda path: read_metrics(path.parent)),
    "environment": ("environment.json", lambda path: noted(path.parent, "path")),
    "curves": ("curves.json", stored),
    "ledger": ("judged.0.jsonl", lambda path: Ledger(path.parent, "judged").read()),
    "checkpoint": ("last.safetensors", checkpoint.read),
    "facts": ("last.safetensors", checkpoint.facts_of),
    "exported model": ("model.safetensors", lambda path: load(path.parent)),
    "npz": ("made.npz", read_npz),
    "stored images": ("made.npy", lambda path: Stored(path, torch.zeros(2, dtype=torch.int64))),
    "picture": ("photo.png", decode),
}
"""What is read -> (name of the file, what reads it)."""

FORGIVING = {"environment": None, "curves": {}, "ledger": {}, "metrics": [], "results": {}, "outcomes": {}}
"""What is read where nothing of ours is there: facts to be told, measures that will be made anew."""


@pytest.mark.parametrize("reader", READERS)
def test_readers(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    for number, thing in enumerate(THINGS):
        if thing == "7 MiB of JSON" and reader not in ("recipe", "ledger"):
            continue  # it takes a second
        folder = tmp_path / str(number)
        folder.mkdir()
        path = put(thing, folder / name)
        try:
            with in_time():
                found = read(path)
        except UserError as error:
            said = str(error)
            assert "\n" not in said and str(folder) in said and "root:" not in said, (thing, said)
        else:
            told = "7 MiB of JSON", "numbers for objects", "NaN", "halves of characters"  # objects, if of nobody's
            assert reader in FORGIVING and (not found or thing in told), (thing, found)
        assert not mark_of(path).exists(), thing
        shutil.rmtree(folder)


COMMANDS = {
    "show": ("recipe.json", ["show", "RUN"]),
    "compare": ("results.json", ["compare", "RUN", "OTHER"]),
    "outcomes": ("outcomes.json", ["compare", "RUN", "OTHER"]),
    "predict": ("checkpoints/last.safetensors", ["predict", "RUN", "PICTURE", "--device", "cpu"]),
    "export": ("environment.json", ["export", "RUN", "--to", "safetensors"]),
    "resume": ("recipe.json", ["resume", "RUN", "--device", "cpu"]),
    "resume a checkpoint": ("checkpoints/last.safetensors", ["resume", "RUN", "--device", "cpu"]),
    "eval": ("checkpoints/last.safetensors", ["eval", "RUN", "--device", "cpu"]),
    "audit": ("checkpoints/last.safetensors", ["audit", "RUN", "--device", "cpu"]),
    "report": ("checkpoints/last.safetensors", ["report", "RUN", "--figure", "strength", "--device", "cpu"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, finished: Path, spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From end to end: exit code 2, one line on standard error, nothing on standard output."""
    name, words = COMMANDS[command]
    places = {"RUN": str(spoilt), "OTHER": str(finished), "PICTURE": "photo.png"}
    (spoilt / "checkpoints" / "last.previous.safetensors").unlink()  # else `resume` goes on from there
    for thing in ("pickle", "pipe", "link to /dev/zero", "deep JSON", "folder", "0 bytes"):
        if (spoilt / name).is_dir():
            shutil.rmtree(spoilt / name)
        put(thing, spoilt / name)
        with in_time():
            code = main([places.get(word, word) for word in words])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "") and err.startswith("error: ") and len(err.splitlines()) == 1, (thing, err)
        assert not mark_of(spoilt / name).exists()


# Checkpoints that are well formed, and lie


def rewritten(folder: Path, **changes: Any) -> Path:
    """The run's checkpoint with other facts, and right checksums."""
    path = folder / "checkpoints" / "last.safetensors"
    tensors, facts = checkpoint.read(path)
    checkpoint.write(path, tensors, facts | changes)
    return path


LIES: dict[str, dict[str, Any]] = {
    "step": {"step": "7"},
    "no step": {"step": -1},
    "step that is true": {"step": True},
    "best": {"best": {"epoch": "x" * 100, "score": [1, 1]}},
    "score": {"best": {"score": 3}},
    "metrics": {"metrics": None},
    "recipe": {"recipe": [], "digest": 3},
}


@pytest.mark.parametrize("lie", LIES)
def test_facts_of_other_types(lie: str, spoilt: Path) -> None:
    rewritten(spoilt, **LIES[lie])
    with in_time(), pytest.raises(CheckpointError, match=r"last\.safetensors: ") as error:
        resume(spoilt, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "lie",
    [
        {"classes": []},
        {"classes": ["a", "a", "b", "c"]},
        {"classes": [1, 2, 3, 4]},
        {"classes": "abcd"},
        {"classes": [str(number) for number in range(1_000_000)]},  # 300 million weights of a head
        {"image_shape": [3, 8]},
        {"image_shape": [3, -8, -8]},
        {"image_shape": [3, 1 << 40, 1 << 40]},
        {"image_shape": [3, 30_000, 30_000]},
        {"image_shape": "388"},
        {"recipe": {"model": {"backbone": "vit_giant_patch14_224"}, "head": {"name": "linear"}}},  # 1.8 billion
        {"recipe": {"model": {"backbone": "hf-hub:somebody/else"}, "head": {"name": "linear"}}},
        {"recipe": {"model": {"backbone": "no such network"}, "head": {"name": "linear"}}},
        {"recipe": {"model": [], "head": []}},
    ],
    ids=lambda lie: str(lie)[:60],
)
def test_models_that_do_not_fit_their_weights(lie: dict[str, Any], spoilt: Path) -> None:
    rewritten(spoilt, **lie)
    with in_time(), pytest.raises(UserError) as error:
        load(spoilt)
    assert "\n" not in str(error.value)


def test_facts_are_under_a_checksum(spoilt: Path) -> None:
    """Every digit of the header counts, not only the weights."""
    path = spoilt / "checkpoints" / "last.safetensors"
    whole = path.read_bytes()
    step = checkpoint.facts_of(path)["step"]
    old, new = f'\\"step\\": {step}'.encode(), f'\\"step\\": {step - 1}'.encode()
    assert whole.count(old) == 1 and len(old) == len(new)
    path.write_bytes(whole.replace(old, new))
    for read in (checkpoint.read, checkpoint.facts_of):
        with pytest.raises(CheckpointError, match="facts do not match"):
            read(path)


def test_another_recipe_is_refused_on_resume(spoilt: Path) -> None:
    data = json.loads((spoilt / "recipe.json").read_text())
    data["seed"] += 1
    (spoilt / "recipe.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"belongs to another recipe \(seed=1 there, 2 here\)"):
        resume(spoilt, device="cpu")


# Who executes a stranger's recipe.py


@pytest.fixture
def strange(spoilt: Path) -> tuple[Path, Path]:
    """A run whose recipe.py leaves a mark, and the mark."""
    mark = spoilt.with_name("executed")
    (spoilt / "recipe.py").write_text(f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\n")
    return spoilt, mark


def test_recipes_are_not_executed_where_all_their_parts_are_known(
    strange: tuple[Path, Path], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, mark = strange
    load(folder)
    recipe_of(folder)
    resume(folder, device="cpu")
    for words in (["show"], ["compare", str(finished)], ["export", "--to", "safetensors"], ["eval", "--device", "cpu"]):
        assert main([words[0], str(folder), *words[1:]]) == 0
    capsys.readouterr()
    assert not mark.exists()


def unknown(folder: Path) -> None:
    """recipe.json and the checkpoint name a head that nobody knows."""
    data = json.loads((folder / "recipe.json").read_text())
    data["head"] = {"name": "of-a-stranger"}
    (folder / "recipe.json").write_text(json.dumps(data))
    rewritten(folder, recipe=data)


def test_what_never_executes_a_recipe(strange: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Showing, a file's recipe.json, exported folders, helpers: not even where a part is unknown."""
    folder, mark = strange
    out = export(folder, "safetensors").folder
    unknown(folder)
    for words in (["show", str(folder)], ["show", str(folder / "recipe.json")], ["show", str(folder), "--json"]):
        assert main(words) == 2 and "unknown head 'of-a-stranger'" in capsys.readouterr().err
    world = load_parts(load_recipe_of_before(folder), make_world(load_recipe_of_before(folder), "cpu")).world
    with pytest.raises(UserError, match="of-a-stranger"):
        Helper(run=str(folder), checkpoint="last").network(world)
    shutil.copy(folder / "recipe.py", out / "recipe.py")
    tensors, facts = checkpoint.read(out / "model.safetensors")
    facts["recipe"]["head"] = {"name": "of-a-stranger"}
    checkpoint.write(out / "model.safetensors", tensors, facts)
    with pytest.raises(UserError, match="of-a-stranger"):
        load(out)
    assert not mark.exists()


def load_recipe_of_before(folder: Path) -> Recipe:
    """The run's recipe with a head that is known."""
    data = json.loads((folder / "recipe.json").read_text())
    data["head"] = {"name": "linear"}
    (folder / "before.json").write_text(json.dumps(data))
    return load_recipe(folder / "before.json")


def test_a_part_that_nobody_knows_is_looked_for_in_recipe_py(strange: tuple[Path, Path]) -> None:
    """This is when it is executed; without the file, nothing is."""
    folder, mark = strange
    unknown(folder)
    for read in (load, recipe_of):
        with pytest.raises(UserError, match="of-a-stranger"):
            read(folder)
        assert mark.exists()
        mark.rmdir()
    (folder / "recipe.py").unlink()
    for read in (load, recipe_of):
        with pytest.raises(UserError, match="of-a-stranger"):
            read(folder)


def test_a_network_s_name_cannot_write_code(spoilt: Path, tmp_path: Path, recipe: Recipe) -> None:
    """timm takes any tag after a dot; export writes the name into a Python file."""
    name = 'convnet_small.x\nimport os\nos.mkdir("executed")  #'
    with pytest.raises(SpecError, match="timm knows no model"):
        Model(backbone=name).build(recipe.head, 4, (3, 8, 8), 0)
    data = to_json(recipe) | {"model": to_json(recipe.model) | {"backbone": name}}
    (spoilt / "recipe.json").write_text(json.dumps(data))
    rewritten(spoilt, recipe=data, digest=digest(load_recipe(spoilt / "recipe.json")))
    with pytest.raises(UserError, match="timm knows no model"):
        export(spoilt, "robustbench", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Files that are written


@pytest.mark.parametrize("name", ["results.json", "checkpoints/last.safetensors", "checkpoints/last.json"])
def test_links_are_not_written_through(spoilt: Path, tmp_path: Path, name: str) -> None:
    """A stranger's run brings links where half-written files would be, to files of ours."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (spoilt / f"{name}.partial").symlink_to(victim)
    rewritten(spoilt)
    checkpoint.write_text(spoilt / "results.json", "{}")
    assert victim.read_text() == "mine" and not (spoilt / f"{name}.partial").is_symlink()


# Published data


def test_published_files_are_checked_before_they_are_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for dataset, folder, names in (
        (Cifar10, "cifar-10-batches-py", [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"]),
        (Cifar100, "cifar-100-python", ["train", "test", "meta"]),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(pickle.dumps(Bomb(mark)))
        for download in (False, True):  # what is there is never fetched anew
            with pytest.raises(DataError, match="is damaged"):
                dataset(root=str(tmp_path), download=download).load()
    for name in ("train_32x32.mat", "test_32x32.mat"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(DataError, match="is damaged"):
        SVHN(root=str(tmp_path), download=False).load()
    assert not mark.exists()


@pytest.mark.parametrize("thing", ["pipe", "link to /dev/zero", "link to itself", "4 TB, sparse", "folder"])
def test_published_files_that_are_none(thing: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    put(thing, folder / "data_batch_1")
    with in_time(), pytest.raises(DataError, match=r"is damaged|is larger than"):
        Cifar10(root=str(tmp_path), download=False).load()


def test_where_data_lie(tmp_path: Path) -> None:
    for root in ("\0", "a\0b"):
        with pytest.raises(DataError, match="no folder can be called so"):
            Cifar10(root=root, download=False).load()
    with pytest.raises(RecipeError):
        load_recipe(put("link to /etc/passwd", tmp_path / "recipe.json"))
    assert os.path.exists("/etc/passwd")


# Results that are JSON, and no results


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {},
        {"accuracy": "0.5", "n": 4, "ci95": [0, 1], "seconds": 1},
        {"accuracy": 0.5, "n": 4.0, "ci95": [0, 1], "seconds": 1},
        {"accuracy": 0.5, "n": -4, "ci95": [0, 1], "seconds": 1},
        {"accuracy": 50, "n": 4, "ci95": [0, 1], "seconds": 1},
        {"accuracy": 0.5, "n": 4, "ci95": [0, 1, 2], "seconds": 1},
        {"accuracy": 0.5, "n": 4, "ci95": 3, "seconds": 1},
        {"accuracy": 0.5, "n": 4, "ci95": [0, 1], "seconds": "long"},
        {"accuracy": 0.5, "n": 4, "ci95": [0, 1]},
        {"accuracy": 0.5, "n": 4, "ci95": [0, 1], "seconds": 1, "breakdown": [1]},
        {"accuracy": 0.5, "n": 4, "ci95": [0, 1], "seconds": 1, "shares": {"a": {"b": None}}},
        {"accuracy": 0.5, "n": 4, "ci95": [0, 1], "seconds": 1, "notes": 3},
        {"accuracy": True, "n": 4, "ci95": [0, 1], "seconds": 1},
    ],
    ids=str,
)
def test_results_of_other_types(entry: Any, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"last": {"clean": entry}}))
    with pytest.raises(UserError, match="holds no result at 'last', 'clean'"):
        read_results(tmp_path)


def test_outcomes_and_metrics_of_other_types(tmp_path: Path) -> None:
    for entry in (3, {}, {"images": "a", "right": "01x"}, {"images": 3, "right": "01"}, {"images": "a", "right": 1}):
        (tmp_path / "outcomes.json").write_text(json.dumps({"last": {"clean": entry}}))
        with pytest.raises(UserError, match="holds no outcomes at 'last', 'clean'"):
            read_outcomes(tmp_path)
    for line in ("3", "{}", '{"epoch": 1, "train": {"objective": "x"}}', '{"epoch": 1, "radii": []}'):
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl:1: is no report of an epoch"):
            read_metrics(tmp_path)


def test_what_is_read_is_what_was_written(finished: Path) -> None:
    """The checks let our own files pass."""
    for name, read in (("results.json", read_results), ("outcomes.json", read_outcomes)):
        data = read(finished)
        assert data == json.loads((finished / name).read_text()) and data["last"]["clean"]
    assert [report["epoch"] for report in read_metrics(finished)] == [1]
    recipe = recipe_of(finished)
    parts = load_parts(recipe, make_world(recipe, "cpu"))
    assert restore(parts, finished / "checkpoints" / "last.safetensors")["step"] == parts.step
