"""ECAS + UIAT + Gaussian-mixture head + AWP: WRN-34-10 on CIFAR-10. A mixture nobody has published.

Run:        robustkit run recipes/ecas_uiat_gmm_awp_wrn34.py
Papers:     ECAS (BMVC 2023), UIAT (CVPR 2023), LDAT's head (CMC 2024), AWP (NeurIPS 2020)
Control:    the same at 8/255 always: `epsilon=fixed epsilon.step_fraction=0.2` (31 forward-units)
Cost:       32 forward-units a step (17 forwards, 11 input backwards, 2 parameter backwards), 383 steps, 110 epochs
Published:  nobody has published this combination
Measured:   not yet
"""

from ecas_uiat_wrn34 import recipe as ecas_uiat

from robustkit import evolve
from robustkit.heads import GaussianMixture
from robustkit.weights import AWP

recipe = evolve(
    ecas_uiat,
    head=GaussianMixture(margin=0.1, likelihood=1.0, likelihood_schedule="up"),
    weights=AWP(gamma=0.005),
)
