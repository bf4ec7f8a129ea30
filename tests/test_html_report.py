"""The page about runs: what folders hold is there, escaped, readable everywhere, and nothing else is needed or done."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from browser import CHROMIUM, DRIVER, Browser, chromium

from robustkit import Model, Recipe, Suite, Validation, evolve, run
from robustkit.attacks import PGD
from robustkit.cli.main import main
from robustkit.core.recipe import save_recipe
from robustkit.datasets import Digits
from robustkit.epsilons import ECAS, Fixed
from robustkit.evaluation import Attacked, Clean
from robustkit.evaluation.audit import Audit
from robustkit.evaluation.findings import Finding
from robustkit.losses import CrossEntropy
from robustkit.reporting.report import SECTIONS, charts, page, read_runs, to_data
from robustkit.reporting.report.charts import Line, line_chart
from robustkit.reporting.report.html import Html, joined, table, tag
from robustkit.reporting.report.shapes import Each, Maybe, amount, count, fits, number, share
from robustkit.schedules import Constant
from robustkit.threats import Linf

EPSILON = 0.15
ROBUST = Recipe(
    data=Digits(),
    model=Model(backbone="convnet_small"),
    threat=Linf(epsilon=EPSILON),
    epsilon=ECAS(values=(0.05, EPSILON), big=1, h_low=1.8, h_high=2.2),
    attack=PGD(steps=1),
    loss=CrossEntropy(),
    schedule=Constant(),
    epochs=2,
    batch_size=64,
    validation=Validation(images=64, train_images=64, attack=PGD(steps=1)),
    evaluation=(Suite(measures=(Clean(), Attacked(key="pgd-3", steps=3)), images=100),),
)
RECIPE = evolve(ROBUST, control=evolve(ROBUST, attack=None, epsilon=Fixed(), epochs=1))
AUDIT = {
    "verdict": "suspicious",
    "images": 100,
    "right": 90,
    "findings": [
        {"check": "steps", "verdict": "ok", "evidence": "none", "remedy": ""},
        {"check": "restarts", "verdict": "warning", "evidence": "5 starts break 9 more", "remedy": "use AutoAttack"},
    ],
}
EVIL = '<script>alert("1")</script>&amp;\'"><img src=x onerror=alert(2)>$\\bad$ font-family: #000000'


class Page(HTMLParser):
    """A page taken apart: every element with its attributes and text; complains of what is not closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[dict[str, Any]] = []
        self.elements: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [parent["tag"] for parent in self.open]}
        assert len(attrs) == len(element["attrs"])
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [element for element in self.elements if element["tag"] == tag]

    @property
    def text(self) -> str:
        return str(self.all("body")[0]["text"])

    def tables(self) -> dict[str, list[list[str]]]:
        """{caption: rows of cells' texts}, the headings first."""
        found: dict[str, list[list[str]]] = {}
        for element in self.elements:
            if element["tag"] == "caption":
                rows = found.setdefault(element["text"], [])
            elif element["tag"] == "tr":
                rows.append([])
            elif element["tag"] in ("th", "td"):
                rows[-1].append(element["text"])
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all that a run may have, for reading."""
    folder = tmp_path_factory.mktemp("made") / "one"
    recipe = folder.parent / "one.json"
    save_recipe(RECIPE, recipe)
    assert main(["run", str(recipe), "--out", str(folder), "--device", "cpu", "--quiet"]) == 0
    assert (folder / "report.html").is_file()  # made automatically
    words = ["--curves", "epsilon,classes", "--limit", "40", "--device", "cpu", "--quiet"]
    assert main(["eval", str(folder), *words]) == 0
    (folder / "audit.json").write_text(json.dumps({"last": AUDIT}))
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """The same, of one's own."""
    return Path(shutil.copytree(made, tmp_path / "one"))


@pytest.fixture(scope="module")
def single(made: Path) -> Page:
    return Page(page(read_runs([str(made)])))


