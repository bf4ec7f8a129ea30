"""LDAT's Table 3: the share beta of adversarial images in the loss; CIFAR-10, PreActResNet-18.

Run:        robustkit run recipes/ldat_table3.py:beta-0.5, or another name below
Paper:      Learnable distribution adversarial training, CMC 78(3), 2024, Table 3
Schedule:   as recipes/ldat_prn18.py, which is beta-0.5
Cost:       forward-units a step in the last column; 383 steps an epoch, as 1,024 images are held out
Measured:   not yet
Open:       what recipes/ldat_prn18.py says. Both halves share a forward whatever beta is, so that with beta 0 or 1 the
            other half still takes part in the batch statistics: `loss.joint=false` parts them
Mind:       the clean accuracy at beta 0 is, to the digit, that of the paper's undefended ResNet-50

Published:      clean   PGD     forward-units
    beta-0      95.02   0.00    26
    beta-0.2    93.12   38.93   26
    beta-0.5    89.02   58.44   26
    beta-0.8    85.14   60.28   26
    beta-1      82.33   60.89   26
"""

from ldat_prn18 import recipe as ldat

from robustkit import evolve
from robustkit.losses import Mixed

recipes = {f"beta-{beta:g}": evolve(ldat, loss=Mixed(beta=beta)) for beta in (0.0, 0.2, 0.5, 0.8, 1.0)}
