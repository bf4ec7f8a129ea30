"""What a child process held at most while it was given files that ask for much."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, resource, sys, time
from pathlib import Path
import robustkit
from corpus import put
from test_foreign_files import rewritten
from test_images import BROKEN, LABELS, SHAPES, archive, header
from robustkit import load
from robustkit.core import checkpoint
from robustkit.core.errors import UserError
from robustkit.core.recipe import load_recipe
from robustkit.datasets.image_folder import decode
from robustkit.datasets.npz import read_npz
from robustkit.folder import read_results

resource.setrlimit(resource.RLIMIT_AS, (32 << 30, 32 << 30))
run, scratch = Path(sys.argv[1]), Path(sys.argv[2])
load(run)
found = []

def held(line):
    (found,) = (words.split() for words in Path("/proc/self/status").read_text().splitlines() if words.startswith(line))
    return int(found[1]) / 1024

def tried(name, action):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = held("VmRSS"), time.process_time()
    try:
        action()
        said = None
    except UserError as error:
        said = str(error)
    found.append([name, said, held("VmHWM") - before, time.process_time() - began])

def facts(**changes):
    rewritten(run, **changes)
    return lambda: load(run)

for thing in ("9 MiB of JSON", "7 MiB of JSON", "4 TB, sparse", "header of 2^60 bytes", "metadata that are deep"):
    for read in (load_recipe, checkpoint.read):
        tried(f"{thing}, {read.__name__}", lambda: read(put(thing, scratch / "recipe.json")))
for kind in ("30,000 x 30,000", "9,000 x 9,000", "2^31 - 1 wide"):
    (scratch / "photo.png").write_bytes(BROKEN[kind])
    tried(kind, lambda: decode(scratch / "photo.png"))
for shape in ("header of 4 GB", "header of zeros", "overflowing", "negative"):
    tried(f"npz: {shape}", lambda: read_npz(archive(scratch / "made.npz", SHAPES[shape], LABELS)))
images = header("(250000, 8, 8, 1)") + bytes(16_000_000)
tried("npz: labels of 100 MB", lambda: read_npz(archive(scratch / "made.npz", images, LABELS + bytes(100_000_000))))
tried("a head of 2 million classes", facts(classes=[str(number) for number in range(500_000)]))
tried("images of 900 million pixels", facts(classes=list("abcd"), image_shape=[3, 30_000, 30_000]))
model = {"model": {"backbone": "vit_giant_patch14_224"}, "head": {"name": "linear"}}
tried("a network of 1.8 billion weights", facts(image_shape=[3, 224, 224], recipe=model))
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells peaks of a while")
def test_peaks(spoilt: Path, tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", CHILD, str(spoilt), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, said, megabytes, seconds in found:
        print(f"{name}: {megabytes:.0f} MB, {seconds:.2f} s, {str(said)[:100]}")
        assert said is not None and "\n" not in said, name
        assert megabytes < 500 and seconds < 5, (name, megabytes, seconds)
    assert len(found) == 21
