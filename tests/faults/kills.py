"""Kills runs at random moments, resumes them, and compares with the run that was left alone.

    python tests/faults/kills.py --kills 95 --seed 2
    python tests/faults/kills.py --kills 8 --seed 1 --families "cat;hat"

Prints a line for each kill, then how many there were by signal and moment. Exit code 1 where a resumed run is not, byte
for byte, the run that never stopped, or where a signal was not answered with the exit code that it should have.

Each `robustkit run` and `robustkit resume` is a process of its own, forked from this one, which has made one run to
have everything imported, and has a single thread. The child counts its calls of Python functions within each of the
phases below; at a call that the seed chooses it gets its signal. So the same seed gives the same kills, and rare
moments, such as the writing of a checkpoint, are met as often as frequent ones. What SIGKILL finds half written is cut
at a random byte.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
# Libraries that are imported below start as many threads, and a process with threads cannot be forked.

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

import robustkit.reporting.figures
from robustkit import evolve, judging, limits, runs
from robustkit.attacks import LDAT, PGD, RSFGSM, Calibrated, Dynamic, Friendly, Grouped
from robustkit.cli.main import main as robustkit_command
from robustkit.core import checkpoint, loop
from robustkit.core.recipe import Recipe, Suite, Validation, save_recipe
from robustkit.core.registry import registry
from robustkit.datasets import Synthetic
from robustkit.epsilons import ECAS, Curriculum
from robustkit.evaluation import Attacked, Clean, ledger
from robustkit.heads import GaussianMixture
from robustkit.helper import Helper
from robustkit.losses import ALP, LBGAT, Align, GradAlign, Hat, Mart, SelfWeighted, Trades
from robustkit.objectives import KL
from robustkit.optimizers import SGD
from robustkit.schedules import OneCycle
from robustkit.targets import Momentum, OneOff, Universal
from robustkit.testing import tiny_recipe
from robustkit.weights import AWP, Exponential

DEADLINE = 180.0
"""Seconds after which a process hangs."""
SIGNALS = {"SIGKILL": (signal.SIGKILL,), "SIGTERM": (signal.SIGTERM,), "SIGINT": (signal.SIGINT,)}
SIGNALS |= {"SIGINT twice": (signal.SIGINT, signal.SIGINT)}
CODES = {"SIGKILL": -9, "SIGTERM": 75, "SIGINT": 130, "SIGINT twice": 130}
TRAINING = ("loading the data", "training step", "validation", "metrics")
"""Phases after which something is always left to do."""
CLOCKS = ("seconds", "images_per_second")


def tiny(**parts: Any) -> Recipe:
    """Four epochs of four steps, measured on 16 images."""
    given: dict[str, Any] = {"evaluation": (Suite(measures=(Clean(), MEASURE)),), **parts}
    return tiny_recipe(**given)


MEASURE = Attacked(key="pgd-3", steps=3)
SMALL = Synthetic(train=70, test=16, classes=4, size=8, channels=1, augment="crop-flip-rotate")
FAMILIES: dict[str, Recipe] = {
    "pgd-at": tiny(),
    "ecas": tiny(epsilon=ECAS(), data=SMALL),
    "trades-awp": tiny(loss=Trades(), attack=PGD(steps=2, objective=KL(), start="gaussian"), weights=AWP(start=0.5)),
    "uiat-momentum": tiny(target=Momentum(inner=Universal(), start=0.5), loss=Align()),
    "uiat-one-off": tiny(target=OneOff(inner=Universal(), start=0.5), loss=Align()),
    "ldat": tiny(attack=LDAT(steps=2), head=GaussianMixture(centre_lr_scale=0.5)),
    "lbgat": tiny(loss=LBGAT(), attack=PGD(steps=2, objective=KL(), start="gaussian")),
    "cat": tiny(
        epsilon=Curriculum(patience=1, train_accuracy=0.0, stages=2),
        attack=Grouped(inner=PGD(steps=2, mode="train")),
        optimizer=SGD(lr=0.3, momentum=0.9),
        epochs=8,
    ),
    "hat": evolve(tiny(attack=PGD(steps=2, objective=KL())), loss=Hat(helper=Helper(run="helper"))),
    "mart": tiny(loss=Mart()),
    "alp": tiny(loss=ALP()),
    "fat": tiny(attack=Friendly(steps=3, tau=(0, 1), switch=(0.5,))),
    "dat": tiny(attack=Dynamic(steps=2, threshold=0.1), loss=SelfWeighted()),
    "daat": tiny(attack=Calibrated(inner=PGD(steps=2), helper=Helper(run="helper"))),
    "rs-fgsm": tiny(attack=RSFGSM(), schedule=OneCycle()),
    "grad-align": tiny(attack=RSFGSM(noise=0.0), loss=GradAlign(weight=0.2)),
    "averaged, with control": evolve(
        tiny(average=Exponential(rate=0.7, warm_up=0.2), schedule=OneCycle(), optimizer=SGD(nesterov=True)),
        control=tiny(epochs=2, attack=None, validation=Validation(images=12, train_images=0, attack=None)),
    ),
}
if "n-fgsm" in registry("attack").names():
    FAMILIES["n-fgsm, a plugin"] = tiny(attack=registry("attack").get("n-fgsm")())
if "las-at" in registry("epsilon").names():
    policy = registry("epsilon").get("las-at")(steps=(1, 2), interval=2, backbone="convnet_small")
    FAMILIES["las-at, a plugin"] = tiny(epsilon=policy)
HELPER = tiny_recipe(attack=None, epochs=1, validation=Validation(images=12, train_images=0, attack=None))


@attrs.frozen
class Strike:
    """A signal at a call of a phase; `torn`: where in [0, 1) a half-written file is cut."""

    signals: str
    phase: str
    call: int
    torn: float


@attrs.define
class Counting:
    """Counts the calls of the process in each phase, and strikes when one is reached."""

    folder: Path
    strike: Strike | None
    report: Path
    everywhere: bool  # also where no strike is to come
    phases: list[str] = attrs.field(factory=lambda: ["between"])
    counts: Counter[str] = attrs.field(factory=Counter)
    struck: bool = False
    left: list[tuple[int, int]] = attrs.field(factory=list)
    appended: Path | None = None  # the file to which a line is being added,
    synced: int = 0  # and its bytes that were on the disk before

    def mark(self, owner: Any, name: str, phase: str) -> None:
        """Calls of `owner.name` are of that phase."""
        inner: Callable[..., Any] = getattr(owner, name)

        def marked(*arguments: Any, **options: Any) -> Any:
            if phase == "metrics":
                self.appended = arguments[0]
                self.synced = self.appended.stat().st_size if self.appended.is_file() else 0
            self._enter(phase)
            try:
                return inner(*arguments, **options)
            finally:
                self._leave()

        setattr(owner, name, marked)

    def _enter(self, phase: str) -> None:
        self.phases.append(phase)
        self.look()

    def _leave(self) -> None:
        self.phases.pop()
        self.look()

    def look(self) -> None:
        """Counts where it matters: looking on takes time."""
        here = self.everywhere or self.left or (self.strike and self.strike.phase == self.phases[-1])
        sys.settrace(self if here else None)

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        """Python asks it at each call of a function."""
        phase = self.phases[-1]
        self.counts[phase] += 1
        if self.left:
            (calls, number), *rest = self.left
            self.left = rest if calls == 0 else [(calls - 1, number), *rest]
            if calls == 0:
                os.kill(os.getpid(), number)
        elif self.strike and (self.strike.phase, self.strike.call) == (phase, self.counts[phase]):
            first, *more = SIGNALS[self.strike.signals]
            self.left = [(200, number) for number in more]
            self.struck = True
            self.say()
            if first == signal.SIGKILL:
                self.tear(phase, self.strike.torn)
            os.kill(os.getpid(), first)

    def tear(self, phase: str, share: float) -> None:
        """What is being written ends at a random byte."""
        for path in self.folder.rglob("*.partial"):
            if path.is_file():
                os.truncate(path, int(share * path.stat().st_size))
        if phase == "metrics" and self.appended and self.appended.is_file():
            os.truncate(self.appended, self.synced + int(share * (self.appended.stat().st_size - self.synced)))
        elif phase == "ledger":
            for path in self.folder.glob("evaluation/*.jsonl"):
                content = path.read_bytes()
                start = content[:-1].rfind(b"\n") + 1  # of the last line
                if content[start:].strip():
                    os.truncate(path, start + int(share * (len(content) - start)))

    def say(self) -> None:
        data = {"struck": self.struck, "counts": self.counts}
        with open(self.report, "w", encoding="utf-8") as file:
            json.dump(data, file)


def child(words: list[str], counting: Counting, log: Path, save_every: float) -> int:
    """`robustkit WORDS`, in this process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    limits.SAVE_EVERY_SECONDS = save_every
    for owner, name, phase in (
        (runs, "write_facts", "making the folder"),
        (runs, "load_parts", "loading the data"),
        (loop, "train_step", "training step"),
        (loop, "measure", "validation"),
        (checkpoint, "write", "checkpoint"),
        (checkpoint, "_remain", "renaming"),
        (checkpoint, "replace", "renaming"),
        (checkpoint, "append_line", "metrics"),
        (judging, "judge", "evaluation"),
        (ledger.Ledger, "write", "ledger"),
        (judging.Verdict, "save", "results"),
        (robustkit.reporting.figures, "draw", "figures"),
    ):
        counting.mark(owner, name, phase)
    counting.look()
    try:
        code = robustkit_command(words)
    finally:
        sys.settrace(None)
    counting.say()
    return code


