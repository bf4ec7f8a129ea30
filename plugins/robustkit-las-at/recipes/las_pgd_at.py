"""LAS-PGD-AT: PGD-AT whose radius, steps and step size are drawn for each image from a policy that is learnt.

Run:        robustkit run recipes/las_pgd_at.py:cifar10-wrn34, or another name below
            (in plugins/robustkit-las-at; after pip install robustkit-las-at)
Paper:      Jia et al., "LAS-AT: Adversarial Training with Learnable Attack Strategy", CVPR 2022; settings of its code
Cost:       forward-units a step below, on average: 31 (cifar100: 27), and 76 (72) more in each 20th, in which the
            policy learns; 383 steps, 110 epochs. S is a forward of the policy's ResNet-18: 1 beside a ResNet-18, 0.083
            beside a WRN-34-10. PGD-AT has 23
Published:  as ECAS (BMVC 2023), Tables 2 and 3, reports it; the epoch is selected on the test set
Measured:   not yet

                    clean  AutoAttack   forward-units
    cifar10-wrn34   86.23  53.58        34.8 + 1.15 S
    cifar10-rn18    81.99  49.74        34.8 + 1.15 S
    cifar100-wrn34  61.80  29.03        30.6 + 1.15 S
    cifar100-rn18   -      -            30.6 + 1.15 S

Unlike the code, 1,024 training images are held out, and the epoch is selected on them; its WRN-34-10 has a block more,
which is never used. The published baselines were probably trained without label smoothing: compare with
`epsilon=fixed attack.steps=10` under this very recipe.
"""

from robustkit_las_at import LASAT

from robustkit import Model, Recipe, evolve, px
from robustkit.attacks import PGD
from robustkit.datasets import Cifar10, Cifar100
from robustkit.heads import Linear
from robustkit.losses import CrossEntropy
from robustkit.optimizers import SGD
from robustkit.schedules import MultiStep
from robustkit.threats import Linf

cifar10 = Recipe(
    data=Cifar10(augment="crop-flip"),
    model=Model(backbone="wrn34_10"),
    head=Linear(zero_bias=True),
    threat=Linf(epsilon=8 * px),
    epsilon=LASAT(
        radii=tuple(k * px for k in range(3, 16)),
        steps=tuple(range(3, 15)),
        step_sizes=tuple(k * px for k in range(1, 6)),
        interval=20,
        robust_reward=4.0,
        natural_reward=2.0,
    ),
    attack=PGD(steps=14, start_epsilon=8 * px),
    loss=CrossEntropy(label_smoothing=1 / 3),  # the code's factor 0.7
    optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
    schedule=MultiStep(at=(99, 104)),
    epochs=110,
    batch_size=128,
)
cifar100 = evolve(
    cifar10,
    data=Cifar100(augment="crop-flip"),
    epsilon=evolve(cifar10.epsilon, steps=tuple(range(3, 13)), momentum=0.9, weight_decay=5e-4),
    attack=PGD(steps=12, start_epsilon=8 * px),
    loss=CrossEntropy(label_smoothing=0.40404),  # the code's factor 0.6
)
rn18 = {"model": Model(backbone="resnet18_cifar"), "head": Linear()}
recipes = {
    "cifar10-wrn34": cifar10,
    "cifar10-rn18": evolve(cifar10, **rn18),
    "cifar100-wrn34": cifar100,
    "cifar100-rn18": evolve(cifar100, **rn18),
}
