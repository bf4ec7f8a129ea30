"""LAS-TRADES: TRADES whose radius, steps, step size and weight are drawn for each image from a policy that is learnt.

Run:        robustkit run recipes/las_trades.py:cifar10-wrn34, or another name below
            (in plugins/robustkit-las-at; after pip install robustkit-las-at)
Paper:      Jia et al., "LAS-AT: Adversarial Training with Learnable Attack Strategy", CVPR 2022; settings of its code
Cost:       forward-units a step below: 35 of the step, and 81 for what the policy learns from, in each step; 383 steps,
            100 epochs. S is a forward of the policy's ResNet-18: 1 beside a ResNet-18, 0.083 beside a WRN-34-10.
            TRADES has 27
Published:  as ECAS (BMVC 2023), Tables 2 and 3, reports it; the epoch is selected on the test set
Measured:   not yet

                    clean  AutoAttack   forward-units
    cifar10-wrn34   85.24  54.15        116 + 4 S
    cifar10-rn18    82.04  49.75        116 + 4 S
    cifar100-wrn34  60.62  28.12        116 + 4 S
    cifar100-rn18   -      -            116 + 4 S

As in the code, the two forwards of the reward's first part run in training mode, and so move the running statistics
twice in each step; `epsilon.mode=eval` leaves them alone. Unlike there, 1,024 training images are held out, and the
epoch is selected on them.
"""

from robustkit_las_at import LASAT

from robustkit import Model, Recipe, evolve, px
from robustkit.attacks import PGD
from robustkit.datasets import Cifar10, Cifar100
from robustkit.heads import Linear
from robustkit.losses import Trades
from robustkit.objectives import KL
from robustkit.optimizers import SGD
from robustkit.schedules import MultiStep
from robustkit.threats import Linf

cifar10 = Recipe(
    data=Cifar10(augment="crop-flip"),
    model=Model(backbone="wrn34_10"),
    head=Linear(zero_bias=True),
    threat=Linf(epsilon=8 * px),
    epsilon=LASAT(
        radii=tuple(k * px for k in range(5, 10)),
        steps=tuple(range(7, 15)),
        step_sizes=tuple(k * px for k in range(2, 5)),
        weights=tuple(range(5, 10)),
        interval=1,
        robust_reward=8.0,
        natural_reward=4.0,
        mode="train",
        momentum=0.9,
        weight_decay=5e-4,
    ),
    attack=PGD(steps=14, objective=KL(), start="gaussian"),
    loss=Trades(weight=1.0),  # times the weights that are drawn
    optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
    schedule=MultiStep(at=(75, 90)),
    epochs=100,
    batch_size=128,
)
cifar100 = evolve(
    cifar10,
    data=Cifar100(augment="crop-flip"),
    epsilon=evolve(cifar10.epsilon, radii=tuple(k * px for k in range(5, 11)), natural_reward=2.0),
)
rn18 = {"model": Model(backbone="resnet18_cifar"), "head": Linear()}
recipes = {
    "cifar10-wrn34": cifar10,
    "cifar10-rn18": evolve(cifar10, **rn18),
    "cifar100-wrn34": cifar100,
    "cifar100-rn18": evolve(cifar100, **rn18),
}
