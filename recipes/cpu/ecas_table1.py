"""ECAS and what it is compared with, under one small budget: 10,000 CIFAR-10 images, a quarter of the width.

Run:        robustkit run recipes/cpu/ecas_table1.py:ecas, or another name below
Papers:     ECAS (BMVC 2023), Tables 1 and 4 (AWP: Wu et al. 2020; FAT: Zhang et al. 2020); UIAT (CVPR 2023)
Changed:    the budget is that of recipes/cpu/uiat_table1.py: backbone, 1,000 images a class (512 of all held out), 12
            epochs in batches of 128, one cycle of the rate to 0.1, bfloat16 where the CPU has it
Arms:       the first five differ in the radius alone, and all take steps of 0.2 of it, of 8/255 steps of 1.6/255. None
            smooths labels, as the paper's recipe does: smoothing alone moves these numbers, and h_low is close to the
            entropy of its targets. awp attacks in eval mode like the others, fat with its authors' tau and noise
Thresholds: the published ones, measured on another network. This one's would be 1.82 and 2.07 (a seed), and few radii
            are adjusted: see docs/kinds/epsilons.md and docs/results.md
Cycle:      the paper's ten radii in six, of which the two largest are the big ones, so that twelve epochs are two whole
            cycles and the last one stands at 12/255, as the last of the paper's 110 does (ecas-awp: at 15/255)
Cost:       forward-units a step below (of fat at most so many), 75 steps an epoch
Published:  nothing at this size
Measured:   one seed each, on a JPEG copy of CIFAR-10: docs/results.md

                   forward-units
    fixed          23
    linear         23
    cyclic         23
    cyclic-batch   23
    ecas           24
    awp            26
    ecas-awp       27
    fat            23
    ecas-uiat      29
"""

from uiat_table1 import pgd_at, universal

from robustkit import evolve, px
from robustkit.attacks import PGD, Friendly
from robustkit.epsilons import ECAS, Cyclic, CyclicBatch, Fixed, Linear
from robustkit.losses import Align
from robustkit.targets import Momentum
from robustkit.weights import AWP

cycle = tuple(k * px for k in (3, 5, 7, 9, 11, 12))
fixed = evolve(pgd_at, epsilon=Fixed(step_fraction=0.2))
ecas = evolve(pgd_at, epsilon=ECAS(values=cycle, big=2))
recipes = {
    "fixed": fixed,
    "linear": evolve(pgd_at, epsilon=Linear()),
    "cyclic": evolve(pgd_at, epsilon=Cyclic(values=cycle)),
    "cyclic-batch": evolve(pgd_at, epsilon=CyclicBatch(values=cycle)),
    "ecas": ecas,
    "awp": evolve(fixed, weights=AWP(gamma=0.01)),
    "ecas-awp": evolve(
        ecas,
        epsilon=ECAS(values=tuple(k * px for k in (6, 8, 10, 12, 14, 15)), big=2, mode="train-frozen"),
        attack=PGD(steps=10, start_epsilon=8 * px, final_epsilon=8 * px),
        weights=AWP(gamma=0.01),
    ),
    "fat": evolve(fixed, attack=Friendly()),
    "ecas-uiat": evolve(ecas, target=Momentum(inner=universal, gamma=0.9, start=0.75), loss=Align(weight=3.5)),
}
