"""Runs that are killed at random moments, several times each: resumed, they are the runs that never stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


def kills(count: int, seed: int, *families: str) -> None:
    words = [sys.executable, str(SCRIPT), "--kills", str(count), "--seed", str(seed)]
    words += ["--families", ";".join(families)] if families else []
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} kills in" in done.stdout, done.stdout


def test_a_few_kills() -> None:
    kills(5, 4, "uiat-momentum")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_kills_of_every_family(seed: int) -> None:
    kills(95, seed)
