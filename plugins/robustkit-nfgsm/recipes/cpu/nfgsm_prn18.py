"""N-FGSM, small: a ResNet-18 of a quarter of the width on 10,000 images of CIFAR-10, for two CPU cores.

Run:        robustkit run recipes/cpu/nfgsm_prn18.py    (in plugins/robustkit-nfgsm; after pip install robustkit-nfgsm)
Paper:      as recipes/nfgsm_prn18.py, whose strategies it uses at their own settings
Changed:    backbone, 1,000 images a class, 12 epochs, bfloat16 where the CPU has it
Cost:       5 forward-units a step (PGD-10 has 23), 75 steps an epoch
Measured:   not yet
"""

from robustkit_nfgsm import NFGSM

from robustkit import Model, Recipe, Suite, Validation, px
from robustkit.datasets import Cifar10
from robustkit.evaluation import CW, PGD_20, AutoAttack, Clean
from robustkit.losses import CrossEntropy
from robustkit.optimizers import SGD
from robustkit.schedules import Triangular
from robustkit.threats import Linf

recipe = Recipe(
    data=Cifar10(per_class=1000),
    model=Model(backbone="resnet18_cifar_w16"),
    threat=Linf(epsilon=8 * px),
    attack=NFGSM(noise=2.0, step=1.0),
    loss=CrossEntropy(),
    optimizer=SGD(lr=0.2, momentum=0.9, weight_decay=5e-4),
    schedule=Triangular(peak=0.5, cycle_momentum=True),
    epochs=12,
    batch_size=128,
    validation=Validation(images=512, train_images=256),
    evaluation=(Suite(measures=(Clean(images=1000), PGD_20, CW, AutoAttack(images=256)), images=1000),),
)
