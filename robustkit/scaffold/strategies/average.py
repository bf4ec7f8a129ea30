"""New strategy: which weights are kept?"""

from __future__ import annotations

from robustkit import registry, setting, spec

__all__ = ["NewStrategy"]


@registry("average").register("new-strategy")
@spec
class NewStrategy:
    """The plain mean of the weights after each step from the fraction `start` of training on (Izmailov et al. 2018)."""

    start: float = setting(default=0.5, at_least=0, below=1)

    def decay(self, step: int, total_steps: int) -> float:
        averaged = step - int(self.start * total_steps)  # with this one
        return 0.0 if averaged < 1 else (averaged - 1) / averaged