@pytest.fixture(scope="module")
def double(made: Path) -> Page:
    return Page(page(read_runs([str(made), str(made / "control")])))


def of(*folders: Path) -> Page:
    return Page(page(read_runs([str(folder) for folder in folders])))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def said(entry: dict[str, Any]) -> str:
    low, high = entry["ci95"]
    return f"{100 * entry['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


# What is there


def test_sections_in_order(single: Page, double: Page) -> None:
    for found in (single, double):
        assert [e["text"] for e in found.all("h2")] == [section.title for section in SECTIONS]
        ids = [element["attrs"]["id"] for element in found.all("section")]
        assert [element["attrs"]["href"] for element in found.all("a")] == [f"#{name}" for name in ids]


def test_all_results_are_in_the_table(single: Page, made: Path) -> None:
    headings, *rows = single.tables()["Accuracy in % with its 95 % interval"]
    assert headings[:2] == ["Measure", "Test images"] and [row[0] for row in rows] == ["clean", "pgd-3"]
    folders = {"run": made, "control": made / "control"}
    seen = 0
    for place, heading in enumerate(headings[2:], start=2):
        model, _, checkpoint = heading.partition(", ")
        results = read(folders[model] / "results.json")
        for row in rows:
            entry = results["last" if checkpoint == "last = best" else checkpoint][row[0]]
            assert (row[place], row[1]) == (said(entry), "100")
            seen += 1
    assert seen >= 4
    (_, *rows) = single.tables()["Seconds by measure"]
    for row in rows:
        model, checkpoint, key = row[0].rsplit(", ", 2)
        entry = read(folders["control" if "control" in model else "run"] / "results.json")[checkpoint[:4]][key]
        assert row[1:] == ["100", f"{entry['seconds']:.1f}", entry["path"]]


def test_all_epochs_are_in_a_table_and_in_a_chart(single: Page, made: Path) -> None:
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    headings, *rows = single.tables()["Epochs"]
    assert len(rows) == len(lines) == 2
    tips = {element["text"] for element in single.all("title")}
    for row, line in zip(rows, lines, strict=True):
        cells = dict(zip(headings, row, strict=True))
        assert cells["Epoch"] == f"{line['epoch']}"
        for part, label in (("validation", "held out"), ("training", "training")):
            for kind, value in line[part].items():
                assert cells[f"{kind}, {label} %"] == f"{100 * value:.1f}"
                if kind in ("natural", "robust"):
                    assert f"epoch {line['epoch']}: {kind}, {label} {100 * value:.1f} %" in tips
        assert cells["objective"] == f"{line['train']['objective']:.4f}"


def test_radii_by_epoch(single: Page, made: Path) -> None:
    """Shares that were counted in another way."""
    headings, *rows = single.tables()["Share of the images by radius, %"]
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    for row, line in zip(rows, lines, strict=True):
        counts, unit = line["radii"]["counts"], line["radii"]["unit"]
        expected = {f"{255 * unit * n:.3g}/255": 100 * k / sum(counts) for n, k in enumerate(counts) if k}
        found = dict(zip(headings[2:], map(float, row[2:]), strict=True))
        assert {name: value for name, value in found.items() if value} == pytest.approx(
            {name: value for name, value in expected.items() if round(value, 1)}, abs=0.051
        )
        assert row[1] == f"{255 * line['train']['epsilon']:.3g}/255"


