"""ECAS's radii with other methods' losses and heads: WRN-34-10 on CIFAR-10. Mixtures that nobody has published.

Run:        robustkit run recipes/ecas_mixes.py:ecas-mart, or another name below
Papers:     ECAS (BMVC 2023) for radii and training recipe; UIAT (CVPR 2023), MART (ICLR 2020), LDAT's head (CMC 2024)
Controls:   ...-fixed is the same recipe at 8/255 always, in steps of 0.2 of it
Cost:       forward-units a step in the last column; 383 steps an epoch, as 1,024 images are held out
Published:  nobody has published these combinations
Measured:   not yet
Open:       all without label smoothing: UIAT's target is soft already, MART and the head's margin press the true class.
            MART's weight is its authors' for this network, the head's settings are LDAT's for CIFAR-10

                         forward-units
    ecas-uiat            29
    ecas-uiat-fixed      28
    ecas-mart            27
    ecas-mart-fixed      26
    ecas-mixture         24
    ecas-mixture-fixed   23
"""

from ecas_pgd_at_wrn34 import recipe as ecas_pgd_at
from ecas_uiat_wrn34 import recipe as ecas_uiat

from robustkit import evolve
from robustkit.attacks import PGD
from robustkit.epsilons import Fixed
from robustkit.heads import GaussianMixture
from robustkit.losses import CrossEntropy, Mart

mixes = {
    "ecas-uiat": ecas_uiat,
    "ecas-mart": evolve(ecas_pgd_at, attack=PGD(steps=10, start="gaussian"), loss=Mart(weight=6.0)),
    "ecas-mixture": evolve(ecas_pgd_at, head=GaussianMixture(margin=0.1), loss=CrossEntropy()),
}
recipes = mixes | {f"{name}-fixed": evolve(mix, epsilon=Fixed(step_fraction=0.2)) for name, mix in mixes.items()}
