"""The documentation as a site: it builds without a complaint and without network, and its pages fetch nothing."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("latex2mathml")
ROOT = Path(__file__).parents[1]
NO_NETWORK = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "all_proxy")}
FETCHED = re.compile(
    r'<(?:script|img|iframe|source)[^>]*\ssrc="?(https?:|//)|<link[^>]*rel="?(?:stylesheet|preload)[^>]*'
    r'href="?(https?:|//)|@import\s+url\(.?https?:'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | NO_NETWORK, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_page_is_there_and_fetches_nothing(site: Path) -> None:
    pages = {path.relative_to(site): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (name.parent / "index.html" if name.name == "README.html" else name) in pages
    assert [str(name) for name, text in pages.items() if FETCHED.search(text)] == []


def test_formulas_are_drawn(site: Path) -> None:
    for page in (ROOT / "docs" / "methods").glob("*.md"):
        formulas = len(re.findall(r"^\$\$$", page.read_text(encoding="utf-8"), re.MULTILINE)) // 2
        name = "index" if page.stem == "README" else page.stem
        text = (site / "methods" / f"{name}.html").read_text(encoding="utf-8")
        assert text.count("<math ") >= formulas and "arithmatex" not in text and "<merror" not in text, page.stem


def test_the_reference_tells_of_every_export_and_every_strategy(site: Path) -> None:
    import robustkit
    from robustkit.core.registry import FOLDERS, registry

    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    assert [name for name in robustkit.__all__ if f'.{name}"' not in text] == []
    for kind, folder in FOLDERS.items():
        page = (site / "api" / f"{folder}.html").read_text(encoding="utf-8")
        for name in registry(kind).names():
            if registry(kind).get(name).__module__.startswith("robustkit."):
                assert f'id="{name}"' in page, name


def test_the_pictures_are_drawn_by_the_code_of_today(tmp_path: Path) -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["draw"](tmp_path)
    kept = {path.name for path in (ROOT / "docs" / "images").glob("*.png")}
    assert {path.name for path in drawn} <= kept
    for path in drawn:
        page = ROOT / "docs" / "kinds" / f"{path.stem}.md"
        assert f"(../images/{path.name})" in page.read_text(encoding="utf-8")
        assert (ROOT / "docs" / "images" / path.name).stat().st_size < 150_000
