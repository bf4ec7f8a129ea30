"""DAAT, re-implemented from its abstract: WRN-34-10 on CIFAR-10, perturbations cut where a natural network gives way.

Run:        robustkit run recipes/daat.py
Paper:      Yang and Xu, ECCV 2022, of which only the abstract could be had: no formula, no code, no settings, and its
            "dynamic training strategy" is left out. Provisional; nothing measured with it is a result of DAAT.
Recipe:     that of ECAS (recipes/ecas_pgd_at_wrn34.py) with a constant radius, for want of a published one
Helper:     it needs a natural network first:
            robustkit run recipes/uiat_helper.py:cifar10 --out runs/uiat-helper-cifar10
Cost:       31 forward-units a step (11 forwards, 8 of the helper, 10 input backwards, 1 parameter backward), 383 steps,
            110 epochs; the ResNet-18 of the helper costs a twelfth of a forward of the WRN-34-10
Published:  not known
Measured:   not yet
"""

from ecas_pgd_at_wrn34 import recipe as ecas

from robustkit import evolve, px
from robustkit.attacks import PGD, Calibrated
from robustkit.epsilons import Fixed
from robustkit.losses import Helper

recipe = evolve(
    ecas,
    epsilon=Fixed(step_fraction=0.2),
    attack=Calibrated(
        inner=PGD(steps=10),
        helper=Helper(run="runs/uiat-helper-cifar10", made_by="recipes/uiat_helper.py:cifar10"),
        radii=tuple(k * px for k in range(1, 9)),
    ),
)
