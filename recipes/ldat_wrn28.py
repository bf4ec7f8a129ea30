"""LDAT: WRN-28-10 on CIFAR-100. A Gaussian for each class, natural and adversarial images mixed.

Run:        robustkit run recipes/ldat_wrn28.py
Paper:      Learnable distribution adversarial training, CMC 78(3), 2024, Table 2
Cost:       26 forward-units a step (12 forwards, 10 input backwards, 2 parameter backwards), 383 steps, 300 epochs
Published:  natural 68.97; L-inf 8/255: PGD 33.87, APGD 30.24, FAB 28.21, DeepFool 40.31; L2 0.5: PGD 37.71,
            APGD 38.83, FAB 36.55, C&W 38.51, DeepFool 43.97
Measured:   not yet
Open:       what recipes/ldat_prn18.py says; it trains in L2 1.0
"""

from ldat_prn18 import recipe as cifar10

from robustkit import Model, evolve
from robustkit.datasets import Cifar100
from robustkit.losses import Mixed
from robustkit.threats import L2

recipe = evolve(
    cifar10,
    data=Cifar100(augment="crop-flip"),
    model=Model(backbone="wrn28_10"),
    head=evolve(cifar10.head, margin=0.05),
    attack=evolve(cifar10.attack, threat=L2(epsilon=1.0)),
    loss=Mixed(beta=0.3),
    epochs=300,
)