def command(
    words: list[str], folder: Path, strike: Strike | None = None, save_every: float = 600.0, *, count: bool = False
) -> tuple[int, dict[str, Any]]:
    """The exit code of `robustkit WORDS` in a process of its own (-9: killed), and what it reports of itself."""
    report, log = folder.with_suffix(".report"), folder.with_suffix(".log")
    report.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = child(words, Counting(folder, strike, report, count), log, save_every)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + DEADLINE
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"robustkit {' '.join(words)} hangs: see {log}")
        time.sleep(0.002)
    found = json.loads(report.read_text()) if report.is_file() else {"struck": False, "counts": {}}
    return os.waitstatus_to_exitcode(status), found


def kill_and_resume(
    name: str, work: Path, chooser: random.Random, kills: int, say: Callable[[str], None]
) -> Iterator[tuple[str, str]]:
    """Kills runs of a family until so many kills are done, comparing each in the end. Yields (signal, phase) of each.

    Raises:
        AssertionError: a resumed run differs, a process hangs, or ends with another exit code than it should.
    """
    os.chdir(work)
    recipe = work / f"{name.partition(',')[0]}.json"
    save_recipe(FAMILIES[name], recipe)
    whole = work / f"{recipe.stem}-whole"
    if "helper" in recipe.read_text(encoding="utf-8"):
        save_recipe(HELPER, work / "helper.json")
        code, _ = command(["run", "helper.json", "--out", "helper", "--device", "cpu"], work / "helper")
        assert code == 0, f"exit code {code}: see {work}/helper.log"
    begin = ["run", str(recipe), "--device", "cpu", "--out"]
    code, report = command([*begin, str(whole)], whole, count=True)
    assert code == 0, f"exit code {code}: see {whole}.log"
    counts: dict[str, int] = report["counts"]
    done, chain = 0, 0
    while done < kills:
        chain += 1
        folder = work / f"{recipe.stem}-{chain}"
        report, judged = {"struck": True}, False
        for number in range(min(kills - done, chooser.randint(1, 4))):
            strike = choose(chooser, counts, further=number > 0)
            words = next_words(folder, begin)
            code, report = command(words, folder, strike, chooser.choice((0.0, 600.0)))
            if not report["struck"]:
                break  # so much was done before that this moment does not come any more
            done += 1
            say(f"{name}, {chain}: {words[0]}, {strike.signals} at call {strike.call} of {strike.phase}: exit {code}")
            check_answer(strike, code, folder, judged)
            judged = judged or strike.phase == "figures"
            yield strike.signals, strike.phase
        if report["struck"]:
            code, _ = command(next_words(folder, begin), folder)
        assert code == 0, f"exit code {code} at the end of chain {chain}: see {folder}.log"
        assert_same(whole, folder)
        shutil.rmtree(folder)


