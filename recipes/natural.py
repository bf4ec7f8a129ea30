"""Natural training: ResNet-18 on CIFAR-10, no attack. The floor of robustness, and the ceiling of clean accuracy.

Run:        robustkit run recipes/natural.py
Source:     the common schedule of UIAT (CVPR 2023), Table 1
Cost:       3 forward-units a step (1 forward, 1 parameter backward), 383 steps an epoch, 100 epochs
Published:  clean about 94 to 95 %, AutoAttack about 0 % (general knowledge, no table)
Measured:   not yet
"""

from robustkit import Model, Recipe, px
from robustkit.datasets import Cifar10
from robustkit.losses import CrossEntropy
from robustkit.optimizers import SGD
from robustkit.schedules import OneCycle
from robustkit.threats import Linf

recipe = Recipe(
    data=Cifar10(),
    model=Model(backbone="resnet18_cifar"),
    threat=Linf(epsilon=8 * px),
    attack=None,
    loss=CrossEntropy(),
    optimizer=SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    schedule=OneCycle(warm_up=0.25),
    epochs=100,
    batch_size=128,
)
