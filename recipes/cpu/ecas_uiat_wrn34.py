"""ECAS + UIAT, small: a ResNet-18 of a quarter of the width on 10,000 images of CIFAR-10, for two CPU cores.

Run:        robustkit run recipes/cpu/ecas_uiat_wrn34.py
Papers:     as recipes/ecas_uiat_wrn34.py, whose strategies it uses at their own settings
Changed:    backbone, 1,000 images a class, 20 epochs (two cycles of radii) in batches of 64, one-cycle rate,
            bfloat16 where the CPU has it
Cost:       29 forward-units a step, 149 steps an epoch
Measured:   clean 49.6, PGD-20 32.1, CW 28.9, AutoAttack 27.7 on the JPEG copy, one seed (docs/results.md)
"""

from robustkit import Model, Recipe, Suite, Validation, px
from robustkit.attacks import PGD
from robustkit.datasets import Cifar10
from robustkit.epsilons import ECAS
from robustkit.evaluation import CW, PGD_20, AutoAttack, Clean
from robustkit.losses import Align
from robustkit.optimizers import SGD
from robustkit.schedules import OneCycle
from robustkit.targets import Momentum, Universal
from robustkit.threats import Linf

recipe = Recipe(
    data=Cifar10(per_class=1000),
    model=Model(backbone="resnet18_cifar_w16"),
    threat=Linf(epsilon=8 * px),
    epsilon=ECAS(values=tuple(k * px for k in range(3, 13)), big=3, h_low=1.3, h_high=2.274),
    attack=PGD(steps=10),
    target=Momentum(inner=Universal(radius=4 * px), gamma=0.9, start=0.75),
    loss=Align(weight=3.5),
    optimizer=SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    schedule=OneCycle(warm_up=0.25, cycle_momentum=False),
    epochs=20,
    batch_size=64,
    validation=Validation(images=512, train_images=256),
    evaluation=(Suite(measures=(Clean(images=1000), PGD_20, CW, AutoAttack(images=256)), images=1000),),
)
