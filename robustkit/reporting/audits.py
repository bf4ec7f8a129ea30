"""An audit as a table: each check's verdict and evidence, then remedies, then the verdict."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from robustkit.evaluation.audit import Audit
from robustkit.reporting import consoles
from robustkit.reporting.tables import plain_table

STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red", "skipped": "dim"}
MEANINGS = {
    "trustworthy": "gradient attacks measure this model",
    "suspicious": "gradient attacks may not measure this model",
    "false robustness": "gradient attacks do not measure this model: what they report is no robustness",
}


def print_audit(console: Console, found: Audit, name: str) -> None:
    """All of it; `name` is what was audited."""
    threat = f"{found.threat.norm} {found.threat.epsilon:.4g}"
    title = f"{name}: {threat}, {found.right} of {found.images} images are right and attacked"
    table = plain_table("Check", "Verdict", "Evidence", title=title)
    for finding in found.findings:
        table.add_row(finding.check, Text(finding.verdict, style=STYLES[finding.verdict]), finding.evidence)
    console.print(table)
    for finding in found.findings:
        if finding.remedy:
            console.print(f"{finding.check}: {finding.remedy}.", soft_wrap=True)
    verdicts = [finding.verdict for finding in found.findings]
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in STYLES if kind in verdicts)
    console.print(f"Verdict: {found.verdict} ({counts}); {MEANINGS[found.verdict]}", style="bold", soft_wrap=True)


def audit_as_html(found: Audit) -> str:
    """The same as a notebook shows it."""
    return consoles.as_html(lambda console: print_audit(console, found, "model"))
