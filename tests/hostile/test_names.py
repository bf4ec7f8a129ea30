"""Names that come from files are shown as they are: they neither paint nor steer a terminal, nor stop a figure."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from PIL import Image
from rich.console import Console
from rich.text import Text
from test_foreign_files import rewritten

from robustkit.cli.main import LONGEST, main
from robustkit.core.errors import visible
from robustkit.folder import read_results
from robustkit.reporting import consoles
from robustkit.reporting.figures import STYLE, new_figure
from robustkit.reporting.tables import plain_table

EVIL = ("[bold red]x[/]", "\x1b[31mred", "right\u202eleft", ":bomb:\x07\r\n\x9b2J")


def clean(text: str) -> bool:
    """No control character but the ends of lines, and nothing that cannot be written."""
    text.encode("utf-8")
    return visible(text.replace("\n", "")) == text.replace("\n", "")


def test_visible() -> None:
    assert visible("a\x1b[0m\n\x7f\x9b\u202e\ud800z") == r"a\x1b[0m\n\x7f\x9b\u202e\ud800z"
    for plain in ("", "naïve café", "日本語", "da\u200cta", "👩\u200d🔬", "[bold]", "a\\x1b"):
        assert visible(plain) == plain


@pytest.mark.parametrize("terminal", [False, True])
def test_consoles(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed, in tables, titles and headings; colours of our own stay."""
    for console in (consoles.results(), consoles.messages()):
        held = io.StringIO()
        console.file, console._force_terminal, console._color_system = held, terminal, None
        table = plain_table(*EVIL, title=EVIL[1])
        table.add_row(*EVIL)
        console.print(table)
        for name in EVIL:
            console.print(name, soft_wrap=True)
        console.print(Text("ours", style="red"))
        said = held.getvalue()
        assert "\x1b[31mred" not in said and "\x07" not in said and "\x9b" not in said and "\u202e" not in said
        assert r"\x1b[31mred" in said and "[bold red]x[/]" in said and ":bomb:" in said
        assert (isinstance(console, Console) and clean(said)) or terminal


def test_classes_and_files(
    spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # however deep the folder lies, names are not broken
    rewritten(spoilt, classes=list(EVIL))
    photos = tmp_path / "\x1b[2J"
    photos.mkdir()
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    for name in (b"[red].png", b"\xff\xfe.png", b"\x1b[1m.png"):
        path = Path(os.fsdecode(os.fsencode(photos) + b"/" + name))
        picture.save(path)
    (photos / "\x1b[5m.png").write_bytes(b"")
    assert main(["predict", str(spoilt), str(photos), "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert clean(out) and clean(err) and len(err.splitlines()) == 1
    assert "[red].png" in out and r"\udcff\udcfe.png" in out and r"\x1b[1m.png" in out and r"\x1b[5m.png" in err
    assert main(["predict", str(spoilt), str(photos), "--device", "cpu", "--json"]) == 1
    out, _ = capsys.readouterr()
    assert clean(out) and set(json.loads(out)["images"][0]["posteriors"] if "posteriors" in out else ()) <= set(EVIL)


def test_measures_and_settings(spoilt: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = read_results(spoilt)
    for name in EVIL:
        results["last"][name] = results["last"]["clean"] | {"notes": [name], "breakdown": {name: 0.5}}
    (spoilt / "results.json").write_text(json.dumps(results))
    renamed = finished.parent / "\x1b[31mred [bold]"
    if not renamed.exists():
        renamed.symlink_to(finished)
    assert main(["compare", str(spoilt), str(renamed)]) == 0
    out, err = capsys.readouterr()
    assert clean(out) and clean(err) and "[bold red]x[/]" in out and r"\x1b[31mred" in out


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["show", "\x1b[31m.json"], ["show", str(tmp_path), "\x1b]0;title\x07=3"], ["list", "\x1b[31m"]):
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert out == "" and clean(err) and len(err.splitlines()) == 1
    (tmp_path / "recipe.json").write_text(json.dumps({"\x1b[31m" + "x" * 1_000_000: 1}))
    assert main(["show", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert clean(err) and len(err) < LONGEST + 100 and len(err.splitlines()) == 1


def test_figures_take_dollars_for_dollars() -> None:
    """matplotlib would set what stands between two as mathematics, and fail where it is none."""
    with rc_context(STYLE):
        figure = new_figure(1, 1)
        figure.subplots().set_title(r"$\nonsense{$")
        figure.savefig(io.BytesIO())
