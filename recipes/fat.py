"""FAT, friendly adversarial training: attack an image only until it is misclassified; alone, in TRADES and in MART.

Run:        robustkit run recipes/fat.py:fat-wrn32, or another name below
Paper:      Zhang et al., Attacks Which Do Not Kill Training Make Adversarial Learning Stronger, ICML 2020; settings and
            numbers from its code
Schedule:   batches of 128, SGD from 0.1; FAT 120 epochs, 0.01 from epoch 60, 0.001 from 90, 0.0005 from 110; with
            TRADES 85 epochs, 0.01 from 75; with MART 90 epochs, 0.01 from 60, 0.001 in the last
Cost:       at most so many forward-units a step as in the last column; 383 steps an epoch, as 1,024 images are held out
Measured:   not yet
Network:    its WRN-32-10 ("madry") counts layers as 6n + 2: five blocks in each group, the very network that others,
            and its own TRADES and MART, call WRN-34-10 (6n + 4)
Note:       trained and judged at 0.031, not 8/255, with steps of 0.007, as published. Its row at 16/255 trains at
            0.062: `epsilon=fixed epsilon.value=0.062`. "CW" there is `cw-30`, and its PGD-20 of the last two takes
            steps of 0.003: `pgd-20-small`. ECAS (BMVC 2023) quotes 87.97 clean and 47.48 under AutoAttack, which is far
            below its PGD-AT.

Published:             clean   FGSM    PGD-20   CW      forward-units
    fat-wrn32          89.34   65.52   46.13    46.82   23
    fat-trades-wrn34   86.60   61.79   55.98    54.29   27
    fat-mart-wrn34     -       -       -        -       26
"""

from robustkit import Model, Recipe, Suite, evolve
from robustkit.attacks import Friendly
from robustkit.datasets import Cifar10
from robustkit.evaluation import STANDARD, Attacked
from robustkit.heads import Linear
from robustkit.losses import CrossEntropy, Mart, Trades
from robustkit.objectives import KL, Margin
from robustkit.optimizers import SGD
from robustkit.schedules import MultiStep
from robustkit.threats import Linf

fgsm = Attacked(key="fgsm", steps=1, step_size=0.031)
cw_30 = Attacked(key="cw-30", steps=30, objective=Margin())
fat = Recipe(
    data=Cifar10(augment="crop-flip"),
    model=Model(backbone="wrn34_10"),
    head=Linear(zero_bias=True),
    threat=Linf(epsilon=0.031),
    attack=Friendly(steps=10, step_size=0.007, tau=(0, 1, 2), switch=(50 / 120, 90 / 120), omega=0.001),
    loss=CrossEntropy(),
    optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=2e-4),
    schedule=MultiStep(at=(59, 89, 109), factor=(0.1, 0.1, 0.5)),
    epochs=120,
    batch_size=128,
    evaluation=(Suite(measures=(*STANDARD.measures, fgsm, cw_30)),),
    seed=7,
)
gaussian = evolve(fat.attack, start="gaussian", omega=0.0)
small = (Attacked(key="pgd-20-small", step_size=0.003), evolve(cw_30, step_size=0.003))
variant = evolve(fat, evaluation=(Suite(measures=(*STANDARD.measures, fgsm, *small)),), seed=1)
recipes = {
    "fat-wrn32": fat,
    "fat-trades-wrn34": evolve(
        variant,
        attack=evolve(gaussian, objective=KL(), tau=(0, 1, 2, 3), switch=(30 / 85, 50 / 85, 70 / 85)),
        loss=Trades(weight=6.0),
        schedule=MultiStep(at=(74,)),
        epochs=85,
    ),
    "fat-mart-wrn34": evolve(
        variant,
        attack=evolve(gaussian, tau=(0, 1, 2, 3, 4), switch=(20 / 90, 40 / 90, 60 / 90, 80 / 90)),
        loss=Mart(weight=6.0),
        schedule=MultiStep(at=(59, 89)),
        epochs=90,
    ),
}