def next_words(folder: Path, begin: list[str]) -> list[str]:
    """`resume`, once the folder is a run."""
    is_run = (folder / "recipe.json").is_file()
    return ["resume", str(folder), "--device", "cpu"] if is_run else [*begin, str(folder)]


def choose(chooser: random.Random, counts: dict[str, int], *, further: bool) -> Strike:
    """A moment of those that a whole run has; `further`: of a run that has a part behind it."""
    phase = chooser.choice(sorted(counts))
    kind = chooser.choice(("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGINT twice"))
    most = counts[phase] // 2 if further and phase != "figures" else counts[phase]
    return Strike(kind, phase, chooser.randint(1, max(1, most)), chooser.random())


def check_answer(strike: Strike, code: int, folder: Path, judged: bool) -> None:
    """The exit code, and that a signal that asks for a stop loses no step. `judged`: only figures were to be drawn."""
    wanted = CODES[strike.signals]
    nothing_left = judged or strike.phase not in TRAINING
    may_finish = strike.signals != "SIGKILL" and nothing_left
    assert code == wanted or (may_finish and code == 0), f"exit code {code} after {strike}: see {folder}.log"
    last = folder / "checkpoints" / "last.safetensors"
    if code == wanted and strike.signals in ("SIGTERM", "SIGINT") and strike.phase in ("training step", "validation"):
        nested = folder / "control" / "checkpoints" / "last.safetensors"
        facts = checkpoint.facts_of(nested if nested.is_file() else last)
        lines = (nested if nested.is_file() else last).parents[1] / "metrics.jsonl"
        written = len(lines.read_text().splitlines()) if lines.is_file() else 0
        assert facts["metrics"] == written, f"an epoch is not saved after {strike}"