def test_curves_and_classes(single: Page, made: Path) -> None:
    curves = read(made / "curves.json")
    found = curves["epsilon"]
    headings, *rows = single.tables()["Accuracy by radius, pgd-20, 40 images"]
    assert headings == ["Radius", "Accuracy % (95 %)"] and len(rows) == len(found["values"])
    for row, accuracy, ci95 in zip(rows, found["accuracies"], found["ci95"], strict=True):
        assert row[1] == said({"accuracy": accuracy, "ci95": ci95})
    headings, *rows = single.tables()["Accuracy by class, the least robust first"]
    assert headings == ["Class", "Images", "clean % (95 %)", "pgd-20 % (95 %)"]
    robust = {entry["name"]: entry for entry in curves["classes"]["pgd-20"]}
    clean = {entry["name"]: entry for entry in curves["classes"]["clean"]}
    for name, n, *cells in rows:
        expected = [said(clean[name]), said(robust[name])] if robust[name]["n"] else ["no images"] * 2
        assert (n, cells) == (f"{robust[name]['n']}", expected)
    accuracies = [robust[row[0]]["accuracy"] for row in rows]
    assert accuracies == sorted(accuracies) and len(rows) == 10
    assert "robustkit eval" in single.text and "--curves steps,restarts" in single.text  # those are not there


def test_pictures_say_what_the_model_made_of_them(single: Page, made: Path) -> None:
    stored = read(made / "examples.json")
    (found,) = [rows for caption, rows in single.tables().items() if caption.startswith("Test images within")]
    assert found[0] == ["", *(f"true: {name}" for name in stored["true"])]
    assert [row[0] for row in found[1:]] == [row["label"] for row in stored["rows"]] and len(stored["true"]) == 6
    for cells, row in zip(found[1:], stored["rows"], strict=True):
        for cell, picture, true in zip(cells[1:], row["pictures"], stored["true"], strict=True):
            if "predicted" in picture:
                kind = "right" if picture["predicted"] == true else "wrong"
                assert cell == f"{kind}: {picture['predicted']}{100 * picture['probability']:.1f} %"
            else:
                assert cell == ""
    pictures = [element["attrs"] for element in single.all("img")]
    assert len(pictures) == 24 and all(picture["alt"] for picture in pictures)
    assert sum(picture["probability"] for picture in stored["rows"][0]["pictures"]) > sum(
        picture["probability"] for picture in stored["rows"][2]["pictures"]
    )


def test_pictures_of_an_older_run(own: Path) -> None:
    (own / "examples.json").unlink()
    (picture,) = of(own).all("img")
    assert picture["attrs"]["src"].startswith("data:image/png;base64,") and picture["attrs"]["alt"]


def test_verdict(single: Page, made: Path) -> None:
    results, control = read(made / "results.json")["last"], read(made / "control" / "results.json")["last"]
    (verdict,) = [e["text"] for e in single.all("p") if e["attrs"].get("class") == "verdict"]
    for entry in (results["clean"], results["pgd-3"], control["pgd-3"]):
        assert f"{100 * entry['accuracy']:.1f} %" in verdict
    assert "PGD-3 within L-infinity 0.15" in verdict and "suspicious" in verdict and verdict.count(".") < 12
    assert "5 starts break 9 more. Remedy: use AutoAttack." in single.text and "No AutoAttack" in single.text
    assert "Preflight" in single.text


def test_composition_has_every_setting(single: Page) -> None:
    (rows,) = [rows for caption, rows in single.tables().items() if caption.startswith("All settings of recipe")]
    names = [row[0] for row in rows[1:]]
    assert {field.name for field in attrs.fields(Recipe)} <= set(names)
    cells = {row[0]: row[1] for row in rows[1:]}
    assert cells["h_low"] == "1.8" and cells["backbone"] == "convnet_small" and cells["epochs"] in ("1", "2")


def test_origin(single: Page, made: Path) -> None:
    cells = {row[0]: row[1] for row in single.tables()["Versions, device, data and command"][1:]}
    environment = read(made / "environment.json")
    assert cells["packages.torch"] == environment["packages"]["torch"] and cells["digest"] == environment["digest"]
    assert single.tables()["Seeds"][1:] == [["one", "1"], ["one, control", "1"]]
    assert f"robustkit run {made} --out {made}-again" in single.text


# Several runs


