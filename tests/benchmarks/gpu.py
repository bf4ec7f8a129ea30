"""How fast is adversarial training on this GPU, and how near is that to what the GPU can do?

    python tests/benchmarks/gpu.py --out gpu.json                    # all cases, 10 minutes at most
    python tests/benchmarks/gpu.py --cases wrn34 --precision fp32    # those with "wrn34" in their name
    python tests/benchmarks/gpu.py --profile "uiat rn18" --out gpu.json
    python tests/benchmarks/gpu.py --device cpu --tiny               # try the script out: the numbers mean nothing

First the ceilings: matrix products, and copies in memory. Then, of each case, what `robustkit bench` finds: a published
recipe's training step with batches of 128, data on the device. The first cases matter most. Each is measured in a
process of its own, so that it starts with a clean device, and takes no other with it if it fails. The file grows with
every case; what there was no time for is said.

Images are made up: a step takes as long on them as on CIFAR-10 (--cifar10 takes those).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from clock import seconds
from torch.profiler import ProfilerActivity, profile

from robustkit import Recipe, UserError, load_recipe, override
from robustkit.bench import bench
from robustkit.cli.options import seconds as seconds_in
from robustkit.core.device import device_of
from robustkit.core.loop import train_step
from robustkit.opening import load_parts, make_world
from robustkit.reporting import consoles
from robustkit.reporting.tables import plain_table

RECIPES = Path(__file__).parents[2] / "recipes"
EPOCH_STEPS = 391
"""Steps of an epoch of 50,000 images in batches of 128."""
SHORTEST = 20.0
"""Seconds that must be left for a case to be begun."""
GOALS = "Goals: UIAT on ResNet-18 in 6 s an epoch (the paper: 132 s on an A100); ECAS + UIAT on WRN-34-10 in 60 s \
(UIAT's paper: 886 s on an A100, ECAS's: 662 s on a V100), at 40 % or more of the bf16 ceiling."
ROOF = {"bf16": "bf16", "fp32": "tf32"}
"""The ceiling of each precision: by default, cuDNN's float32 convolutions round their factors to TF32."""
MADE_UP = ("data=synthetic", "data.train=26624", "data.augment=crop-flip")
ONE_BATCH = ("data=synthetic", "data.train=128", "data.augment=crop-flip", "validation.images=0")
TINY = ("model.backbone=convnet_small", "data.size=8", "attack.steps=2")


@attrs.frozen
class Case:
    """A recipe's step. `goal` in seconds an epoch; `plain`: beside the usual script."""

    name: str
    recipe: str
    words: tuple[str, ...] = ()
    goal: float | None = None
    plain: bool = False

    @property
    def is_wide(self) -> bool:
        return "wrn34" in self.name


def cases() -> Iterator[Case]:
    """What matters most comes first. One-off targets cost something else before, in, and after their epoch."""
    phases = {
        "before": (),
        "in": ("target.start=0",),  # the first epoch is the one
        "after": ("target.start=0", "epochs=100000", *ONE_BATCH),  # that epoch has one step, which warms up
    }
    for net, words in (("wrn34", ("model.backbone=wrn34_10",)), ("rn18", ("model.backbone=resnet18_cifar",))):
        wide = net == "wrn34"
        yield Case(f"ecas+uiat {net}", "ecas_uiat_wrn34.py", words, goal=60.0 if wide else None, plain=wide)
        yield Case(f"uiat {net}", "uiat_rn18.py", words, goal=None if wide else 6.0, plain=not wide)
        yield Case(f"pgd-at {net}", "pgd_at_rn18.py", words, plain=True)
    for net, words in (("rn18", ("model.backbone=resnet18_cifar",)), ("wrn34", ("model.backbone=wrn34_10",))):
        yield Case(f"trades {net}", "trades_rn18.py", words)
        for phase, more in phases.items():
            yield Case(f"uiat-one-off {phase} {net}", "uiat_oneoff_rn18.py", (*words, *more))


# In a process of its own: one thing is measured, and said as JSON.


