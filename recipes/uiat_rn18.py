"""UIAT: ResNet-18 on CIFAR-10, adversarial predictions aligned with those on class-wise inverse adversarial examples.

Run:        robustkit run recipes/uiat_rn18.py
Paper:      Dong et al., CVPR 2023, Eq. 6 to 8, Table 1
Cost:       28 forward-units a step (15 forwards, 11 input backwards, 1 parameter backward), 383 steps, 100 epochs
Published:  clean 85.01, PGD-20 54.63, CW 51.10, AutoAttack 49.11
Measured:   not yet
"""

from pgd_at_rn18 import recipe as pgd_at

from robustkit import evolve, px
from robustkit.losses import Align
from robustkit.objectives import InverseObjective
from robustkit.targets import Momentum, Universal

recipe = evolve(
    pgd_at,
    target=Momentum(inner=Universal(radius=4 * px, objective=InverseObjective(beta=1.0)), gamma=0.9, start=0.75),
    loss=Align(weight=3.5),
)