def test_two_runs_side_by_side(double: Page, made: Path) -> None:
    headings, *rows = double.tables()["Accuracy in % with its 95 % interval"]
    assert any("control" in heading for heading in headings[2:])
    outcomes = [read(folder / "outcomes.json")["last"] for folder in (made, made / "control")]
    (_, *rows) = double.tables()["Differences"]
    found = {tuple(row[0].rsplit(", ", 2)[1:]): row[1:] for row in rows}
    for key in ("clean", "pgd-3"):
        first, second = (entry[key]["right"] for entry in outcomes)
        alone = [sum(pair == wanted for pair in zip(first, second, strict=True)) for wanted in (("1", "0"), ("0", "1"))]
        points = 100 * (alone[0] - alone[1]) / len(first)
        few, n = min(alone), sum(alone)
        p = min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)  # McNemar, exact
        cells = found[("last", key)]
        assert cells[0] == f"{points:+.1f}" and cells[2] == f"{alone[0]} : {alone[1]}"
        assert cells[3] == ("< 0.001" if p < 0.001 else f"{p:#.3g}")
        assert cells[4] == ("resolved" if p < 0.05 else "not resolved")
    settings = [row[0] for row in double.tables()["Settings that differ"][1:]]
    assert {"epochs", "attack", "epsilon"} <= set(settings) and "loss" not in settings and "seed" not in settings
    tips = {element["text"] for element in double.all("title")}
    assert any(tip.startswith("one, epoch 2: ") for tip in tips) or any("epoch 2: " in tip for tip in tips)


def test_seeds_are_taken_together(made: Path, tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(made, tmp_path / name)) for name in ("a", "b")]
    recipe = read(copies[1] / "recipe.json")
    (copies[1] / "recipe.json").write_text(json.dumps(recipe | {"seed": 2}))
    headings, *rows = of(*copies).tables()["Over seeds"]
    assert headings[1] == "Seeds" and {row[1] for row in rows} == {"2"}


# Anywhere, by anyone


def test_well_formed_and_accessible(single: Page, double: Page) -> None:
    for found in (single, double):
        ids = [element["attrs"]["id"] for element in found.elements if "id" in element["attrs"]]
        assert len(ids) == len(set(ids))
        for element in found.all("th"):
            assert element["attrs"].get("scope") in ("col", "row")
        for element in found.all("svg"):
            assert element["attrs"]["role"] == "img" and element["attrs"]["aria-label"]
        for element in found.all("table"):
            assert "div" in element["inside"]  # the box that scrolls
        assert all(element["attrs"].get("alt") for element in found.all("img"))
        assert len(found.all("caption")) == len(found.all("table"))
        assert len(found.all("h1")) == 1 and found.all("html")[0]["attrs"]["lang"] == "en"
        references = {e["attrs"]["href"][1:] for e in found.all("use")}
        assert references and references <= set(ids)


