"""Memory that is freed is kept, where the C library is glibc; nothing else changes."""

import subprocess
import sys

import pytest
import torch

from robustkit.engine import memory
from robustkit.engine.memory import keeping_memory

FAULTS = """
import resource, sys
import torch
from robustkit.engine.memory import keeping_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        x = torch.ones(3 << 20)  # 12 MiB, taken and freed
        y = x + 1
        del x, y
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
with keeping_memory():
    faults()
    kept = faults()
    with keeping_memory(False):
        pass
    with keeping_memory():
        pass
    faults()
    again = faults()
print(usual, kept, again)
"""


@pytest.mark.skipif(memory._glibc() is None, reason="another allocator")
def test_pages_are_not_taken_anew() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    usual, kept, again = map(int, done.stdout.split())
    assert kept < 100 and again < 100, done.stdout
    assert usual > 10 * kept, done.stdout


def test_nests_and_survives_errors() -> None:
    with pytest.raises(RuntimeError), keeping_memory():
        assert memory._depth in (0, 1)
        with keeping_memory(), keeping_memory(False):
            assert memory._depth == 0
        raise RuntimeError
    assert memory._depth == 0


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with keeping_memory():
        assert torch.ones(3).sum() == 3
