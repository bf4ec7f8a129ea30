"""What is minimised?

An outer loss names the images it wants forwarded (`prepare`: views by name) and maps the outputs on them, and the
target distribution where it uses one, to named terms, each a mean over the batch. Their sum is minimised; their names
are the log. A new loss is a class of a dozen lines.
"""

from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import OuterLoss
from robustkit.helper import Helper, Untrained
from robustkit.losses.align import Align
from robustkit.losses.alp import ALP
from robustkit.losses.cross_entropy import CrossEntropy
from robustkit.losses.grad_align import GradAlign
from robustkit.losses.hat import Hat
from robustkit.losses.lbgat import LBGAT
from robustkit.losses.mart import Mart
from robustkit.losses.mixed import Mixed
from robustkit.losses.self_weighted import SelfWeighted
from robustkit.losses.trades import Trades

registry = _registry("loss")

__all__ = [
    "ALP",
    "LBGAT",
    "Align",
    "CrossEntropy",
    "GradAlign",
    "Hat",
    "Helper",
    "Mart",
    "Mixed",
    "OuterLoss",
    "SelfWeighted",
    "Trades",
    "Untrained",
    "registry",
]