def assert_same(whole: Path, parts: Path) -> None:
    """Checkpoints and figures byte for byte; metrics, results and outcomes but for times; nothing half-written left."""
    for path in sorted(file for file in whole.rglob("*") if file.is_file()):
        name = path.relative_to(whole)
        other = parts / name
        if "previous" in name.name or name.name in ("environment.json", "preflight.json", "report.html"):
            continue  # which one was before the last, when it all began, and how long it took, is another matter
        assert other.is_file(), f"{other} is missing"
        if path.suffix in (".safetensors", ".png", ".py"):
            assert path.read_bytes() == other.read_bytes(), f"{other} differs from {path}"
        else:
            assert without_times(path) == without_times(other), f"{other} differs from {path}"
    left = [path for path in parts.rglob("*") if path.suffix in (".partial", ".damaged", ".lost")]
    assert not left, f"left behind: {left}"


def without_times(path: Path) -> Any:
    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(item) for key, item in value.items() if key not in CLOCKS}
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    text = path.read_text(encoding="utf-8")
    return [cleaned(json.loads(line)) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=95, help="in all, spread over the families")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--families", default=";".join(FAMILIES), help="their names, with ; between them")
    arguments = parser.parse_args()
    names = arguments.families.split(";")
    found: Counter[tuple[str, str]] = Counter()
    say(f"seed {arguments.seed}")
    with tempfile.TemporaryDirectory(prefix="robustkit-kills-") as temporary:
        torch.set_num_threads(1)
        runs.run(FAMILIES["pgd-at"], out=Path(temporary, "first"), device="cpu")
        assert len(os.listdir("/proc/self/task")) == 1, "this process has threads, and cannot be forked"
        for number, name in enumerate(names):
            work = Path(temporary, str(number))
            work.mkdir()
            share = arguments.kills // len(names) + (number < arguments.kills % len(names))
            chooser = random.Random(f"{arguments.seed} {name}")
            try:
                for signals, phase in kill_and_resume(name, work, chooser, share, say) if share else ():
                    found[signals, phase] += 1
            except AssertionError as error:
                print(f"FAILED: {name}: {error}")
                for log in sorted(work.glob("*.log")):
                    print(f"--- {log.name}\n{log.read_text()[-3000:]}")
                return 1
    phases = sorted({phase for _, phase in found})
    print(f"\n| moment | {' | '.join(SIGNALS)} | all |\n|---|{'---|' * (len(SIGNALS) + 1)}")
    for phase in phases:
        row = [found[signals, phase] for signals in SIGNALS]
        print(f"| {phase} | {' | '.join(map(str, row))} | {sum(row)} |")
    row = [sum(found[signals, phase] for phase in phases) for signals in SIGNALS]
    print(f"| all | {' | '.join(map(str, row))} | {sum(row)} |")
    same = "every resumed run is the run that never stopped, byte for byte"
    print(f"\n{sum(row)} kills in {len(names)} families: {same}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
