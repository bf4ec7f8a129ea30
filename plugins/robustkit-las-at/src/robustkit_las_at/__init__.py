"""LAS-AT for robustkit: a policy network learns how hard to attack each image.

`schedule` is the epsilon schedule and how it learns, `policy` its network, `probe` the attack that its reward is
measured with.
"""

from robustkit_las_at.schedule import LASAT

__all__ = ["LASAT"]
__version__ = "0.1.0"
