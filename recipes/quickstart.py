"""Quickstart: a robust classifier of handwritten digits in about a minute on two CPU cores, beside a natural one.

Run:        robustkit run recipes/quickstart.py
What:       ECAS radii, PGD-10, momentum-universal-inverse targets, a Gaussian-mixture head; L-inf 0.15 on 8x8 digits
Papers:     ECAS (BMVC 2023), UIAT (CVPR 2023), LDAT's head (CMC 2024), mixed
Cost:       29 forward-units a step (16 forwards, 11 input backwards, 1 parameter backward)
Measured:   see the README
"""

from robustkit import Model, Recipe, Suite, Validation, evolve
from robustkit.attacks import PGD
from robustkit.datasets import Digits
from robustkit.epsilons import ECAS, Fixed
from robustkit.evaluation import CW, PGD_20, AutoAttack, Clean
from robustkit.heads import GaussianMixture, Linear
from robustkit.losses import Align, CrossEntropy
from robustkit.optimizers import SGD
from robustkit.schedules import OneCycle
from robustkit.targets import Momentum, Universal
from robustkit.threats import Linf

robust = Recipe(
    data=Digits(),
    model=Model(backbone="convnet_small"),
    head=GaussianMixture(margin=0.1, likelihood=0.1),
    threat=Linf(epsilon=0.15),
    epsilon=ECAS(values=tuple(k / 100 for k in range(6, 22, 3)), big=2),
    attack=PGD(steps=10),
    target=Momentum(inner=Universal(radius=0.075), gamma=0.9, start=0.75),
    loss=Align(weight=3.5),
    optimizer=SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    schedule=OneCycle(),
    epochs=18,
    batch_size=64,
    validation=Validation(images=128, train_images=128),
    evaluation=(Suite(measures=(Clean(), PGD_20, CW, AutoAttack(images=50))),),
)
natural = evolve(robust, head=Linear(), epsilon=Fixed(), attack=None, target=None, loss=CrossEntropy(), epochs=12)
recipe = evolve(robust, control=natural)
