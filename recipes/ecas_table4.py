"""ECAS's Table 4: methods beside ECAS-AWP, WRN-34-10 on CIFAR-10, L-inf 8/255.

Run:        robustkit run recipes/ecas_table4.py:ecas-awp, or another name below
Paper:      ECAS, BMVC 2023, Table 4 (PGD-AT: Madry et al. 2018; TRADES: Zhang et al. 2019; MART: Wang et al. 2020;
            FAT: Zhang et al. 2020; AWP: Wu et al. 2020)
Recipes:    ECAS-AWP as recipes/ecas_table2.py, which says what is open there. The others are their authors' own, and
            PGD-AT that of Bag-of-Tricks (Pang et al. 2021): 110 epochs, drops at 99 and 104. TRADES 76, MART 90
            and FAT 120 epochs, with a radius of 0.031 and steps of 0.007 in training; AWP 200, its attack in training
            mode. Batches of 128, the rate is 0.1; steps of 2/255 where nothing else is said
Cost:       forward-units a step in the last column, of FAT at most so many; 383 steps an epoch, as 1,024 images are
            held out
Measured:   not yet
Open:       the baselines' numbers are probably taken from earlier papers, so that nobody knows their conditions. The
            control of ECAS-AWP is ecas-awp-fixed. TRADES-AWP is in no row of it, and its row LAS-AWP is not here

Published:           clean   PGD-10   PGD-20   PGD-50   C&W     AutoAttack   forward-units
    pgd-at           85.17   56.07    55.08    54.88    53.91   51.69        23
    trades           85.72   56.75    56.10    55.90    53.87   53.40        27
    mart             84.17   58.98    58.56    58.06    54.58   51.10        26
    fat              87.97   50.31    49.86    48.79    48.65   47.48        23
    awp              85.57   58.92    58.13    57.92    56.03   53.90        26
    trades-awp       -       -        -        -        -       -            27 / 33 before epoch 10 and from there on
    ecas-awp         88.17   60.38    59.10    58.75    57.50   54.54        27
    ecas-awp-fixed   -       -        -        -        -       -            26
"""

from ecas_table2 import recipes as table2

from robustkit import evolve
from robustkit.attacks import PGD, Friendly
from robustkit.epsilons import Fixed
from robustkit.losses import CrossEntropy, Mart, Trades
from robustkit.objectives import KL
from robustkit.schedules import MultiStep
from robustkit.weights import AWP

ecas_awp = table2["cifar10-ecas-awp"]
pgd_at = evolve(table2["cifar10-ecas-pgd-at"], epsilon=Fixed(), loss=CrossEntropy())  # PGD then steps by a quarter
trades = evolve(
    pgd_at,
    epsilon=Fixed(value=0.031, step_fraction=0.007 / 0.031),
    attack=PGD(steps=10, objective=KL(), start="gaussian"),
    loss=Trades(weight=6.0),
    optimizer=evolve(pgd_at.optimizer, weight_decay=2e-4),
    schedule=MultiStep(at=(74,)),  # the rate of the 75th epoch is a tenth
    epochs=76,
)
recipes = {
    "pgd-at": pgd_at,
    "trades": trades,
    "mart": evolve(
        trades,
        attack=PGD(steps=10, start="gaussian"),
        loss=Mart(weight=6.0),
        optimizer=evolve(pgd_at.optimizer, weight_decay=7e-4),
        schedule=MultiStep(at=(74, 89)),
        epochs=90,
    ),
    "fat": evolve(
        trades,
        attack=Friendly(),
        loss=CrossEntropy(),
        schedule=MultiStep(at=(59, 89, 109), factor=(0.1, 0.1, 0.5)),
        epochs=120,
    ),
    "awp": evolve(ecas_awp, epsilon=Fixed(), attack=PGD(steps=10, mode="train")),
    "trades-awp": evolve(
        trades,
        epsilon=Fixed(),
        weights=AWP(gamma=0.005, start=10),
        optimizer=pgd_at.optimizer,
        schedule=MultiStep(at=(99, 149)),
        epochs=200,
    ),
    "ecas-awp": ecas_awp,
    "ecas-awp-fixed": table2["cifar10-ecas-awp-fixed"],
}
