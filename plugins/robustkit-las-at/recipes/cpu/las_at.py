"""LAS-AT under one small budget: 10,000 images of CIFAR-10, a quarter of the width, two CPU cores.

Run:        robustkit run recipes/cpu/las_at.py:las-pgd-at, or another name below
            (in plugins/robustkit-las-at; after pip install robustkit-las-at)
Paper:      as las_pgd_at.py, las_trades.py and las_awp.py beside this folder, whose strategies for CIFAR-10 it uses
            at their own settings
Changed:    backbone, also of the policy; 1,000 images a class (512 of all held out), 12 epochs, one-cycle rate with
            Nesterov momentum, bfloat16 where the CPU has it; las-awp does not normalise its images
Cost:       forward-units a step below, on average, where the policy's forward, S, is 1; 75 steps an epoch
Published:  nothing at this size
Measured:   not yet

                  forward-units
    las-pgd-at    34.8 + 1.15 S
    las-trades    116 + 4 S
    las-awp       121 + 4 S
"""

from robustkit_las_at import LASAT

from robustkit import Model, Recipe, Suite, Validation, evolve, px
from robustkit.attacks import PGD
from robustkit.datasets import Cifar10
from robustkit.evaluation import CW, PGD_20, AutoAttack, Clean
from robustkit.losses import CrossEntropy, Trades
from robustkit.objectives import KL
from robustkit.optimizers import SGD
from robustkit.schedules import MultiStep, OneCycle
from robustkit.threats import Linf
from robustkit.weights import AWP

pgd_at = Recipe(
    data=Cifar10(per_class=1000),
    model=Model(backbone="resnet18_cifar_w16"),
    threat=Linf(epsilon=8 * px),
    epsilon=LASAT(backbone="resnet18_cifar_w16"),
    attack=PGD(steps=14, start_epsilon=8 * px),
    loss=CrossEntropy(label_smoothing=1 / 3),
    optimizer=SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    schedule=OneCycle(warm_up=0.25, cycle_momentum=False),
    epochs=12,
    batch_size=128,
    validation=Validation(images=512, train_images=256),
    evaluation=(Suite(measures=(Clean(images=1000), PGD_20, CW, AutoAttack(images=256)), images=1000),),
)
recipes = {
    "las-pgd-at": pgd_at,
    "las-trades": evolve(
        pgd_at,
        epsilon=LASAT(
            radii=tuple(k * px for k in range(5, 10)),
            steps=tuple(range(7, 15)),
            step_sizes=tuple(k * px for k in range(2, 5)),
            weights=tuple(range(5, 10)),
            interval=1,
            robust_reward=8.0,
            natural_reward=4.0,
            mode="train",
            backbone="resnet18_cifar_w16",
            momentum=0.9,
            weight_decay=5e-4,
        ),
        attack=PGD(steps=14, objective=KL(), start="gaussian"),
        loss=Trades(weight=1.0),
    ),
    "las-awp": evolve(
        pgd_at,
        epsilon=LASAT(
            radii=tuple(k * px for k in range(7, 16)),
            steps=tuple(range(8, 17)),
            step_sizes=tuple(k * px for k in range(2, 6)),
            interval=1,
            robust_reward=1.0,
            natural_reward=1.0,
            rehearsal_loss=CrossEntropy(label_smoothing=1 / 3),
            stop_when_fooled=False,
            backbone="resnet18_cifar_w16",
            schedule=MultiStep(at=(0.5, 0.75)),
        ),
        attack=PGD(steps=16, start_epsilon=8 * px, final_epsilon=8 * px),
        loss=CrossEntropy(),
        weights=AWP(gamma=0.01),
    ),
}
