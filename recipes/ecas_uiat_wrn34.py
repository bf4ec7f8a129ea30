"""ECAS + UIAT: WRN-34-10 on CIFAR-10. Entropy-guided radii on the way in, inverse adversarial targets on the way out.

Run:        robustkit run recipes/ecas_uiat_wrn34.py
Papers:     ECAS (BMVC 2023) for radii and training recipe; UIAT (CVPR 2023) for targets and loss
Cost:       29 forward-units a step (16 forwards, 11 input backwards, 1 parameter backward), 383 steps, 110 epochs
Published:  nobody has published this combination
Measured:   not yet at full size; the small CPU variant is in docs/results.md
Small:      robustkit run recipes/cpu/ecas_uiat_wrn34.py
"""

from robustkit import Model, Recipe, px
from robustkit.attacks import PGD
from robustkit.datasets import Cifar10
from robustkit.epsilons import ECAS
from robustkit.heads import Linear
from robustkit.losses import Align
from robustkit.optimizers import SGD
from robustkit.schedules import MultiStep
from robustkit.targets import Momentum, Universal
from robustkit.threats import Linf

recipe = Recipe(
    data=Cifar10(augment="crop-flip"),
    model=Model(backbone="wrn34_10"),
    head=Linear(zero_bias=True),
    threat=Linf(epsilon=8 * px),
    epsilon=ECAS(values=tuple(k * px for k in range(3, 13)), big=3, h_low=1.3, h_high=2.274),
    attack=PGD(steps=10),
    target=Momentum(inner=Universal(radius=4 * px), gamma=0.9, start=0.75),
    loss=Align(weight=3.5),  # no label smoothing: the target is soft already
    optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
    schedule=MultiStep(at=(99, 104)),
    epochs=110,
    batch_size=128,
)