def ceilings(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Operations a second of large matrix products, bytes a second of a copy (read and written), and what ran it."""
    size, repeats = (256, 1) if tiny else (8192, 10)
    found: dict[str, Any] = {}
    for name, dtype, setting in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(setting)
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        windows = [seconds(lambda: torch.mm(left, right, out=out), device, repeats) for _ in range(6)]  # noqa: B023
        found[name] = 2 * size**3 / statistics.median(windows[1:])
    source = torch.randn(1 << (20 if tiny else 29), device=device)
    target = torch.empty_like(source)
    windows = [seconds(lambda: target.copy_(source), device, repeats) for _ in range(6)]
    found["bytes"] = 2 * source.numel() * source.element_size() / statistics.median(windows[1:])
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    found["torch"], found["python"] = torch.__version__, sys.version.split()[0]
    return found


def measured(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `bench` says of the case."""
    windows, steps = (2, 1) if arguments.tiny else (5, 3 if case.is_wide else 10)
    recipe = recipe_of(case, arguments)
    return bench(recipe, device=arguments.device, windows=windows, steps=steps, plain=case.plain).to_json()


def profiled(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """The kernels that take most of three steps, as a table."""
    recipe = recipe_of(case, arguments)
    parts = load_parts(recipe, make_world(recipe, arguments.device))
    rows = parts.order(0)[: recipe.batch_size]
    for _ in range(5):
        train_step(parts, rows)
    on_gpu = parts.world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(3):
            train_step(parts, rows)
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return {"table": found.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=90)}


def recipe_of(case: Case, arguments: argparse.Namespace) -> Recipe:
    precision = [f"precision.{part}={arguments.precision}" for part in ("attack", "outer")]
    images = () if arguments.cifar10 else MADE_UP
    small = TINY if arguments.tiny else ()
    return override(load_recipe(RECIPES / case.recipe), [*images, *case.words, *precision, *small])


# In the first process: one case after the other, until the time is over.


def collected(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ceilings and cases, as far as the time goes; what failed says why."""
    deadline = time.monotonic() + arguments.max_time
    found: dict[str, Any] = {"precision": arguments.precision, "ceilings": None, "cases": {}, "failed": {}, "left": []}
    for name in ["ceilings", *(case.name for case in cases() if arguments.cases in case.name)]:
        left = deadline - time.monotonic()
        if left < SHORTEST:
            found["left"].append(name)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            result = alone(["--measure", name], arguments, left)
        except subprocess.TimeoutExpired:
            found["left"].append(name)
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr)
            found["failed"][name] = (error.stderr.strip().splitlines() or ["without a word"])[-1]
        else:
            if name == "ceilings":
                found[name] = result
            else:
                found["cases"][name] = result
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def alone(words: list[str], arguments: argparse.Namespace, timeout: float) -> Any:
    """What this script measures with those words, in another process.

    Raises:
        CalledProcessError: it failed, and said so on its standard error.
        TimeoutExpired: it took too long and was ended.
    """
    command = [sys.executable, __file__, *words, "--precision", arguments.precision]
    command += ["--device", arguments.device]
    command += [f"--{name}" for name in ("tiny", "cifar10") if getattr(arguments, name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout)
    return json.loads(done.stdout.splitlines()[-1])


def show(found: dict[str, Any]) -> None:
    console, roof = consoles.results(), found["ceilings"]
    if roof:
        console.print(
            f"{roof['device']}, torch {roof['torch']}, Python {roof['python']}. Ceilings: "
            + ", ".join(f"{roof[name] / 1e12:,.1f} TFLOP/s {name}" for name in ("bf16", "tf32", "fp32"))
            + f", {roof['bytes'] / 1e12:,.2f} TB/s copied."
        )
    table = plain_table("Case", title=f"Training steps, {found['precision']}")
    for heading in (
        *("Units", "ms a step (windows)", "Images/s", "Epoch, s", "Goal"),
        *("TFLOP/s", "Of ceiling", "GiB", "Usual/ours"),
    ):
        table.add_column(heading, justify="right")
    goals = {case.name: case.goal for case in cases()}
    for name, case in found["cases"].items():
        low, high = (1000 * value for value in case["spread"])
        goal, ratio = goals[name], case["ratio_to_plain"]
        table.add_row(
            name,
            str(case["units"]),
            f"{1000 * case['seconds']:.1f} ({low:.1f}-{high:.1f})",
            f"{case['images_per_second']:,.0f}",
            f"{EPOCH_STEPS * case['seconds']:.1f}",
            "" if goal is None else f"{goal:g}",
            f"{case['flops_per_second'] / 1e12:,.1f}",
            f"{100 * case['flops_per_second'] / roof[ROOF[found['precision']]]:.0f} %" if roof else "",
            f"{case['memory'] / 2**30:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    console.print(table)
    console.print(f"An epoch is {EPOCH_STEPS} steps. {GOALS}", style="dim")
    for name, reason in found["failed"].items():
        console.print(f"Failed: {name}: {reason}")
    if found["left"]:
        console.print(f"No time for: {', '.join(found['left'])}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of everything, written after each case")
    parser.add_argument("--cases", default="", metavar="TEXT", help="only those whose name holds this text")
    parser.add_argument("--max-time", type=seconds_in, default=570.0, metavar="TIME", help="stop after 90s, 9m (9m30s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of attack and outer passes")
    parser.add_argument("--profile", metavar="CASE", help="instead: the kernels that take the time, beside --out")
    parser.add_argument("--cifar10", action="store_true", help="images of CIFAR-10 (see docs/kinds/data.md)")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda (default), cuda:1, cpu")
    parser.add_argument("--tiny", action="store_true", help="small nets and images: does the script work?")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    by_name = {case.name: case for case in cases()}
    try:
        device = device_of(arguments.device)
    except UserError as error:
        parser.error(str(error))
    if arguments.measure == "ceilings":
        print(json.dumps(ceilings(device, arguments.tiny)))
        return 0
    if arguments.measure:
        print(json.dumps(measured(by_name[arguments.measure], arguments)))
        return 0
    if arguments.profile:
        if arguments.profile not in by_name:
            parser.error(f"there is no case '{arguments.profile}', only {', '.join(by_name)}")
        table = profiled(by_name[arguments.profile], arguments)["table"]
        print(table)
        if arguments.out is not None:
            arguments.out.with_suffix(".profile.txt").write_text(table, encoding="utf-8")
        return 0
    found = collected(arguments)
    show(found)
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
