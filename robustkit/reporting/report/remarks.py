"""What a reader must know before the numbers: one sentence for a run, and all that speaks for or against it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import attrs

from robustkit.reporting import formats
from robustkit.reporting.report import words
from robustkit.reporting.report.stored import StoredRun
from robustkit.reporting.tables import columns, notes

TRUST = {
    "trustworthy": "an audit found nothing amiss with the measurement",
    "suspicious": "an audit found the measurement suspicious",
    "false robustness": "an audit found false robustness: what attacks by gradients report is none",
}


@attrs.frozen
class Remark:
    """`title` says in a word what it is about; `command`, where there is one, what to do."""

    kind: Literal["alarm", "warning", "note", "good"]
    title: str
    text: str
    command: str | None = None


def sentence(run: StoredRun) -> str:
    """The verdict in plain words."""
    entries = run.results.get("last", {})
    hardest = hardest_of(entries)
    if not entries:
        return "Nothing has been measured yet."
    said = []
    if "clean" in entries:
        said.append(f"it gets {_right(entries['clean'])} right as they are")
    if hardest is not None:
        entry = entries[hardest]
        under = f"it gets {_right(entry)} right ({words.interval(entry['ci95'])} with 95 % confidence)"
        weak = "" if hardest == "autoattack" else ", the hardest attack that was measured"
        said.append(f"under {name_of(hardest)} within {words.ball(run.recipe.threat)}{weak}, {under}")
    if not said:
        said.append(f"it was measured by {words.listed(sorted(entries))}")
    text = f"The last checkpoint: {'; '.join(said)}"
    beside = {} if run.control is None else run.control.results.get("last", {})
    if hardest is not None and hardest in beside:
        text += f", its control {formats.percent(beside[hardest]['accuracy'])} %"
    trust = TRUST.get(run.audits.get("last", {}).get("verdict", ""), "no audit has been made")
    provisional = "" if run.finished else "Provisional, as training is not finished: "
    return f"{provisional}{text}; {trust}."


def _right(entry: dict[str, Any]) -> str:
    return f"{formats.percent(entry['accuracy'])} % of {entry['n']:,} test images"


def hardest_of(entries: dict[str, Any]) -> str | None:
    """AutoAttack, or else the attack within the recipe's own threat model that leaves the least."""
    if "autoattack" in entries:
        return "autoattack"
    attacks = [key for key, entry in entries.items() if key != "clean" and "/" not in key and not entry.get("shares")]
    return min(attacks, key=lambda key: float(entries[key]["accuracy"]), default=None)


def name_of(key: str) -> str:
    """A measure's name as the field writes it."""
    known = {"autoattack": "AutoAttack", "cw": "CW"}
    return known.get(key, key.upper() if key.startswith("pgd-") else key)


def remarks(run: StoredRun) -> Iterator[Remark]:
    """The worst first: what makes numbers provisional or worthless, then what is missing, then the rest."""
    yield from _training(run)
    yield from _collapse(run)
    yield from _audits(run)
    yield from _evaluation(run)
    yield from _preflight(run)
    for text in run.faults:
        yield Remark("warning", "Damaged", text)
    for text in notes(columns("Model", run.results)):
        yield Remark("note", "Measured", text)
    if run.control is not None:
        for remark in remarks(run.control):
            if remark.kind in ("alarm", "warning") and remark.title != "No audit":
                yield attrs.evolve(remark, title=f"Control: {remark.title.lower()}")
    elif run.recipe.control is not None:
        resume = words.command("resume", run.path)
        yield Remark("warning", "No control", "The recipe's control has not been trained yet.", resume)


def _training(run: StoredRun) -> Iterator[Remark]:
    resume = words.command("resume", run.path)
    if run.facts is None:
        text = "There is no checkpoint that can be read: how far training is, is not known."
        yield Remark("alarm", "Unfinished", text, resume)
    elif not run.finished:
        epoch, epochs = run.facts["epoch"], run.recipe.epochs
        text = f"Training stands at step {run.facts['step']:,}, after {epoch} of {epochs} epochs."
        yield Remark("alarm", "Unfinished", text, resume)
    if run.results and not run.finished:
        text = "All results are those of a network that is not trained to its end: they are no results of this recipe."
        yield Remark("alarm", "Provisional", text)


def _collapse(run: StoredRun) -> Iterator[Remark]:
    epochs = [report["epoch"] for report in run.reports if report.get("collapse")]
    if epochs:
        report = next(report for report in run.reports if report["epoch"] == epochs[0])
        best = report["collapse"]
        now = report.get("validation", {}).get("robust")
        fell = "" if now is None else f" to {formats.percent(now)} %"
        text = (
            f"Catastrophic overfitting in epoch {epochs[0]} ({len(epochs)} epochs in all): accuracy on held-out images "
            f"under the validation attack fell from {formats.percent(best['robust'])} %{fell}, while FGSM's stayed. "
            f"The best checkpoint keeps epoch {best['epoch']}."
        )
        yield Remark("alarm", "Collapse", text)


def _audits(run: StoredRun) -> Iterator[Remark]:
    for name, found in run.audits.items():
        wrong = [finding for finding in found["findings"] if finding["verdict"] in ("failure", "warning")]
        counts = f"{len(found['findings'])} checks on {found['right']} of {found['images']} images"
        title = f"Audit of {name}"
        if found["verdict"] == "trustworthy":
            yield Remark("good", title, f"Trustworthy: {counts}, none amiss.")
            continue
        kind: Literal["alarm", "warning"] = "alarm" if found["verdict"] == "false robustness" else "warning"
        yield Remark(kind, title, f"{found['verdict'].capitalize()}: {counts}, {len(wrong)} amiss.")
        for finding in wrong:
            remedy = f" Remedy: {finding['remedy']}." if finding["remedy"] else ""
            worst: Literal["alarm", "warning"] = "alarm" if finding["verdict"] == "failure" else "warning"
            yield Remark(worst, f"Audit, {finding['check']}", f"{finding['evidence']}.{remedy}")
    if not run.audits:
        text = "Whether gradient attacks measure this model has not been looked at."
        yield Remark("note", "No audit", text, words.command("audit", run.path))


def _evaluation(run: StoredRun) -> Iterator[Remark]:
    measure = words.command("eval", run.path)
    if run.under_way:
        text = "A measure was begun and is not done; the same command goes on where it was."
        yield Remark("warning", "Under way", text, measure)
    if run.unmeasured:
        text = f"The recipe asks for more than was measured: {words.listed(run.unmeasured)}."
        yield Remark("warning", "Not measured", text, measure if run.finished else words.command("resume", run.path))
    entries = run.results.get("last", {})
    if entries and "autoattack" not in entries:
        text = "Without AutoAttack, robust accuracy may be lower than what stands here."
        yield Remark("note", "No AutoAttack", text, f"{measure} --suite standard")


def _preflight(run: StoredRun) -> Iterator[Remark]:
    if run.preflight is None:
        return
    for finding in run.preflight:
        if finding["verdict"] in ("warning", "failure"):
            remedy = f" Remedy: {finding['remedy']}." if finding["remedy"] else ""
            yield Remark("warning", f"Preflight, {finding['check']}", f"{finding['evidence']}.{remedy}")
    verdicts = [finding["verdict"] for finding in run.preflight]
    counts = [f"{verdicts.count(kind)} {kind}" for kind in ("ok", "warning", "skipped") if kind in verdicts]
    yield Remark("note", "Preflight", f"Checks before training: {', '.join(counts)}.")
