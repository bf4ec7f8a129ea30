"""UIAT's Table 1: six methods on three data sets under one schedule, ResNet-18, L-inf 8/255.

Run:        robustkit run recipes/uiat_table1.py:cifar10-uiat, or another name below
Paper:      Dong et al., CVPR 2023, Table 1 (SAT: Madry et al. 2018; TRADES: Zhang et al. 2019; MART: Wang et al. 2020;
            HAT: Rade and Moosavi-Dezfooli 2022)
Schedule:   one cycle to 0.1, batches of 128; CIFAR 100 epochs; SVHN 30 epochs, attack steps of 1/255, no augmentation
Cost:       forward-units a step in the last column; 383 steps an epoch (SVHN 565), as 1,024 images are held out
Helper:     HAT needs a natural network first, one for each data set:
            robustkit run recipes/uiat_helper.py:cifar10 --out runs/uiat-helper-cifar10
Measured:   not yet
Open:       the paper states neither the weights of TRADES, MART and HAT (6, 5, 2.5 and 0.5 are their authors'), nor
            augmentation (HAT's code: CIFAR-100 is rotated, too), nor UIAT's epochs on SVHN (0.75 and 0.8 of training
            here, as on CIFAR), nor which checkpoint it reports (here last, and best on held-out images). Momentum is
            cycled against the rate as HAT's code does; the paper says 0.9.

Published:                 clean   PGD-20   CW      AutoAttack   forward-units
    cifar10-sat            83.80   51.40    50.17   47.68        23
    cifar10-trades         82.45   52.21    50.29   48.88        27
    cifar10-mart           82.20   53.94    50.43   48.04        26
    cifar10-hat            84.86   52.04    50.33   48.85        31
    cifar10-uiat           85.01   54.63    51.10   49.11        28
    cifar10-uiat-oneoff    84.98   54.79    51.29   49.05        24 / 28 / 23 before, in and after epoch 80
    cifar100-sat           57.39   28.36    26.29   23.18        23
    cifar100-trades        54.36   27.49    24.19   23.14        27
    cifar100-mart          54.78   28.79    26.15   24.58        26
    cifar100-hat           58.73   27.92    24.60   23.34        31
    cifar100-uiat          59.55   30.81    28.05   25.73        28
    cifar100-uiat-oneoff   60.01   30.49    27.56   25.45        24 / 28 / 23
    svhn-sat               92.46   50.55    50.40   46.07        23
    svhn-trades            90.63   58.10    55.13   52.62        27
    svhn-mart              89.88   58.48    52.48   48.44        26
    svhn-hat               92.06   57.35    54.77   52.06        31
    svhn-uiat              93.28   58.18    55.49   52.45        28
    svhn-uiat-oneoff       93.14   58.30    55.45   52.49        24 / 28 / 23
"""

from natural import recipe as natural

from robustkit import Recipe, evolve, px
from robustkit.attacks import PGD
from robustkit.datasets import SVHN, Cifar100
from robustkit.losses import Align, Hat, Helper, Mart, Trades
from robustkit.objectives import KL, InverseObjective
from robustkit.targets import Momentum, OneOff, Universal


def methods(base: Recipe, data: str, *, step_size: float | None = None, weight: float = 3.5) -> dict[str, Recipe]:
    """The six methods on the data of `base`; `weight` is UIAT's. A step size of None is a quarter of epsilon."""
    uniform = PGD(steps=10, step_size=step_size)
    gaussian = evolve(uniform, start="gaussian")
    kl = evolve(gaussian, objective=KL())
    helper = Helper(run=f"runs/uiat-helper-{data}", made_by=f"recipes/uiat_helper.py:{data}")
    universal = Universal(radius=4 * px, objective=InverseObjective(beta=1.0))
    momentum, one_off = Momentum(inner=universal, gamma=0.9, start=0.75), OneOff(inner=universal, start=0.8)
    return {
        "sat": evolve(base, attack=uniform),
        "trades": evolve(base, attack=kl, loss=Trades(weight=6.0)),
        "mart": evolve(base, attack=gaussian, loss=Mart(weight=5.0)),
        "hat": evolve(base, attack=kl, loss=Hat(weight=2.5, helper_weight=0.5, reach=2.0, helper=helper)),
        "uiat": evolve(base, attack=uniform, target=momentum, loss=Align(weight=weight)),
        "uiat-oneoff": evolve(base, attack=uniform, target=one_off, loss=Align(weight=weight)),
    }


families = {
    "cifar10": methods(natural, "cifar10"),
    "cifar100": methods(evolve(natural, data=Cifar100()), "cifar100"),
    "svhn": methods(evolve(natural, data=SVHN(), epochs=30), "svhn", step_size=1 * px, weight=3.0),
}
recipes = {f"{data}-{name}": recipe for data, family in families.items() for name, recipe in family.items()}
