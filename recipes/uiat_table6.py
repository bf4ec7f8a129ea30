"""UIAT's Table 6: what its three parts are worth, ResNet-18 on CIFAR-10, L-inf 8/255.

Run:        robustkit run recipes/uiat_table6.py:uag-fr, or another name below
Paper:      Dong et al., CVPR 2023, Table 6: UAG is the universal target, FR its feature regulariser (beta 1), IAM the
            inverse momentum; IAT has none of them, but inverse examples image by image (5 steps of 2/255 within 4/255)
Schedule:   as recipes/uiat_rn18.py: one cycle to 0.1, 100 epochs in batches of 128
Cost:       forward-units a step in the last column; 383 steps an epoch, as 1,024 images are held out
Measured:   not yet
Open:       what recipes/uiat_table1.py says

Published:    clean   PGD-20   AutoAttack   forward-units
    iat       83.97   53.98    48.33        34
    uag       85.19   53.56    47.63        26
    uag-fr    85.11   54.13    48.47        28
    uag-iam   84.85   54.29    48.83        26
    uiat      85.01   54.63    49.11        28
"""

from uiat_rn18 import recipe as uiat

from robustkit import evolve, px
from robustkit.objectives import InverseObjective
from robustkit.targets import Inverse, Momentum, Universal

plain, regularised = InverseObjective(beta=0.0), InverseObjective(beta=1.0)
targets = {
    "iat": Inverse(radius=4 * px, steps=5, step_size=2 * px, objective=plain),
    "uag": Universal(radius=4 * px, objective=plain),
    "uag-fr": Universal(radius=4 * px, objective=regularised),
    "uag-iam": Momentum(inner=Universal(radius=4 * px, objective=plain), gamma=0.9, start=0.75),
    "uiat": Momentum(inner=Universal(radius=4 * px, objective=regularised), gamma=0.9, start=0.75),
}
recipes = {name: evolve(uiat, target=target) for name, target in targets.items()}
