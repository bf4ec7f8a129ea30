"""The baselines of UIAT under one small budget: 10,000 images of CIFAR-10, a quarter of the width, two CPU cores.

Run:        robustkit run recipes/cpu/uiat_table1.py:uiat, or another name below
Papers:     as recipes/uiat_table1.py, whose strategies it uses at their own settings; IAT is that of UIAT's Table 6
Changed:    backbone, 1,000 images a class (512 of all held out), 12 epochs in batches of 128, bfloat16 where the
            CPU has it; the momentum is 0.9 throughout
Cost:       forward-units a step below, 75 steps an epoch
Helper:     HAT needs the natural network first:
            robustkit run recipes/cpu/uiat_table1.py:natural --out runs/uiat-helper-cpu
Published:  nothing at this size
Measured:   all, one seed each, on a JPEG copy of CIFAR-10: docs/results.md

                  forward-units
    natural       3
    pgd-at        23
    trades        27
    mart          26
    hat           31
    iat           34
    uiat          28
    uiat-oneoff   24 / 28 / 23 before, in and after epoch 10
"""

from robustkit import Model, Recipe, Suite, Validation, evolve, px
from robustkit.attacks import PGD
from robustkit.datasets import Cifar10
from robustkit.evaluation import CW, PGD_20, AutoAttack, Clean
from robustkit.losses import Align, CrossEntropy, Hat, Helper, Mart, Trades
from robustkit.objectives import KL, InverseObjective
from robustkit.optimizers import SGD
from robustkit.schedules import OneCycle
from robustkit.targets import Inverse, Momentum, OneOff, Universal
from robustkit.threats import Linf

natural = Recipe(
    data=Cifar10(per_class=1000),
    model=Model(backbone="resnet18_cifar_w16"),
    threat=Linf(epsilon=8 * px),
    attack=None,
    loss=CrossEntropy(),
    optimizer=SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    schedule=OneCycle(warm_up=0.25, cycle_momentum=False),
    epochs=12,
    batch_size=128,
    validation=Validation(images=512, train_images=256),
    evaluation=(Suite(measures=(Clean(images=1000), PGD_20, CW, AutoAttack(images=256)), images=1000),),
)
pgd_at = evolve(natural, attack=PGD(steps=10))
kl = PGD(steps=10, objective=KL(), start="gaussian")
helper = Helper(run="runs/uiat-helper-cpu", made_by="recipes/cpu/uiat_table1.py:natural")
universal = Universal(radius=4 * px, objective=InverseObjective(beta=1.0))
inverse = Inverse(radius=4 * px, steps=5, step_size=2 * px, objective=InverseObjective(beta=0.0))
recipes = {
    "natural": natural,
    "pgd-at": pgd_at,
    "trades": evolve(natural, attack=kl, loss=Trades(weight=6.0)),
    "mart": evolve(natural, attack=PGD(steps=10, start="gaussian"), loss=Mart(weight=5.0)),
    "hat": evolve(natural, attack=kl, loss=Hat(weight=2.5, helper_weight=0.5, reach=2.0, helper=helper)),
    "iat": evolve(pgd_at, target=inverse, loss=Align(weight=3.5)),
    "uiat": evolve(pgd_at, target=Momentum(inner=universal, gamma=0.9, start=0.75), loss=Align(weight=3.5)),
    "uiat-oneoff": evolve(pgd_at, target=OneOff(inner=universal, start=0.8), loss=Align(weight=3.5)),
}