def test_needs_nothing_from_anywhere(single: Page, made: Path) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {e["tag"] for e in single.elements}
    for element in single.elements:
        for name, value in element["attrs"].items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:image/png;base64,")), value
    style = single.all("style")[0]["text"]
    assert "url(" not in style and "@import" not in style
    for wanted in ("prefers-color-scheme: dark", "@media print", "overflow-x: auto"):
        assert wanted in style
    policies = [e["attrs"] for e in single.all("meta") if e["attrs"].get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policies[0]["content"] and "script" not in policies[0]["content"]


def test_every_string_is_escaped(own: Path, tmp_path: Path) -> None:
    """Names as nasty as a folder's files may hold them are shown, not obeyed."""

    def soiled(data: Any, name: str = "") -> Any:
        if isinstance(data, dict):
            return {key: soiled(value, key) for key, value in data.items()}
        if isinstance(data, list):
            return [soiled(value, name) for value in data]
        kept = name in ("image", "images", "right", "along", "verdict", "norm", "git_commit")
        return EVIL if isinstance(data, str) and not kept else data

    for name in ("environment", "audit", "examples", "preflight", "curves"):
        path = own / f"{name}.json"
        path.write_text(json.dumps(soiled(read(path))))
    results = read(own / "results.json")
    results["last"][EVIL] = results["last"]["clean"] | {"notes": [EVIL], "breakdown": {EVIL: 0.5}}
    (own / "results.json").write_text(json.dumps(results))
    lines = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["train"][f"term {EVIL}"] = 1.0
        line["validation"][EVIL] = 0.5
    (own / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    nasty = own.rename(tmp_path / "a<b> &\"c'")
    found = of(nasty)
    assert {"script", "b"} & {element["tag"] for element in found.elements} == set()
    assert all(element["attrs"]["src"].startswith("data:") for element in found.all("img"))
    assert found.text.count(EVIL) > 30 and found.all("h1")[0]["text"] == nasty.name
    assert any(EVIL in element["text"] for element in found.all("title"))


def test_size(own: Path) -> None:
    """200 epochs of a loss of four terms stay far below 1.5 MB."""
    (line, *_) = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    line["train"] |= {f"term {name}": 1.0 for name in "abcd"}
    with (own / "metrics.jsonl").open("w") as file:
        for epoch in range(1, 201):
            counts = [(epoch * place) % 97 for place in range(len(line["radii"]["counts"]))]
            file.write(json.dumps(line | {"epoch": epoch, "radii": line["radii"] | {"counts": counts}}) + "\n")
    assert len(page(read_runs([str(own)])).encode()) < 1_000_000


# What is not there, or broken


def test_unfinished_is_said_loudly(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    run(RECIPE, out=folder, device="cpu", max_steps=30, preflight=False)
    shutil.copy(made / "results.json", folder / "results.json")
    alarms = [one for one in to_data(read_runs([str(folder)]))[0]["remarks"] if one["kind"] == "alarm"]
    assert [one["title"] for one in alarms] == ["Unfinished", "Provisional"]
    assert "step 30, after 1 of 2 epochs" in alarms[0]["text"] and alarms[0]["command"] == f"robustkit resume {folder}"
    found = of(folder)
    assert "Provisional, as training is not finished" in found.text
    for command in ("resume", "eval", "audit"):
        assert f"robustkit {command} {folder}" in found.text
    assert "No control" in found.text


def test_a_folder_with_its_recipe_alone(made: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(made / "recipe.json", tmp_path / "bare")
    found = of(tmp_path / "bare")
    assert "Nothing has been measured yet." in found.text and "Unfinished" in found.text
    assert [e["text"] for e in found.all("h2")] == [section.title for section in SECTIONS]
    lines = [e["text"] for e in found.all("p") if e["attrs"].get("class") == "missing"]
    assert len(lines) >= 6 and not found.all("img")


FILES = ("results", "outcomes", "audit", "curves", "examples", "preflight", "environment", "metrics")


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("line_chart", "share_map"):
        monkeypatch.setattr(charts, name, lambda *arguments, **options: Html(""))


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(own: Path, name: str, no_charts: None) -> None:
    """Cut off, empty, of another kind: the rest is shown, and the file is named. So with single values of any kind."""
    path = own / (f"{name}.json" if name != "metrics" else "metrics.jsonl")
    whole = path.read_bytes()
    for text in (whole[: len(whole) // 2], b"\xff\xfe", b"[" * 100_000, b'"text"', b"[3]"):
        path.write_bytes(text)
        faults = " ".join(read_runs([str(own)])[0].faults)
        assert path.name in faults or (name == "environment" and text in (b'"text"', b"[3]")), text[:9]
        assert of(own).all("h2")
    random_numbers = random.Random(name)
    line = whole.splitlines()[-1] if name == "metrics" else whole
    for _ in range(6):
        data = json.loads(line)
        spoil(data, random_numbers)
        path.write_text(json.dumps(data) + "\n")
        of(own)


def spoil(data: Any, draw: random.Random) -> None:
    """Puts something else in a random place."""
    while True:
        keys = list(data) if isinstance(data, dict) else range(len(data))
        key = draw.choice(keys)
        if isinstance(data[key], (dict, list)) and data[key] and draw.random() < 0.8:
            data = data[key]
            continue
        data[key] = draw.choice([None, -1, 0, 1e90, 10**400, True, "x", "", [], {}, [None], {"a": 1}, float("nan")])
        return


def test_damaged_checkpoint_control_and_picture(own: Path, no_charts: None) -> None:
    (own / "checkpoints" / "last.safetensors").write_bytes(b"no")
    (own / "control" / "recipe.json").write_text("{")
    (own / "examples.json").unlink()
    (own / "figures" / "examples.png").write_bytes(b"<svg onload=alert(1)>")
    (stored,) = read_runs([str(own)])
    assert len(stored.faults) == 3 and stored.control is None and stored.picture is None
    assert "how far training is, is not known" in of(own).text


def test_extreme_numbers_can_be_drawn() -> None:
    points = [(1.0, 9e99), (2.0, -9e99), (3.0, 0.0)]
    found = Page(line_chart("t", [Line(EVIL, points, ["a", EVIL, "c"], "#D55E00")], x="x", y="y"))
    assert [element["text"] for element in found.all("title")] == ["a", EVIL, "c"]
    alone = Page(line_chart("t", [Line("one", [(1, 0.5)], ["tip"], "#D55E00")], x="x", y="y", whole=True))
    assert alone.all("title")[0]["text"] == "tip"


def test_collapse_and_audits_are_alarms(own: Path) -> None:
    lines = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    lines[1]["collapse"] = {"epoch": 1, "robust": 0.5, "fgsm": 0.6}
    (own / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fraud = AUDIT | {"verdict": "false robustness"}
    good = AUDIT | {"verdict": "trustworthy", "findings": AUDIT["findings"][:1]}
    (own / "audit.json").write_text(json.dumps({"last": fraud, "best": good}))
    ((data),) = to_data(read_runs([str(own)]))
    kinds = {one["title"]: one["kind"] for one in data["remarks"]}
    assert kinds["Collapse"] == kinds["Audit of last"] == "alarm" and kinds["Audit of best"] == "good"
    assert "false robustness" in data["verdict"]


# Where settings come from


def test_differences_from_the_shipped_recipe(own: Path, no_charts: None) -> None:
    environment = read(own / "environment.json")
    for source in ("/elsewhere/recipes/quickstart.py", "quickstart.py"):
        (own / "environment.json").write_text(json.dumps(environment | {"source": source}))
        rows = of(own).tables()["Settings that differ from recipes/quickstart.py"]
        cells = {row[0]: row[1:] for row in rows}
        assert cells["epochs"] == ["2", "18"] and cells["target"] == ["none", "momentum"] and "seed" not in cells


def test_files_that_a_run_names_are_not_executed(own: Path, tmp_path: Path, no_charts: None) -> None:
    evil = tmp_path / "recipes" / "evil.py"
    evil.parent.mkdir()
    evil.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    environment = read(own / "environment.json")
    for source in (str(evil), f"{evil}:name", f"recipes/../..{evil}", 3):
        (own / "environment.json").write_text(json.dumps(environment | {"source": source}))
        assert "these settings are not the defaults" in of(own).text
    assert not (tmp_path / "executed").exists()


# The command


def test_command(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Only the page is written, the same each time, and no network is asked."""
    call = torch.nn.Module.__call__

    def refuse(module: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        assert all(argument.is_meta for argument in arguments), "a network was asked"  # counting parameters asks none
        return call(module, *arguments, **options)

    held = {path: path.read_bytes() for path in own.rglob("*") if path.is_file() and path.suffix != ".html"}
    monkeypatch.setattr(torch.nn.Module, "__call__", refuse)
    assert main(["report", str(own)]) == 0
    assert capsys.readouterr().out == f"{own / 'report.html'}\n"
    first = (own / "report.html").read_bytes()
    assert main(["report", str(own), "--out", str(tmp_path / "new" / "page.html"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["runs"][0]["run"] == str(own) and data["runs"][0]["finished"] and data["runs"][0]["remarks"]
    assert Path(data["page"]).read_bytes() == first == (own / "report.html").read_bytes()
    assert main(["report", str(own), str(own / "control")]) == 0
    assert capsys.readouterr().out == f"{own / 'comparison.html'}\n"
    after = {path: path.read_bytes() for path in own.rglob("*") if path.is_file() and path.suffix != ".html"}
    assert held == after


def without(folder: Path, key: str) -> None:
    """As if that had not been measured, nor told of."""
    for name in ("results.json", "outcomes.json"):
        held = {checkpoint: dict(entries) for checkpoint, entries in read(folder / name).items()}
        for entries in held.values():
            entries.pop(key)
        (folder / name).write_text(json.dumps(held))
    assert main(["report", str(folder)]) == 0


def measures_on(folder: Path) -> list[str]:
    """The page's rows, those of the run and not merely of its control."""
    _, *rows = Page((folder / "report.html").read_text()).tables()["Accuracy in % with its 95 % interval"]
    return [row[0] for row in rows if row[2]]


def test_written_anew_after_evaluation(own: Path, no_charts: None, capsys: pytest.CaptureFixture[str]) -> None:
    """When there is something new in the folder, and not otherwise."""
    without(own, "pgd-3")
    assert measures_on(own) == ["clean"]
    before = (own / "report.html").read_bytes()
    words = ["eval", str(own), "--device", "cpu"]
    assert main([*words, "--limit", "8"]) == 0
    assert (own / "report.html").read_bytes() == before
    assert main(words) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"Report            {own / 'report.html'} (a page for a browser)"
    assert measures_on(own) == ["clean", "pgd-3"]
    (own / "report.html").unlink()
    assert main(words) == 0
    assert not (own / "report.html").exists()


def test_written_anew_after_an_audit_and_curves(own: Path, no_charts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("audit.json", "curves.json"):
        (own / name).unlink()
    assert main(["report", str(own)]) == 0
    steps = "Accuracy by steps"
    assert not any(steps in caption for caption in Page((own / "report.html").read_text()).tables())
    words = ["--limit", "4", "--device", "cpu"]
    assert main(["eval", str(own), "--curves", "steps", "--quiet", *words]) == 0
    assert any(steps in caption for caption in Page((own / "report.html").read_text()).tables())
    before = Page((own / "report.html").read_text()).text
    findings = (Finding(check="steps", verdict="ok", evidence="none"),)
    found = Audit(findings=findings, threat=Linf(epsilon=EPSILON), images=4, right=4, seed=0)
    monkeypatch.setattr("robustkit.evaluation.audit.audit", lambda *_, **options: found)  # it takes its time
    assert main(["audit", str(own), *words]) == 0
    assert "No audit" in before and "Audit of last" not in before
    after = Page((own / "report.html").read_text()).text
    assert "No audit" not in after and "Audit of last" in after


def test_results_stand_where_the_page_cannot_be_written(
    own: Path, no_charts: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(own, "pgd-3")

    def full(*_: Any) -> Path:
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr("robustkit.reporting.report.write_report", full)
    assert main(["eval", str(own), "--device", "cpu", "--quiet"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("No report: ") and "No space left on device" in line
    assert "pgd-3" in read(own / "results.json")["last"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--out", "page.pdf"], "cannot write a page as '.pdf'"),
        (["--attack", "pgd-20"], "--attack: means nothing without --figure"),
        (["--checkpoint", "best"], "--checkpoint: means nothing without --figure"),
        (["nowhere"], "nowhere: is not a run folder"),
    ],
)
def test_mistakes(made: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(made), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and expected in captured.err and len(captured.err.splitlines()) == 1


# Small parts


def test_markup_is_escaped_unless_it_is_markup() -> None:
    assert tag("td", "1 < 2 & 3", class_="a\"b'", hidden=True, open=False) == (
        '<td class="a&quot;b&#x27;" hidden>1 &lt; 2 &amp; 3</td>'
    )
    assert tag("p", tag("b", "x"), None, "<i>") == "<p><b>x</b>&lt;i&gt;</p>" and tag("br") == "<br>"
    assert joined(("<", Html("<"))) == "&lt;<"
    assert table(("a",), [["<"]], caption="c").count("&lt;") == 1


def test_shapes() -> None:
    shape = {"a": share, "b": Maybe([count]), "c": Maybe((number, amount)), "d": Maybe(Each(count))}
    assert fits({"a": 1, "b": [1, 2], "c": [-1.5, 0], "d": {"x": 1}, "more": None}, shape)
    assert fits({"a": 0.5, "b": None}, shape)
    for wrong in ({}, {"a": 1.5}, {"a": True}, {"a": "1"}, {"a": math.nan}, {"a": 1, "b": [1.5]}, {"a": 1, "b": 3}):
        assert not fits(wrong, shape)
    for wrong in ([], None, {"a": 1, "c": [1]}, {"a": 1, "c": [1, -1]}, {"a": 1, "d": {"x": -1}}, {"a": 10**400}):
        assert not fits(wrong, shape)


# In a real browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def written(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    pages = {"single": read_runs([str(made)]), "double": read_runs([str(made), str(made / "control")])}
    for name, runs in pages.items():
        (folder / f"{name}.html").write_text(page(runs), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("name", ["single", "double"])
def test_in_a_browser(browser: Browser, written: dict[str, Path], name: str, width: int, dark: bool) -> None:
    """Nothing is complained of, nothing is fetched, and the page never scrolls sideways, all details open."""
    browser.open(written[name], width=width, dark=dark)
    browser.value("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.console() == []
    assert browser.requests() == [written[name].resolve().as_uri()]
    assert browser.value("innerWidth") == width
    assert browser.value("document.scrollingElement.scrollWidth") <= width
    page_colour, text = browser.value(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (page_colour, text)]
    assert (bright[0] < bright[1]) == dark
    widths = browser.value(
        "[...document.querySelectorAll('.chart svg')].map(part => part.getBoundingClientRect().width)"
    )
    assert widths and min(widths) > 250


def test_in_a_browser_numbers_need_no_script(browser: Browser, written: dict[str, Path], single: Page) -> None:
    browser.open(written["single"], width=1600, scripts=False)
    root = browser.devtools("DOM.getDocument", depth=0)["root"]["nodeId"]
    html = browser.devtools("DOM.getOuterHTML", nodeId=root)["outerHTML"]
    assert Page(html).tables() == single.tables()


def test_in_a_browser_points_say_their_numbers(browser: Browser, written: dict[str, Path]) -> None:
    browser.open(written["single"], width=1600)
    tip = browser.value(
        "(() => { const mark = document.querySelector('.points use'); const box = mark.getBoundingClientRect();"
        " mark.scrollIntoView(); const at = mark.getBoundingClientRect();"
        " const hit = document.elementFromPoint(at.x + at.width / 2, at.y + at.height / 2);"
        " return hit.closest('use').querySelector('title').textContent; })()"
    )
    assert tip.startswith("epoch ")


def test_in_a_browser_printed_with_all_details(browser: Browser, written: dict[str, Path]) -> None:
    browser.open(written["single"], width=1600, media="print")
    height = browser.value("document.querySelector('details table').getBoundingClientRect().height")
    assert height > 20
