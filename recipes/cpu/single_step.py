"""Single-step training, small: RS-FGSM and GradAlign on 10,000 images of CIFAR-10, for two CPU cores.

Run:        robustkit run recipes/cpu/single_step.py:rs-fgsm-8, or another name below
Papers:     as recipes/uiat_table5.py, whose strategies it uses at their own settings
Changed:    backbone, 1,000 images a class (512 of all held out), 8 epochs, one rate for all
Cost:       forward-units a step below, 75 steps an epoch
Mind:       at 16/255 RS-FGSM is far beyond the radius at which full-size networks overfit catastrophically; where that
            happens, robust accuracy falls to nothing within an epoch and a warning says so
Published:  nothing at this size
Measured:   not yet

                    forward-units
    rs-fgsm-8       5
    rs-fgsm-16      5
    grad-align-8    13
"""

from robustkit import Model, Recipe, Suite, Validation, evolve, px
from robustkit.attacks import RSFGSM
from robustkit.datasets import Cifar10
from robustkit.evaluation import CW, PGD_20, AutoAttack, Clean
from robustkit.losses import CrossEntropy, GradAlign
from robustkit.optimizers import SGD
from robustkit.schedules import Triangular
from robustkit.threats import Linf

rs_fgsm = Recipe(
    data=Cifar10(per_class=1000),
    model=Model(backbone="resnet18_cifar_w16"),
    threat=Linf(epsilon=8 * px),
    attack=RSFGSM(noise=1.0, step=1.25),
    loss=CrossEntropy(),
    optimizer=SGD(lr=0.2, momentum=0.9, weight_decay=5e-4),
    schedule=Triangular(peak=0.5, cycle_momentum=True),
    epochs=8,
    batch_size=128,
    validation=Validation(images=512, train_images=256),
    evaluation=(Suite(measures=(Clean(images=1000), PGD_20, CW, AutoAttack(images=256)), images=1000),),
)
recipes = {
    "rs-fgsm-8": rs_fgsm,
    "rs-fgsm-16": evolve(rs_fgsm, threat=Linf(epsilon=16 * px)),
    "grad-align-8": evolve(rs_fgsm, attack=RSFGSM(noise=0.0, step=1.25, mode="train-frozen"), loss=GradAlign()),
}
