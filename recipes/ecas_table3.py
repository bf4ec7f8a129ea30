"""ECAS's Table 3: its radii in PGD-AT, TRADES and AWP, ResNet-18 on CIFAR-10, L-inf 8/255; and on CIFAR-100.

Run:        robustkit run recipes/ecas_table3.py:cifar10-ecas-pgd-at, or another name below
Paper:      ECAS, BMVC 2023, Tables 2 and 3; the paper has no number, and its code no ResNet-18, for CIFAR-100
Recipes:    those of recipes/ecas_table2.py, which also says what is open, with another network
Cost:       forward-units a step in the last column; 383 steps an epoch, as 1,024 images are held out
Measured:   not yet
Open:       thresholds are the published ones. An untrained ResNet-18 hardly exceeds h_high (four of five seeds), so
            that training begins without lowering radii: see docs/kinds/epsilons.md

Published:                                 clean   AutoAttack   forward-units
    cifar10-ecas-pgd-at                    81.39   49.94        24
    cifar10-ecas-pgd-at-fixed              -       -            23
    cifar10-ecas-pgd-at-fixed-unsmoothed   -       -            23
    cifar10-ecas-trades                    -       -            28
    cifar10-ecas-trades-fixed              -       -            27
    cifar10-ecas-trades-code               78.61   48.83        27
    cifar10-ecas-trades-code-fixed         -       -            26
    cifar10-ecas-awp                       83.16   49.64        27
    cifar10-ecas-awp-fixed                 -       -            26
    cifar100-ecas-pgd-at                   -       -            24
    cifar100-ecas-pgd-at-fixed             -       -            23
    cifar100-ecas-pgd-at-fixed-unsmoothed  -       -            23
    cifar100-ecas-trades                   -       -            28
    cifar100-ecas-trades-fixed             -       -            27
    cifar100-ecas-trades-code              -       -            28
    cifar100-ecas-trades-code-fixed        -       -            27
    cifar100-ecas-awp                      -       -            27
    cifar100-ecas-awp-fixed                -       -            26
"""

from ecas_pgd_at_wrn34 import recipe as ecas_pgd_at
from ecas_table2 import methods

from robustkit import Model, evolve
from robustkit.heads import Linear

resnet18 = evolve(ecas_pgd_at, model=Model(backbone="resnet18_cifar"), head=Linear())
recipes = {
    f"{data}-{name}": recipe for data in ("cifar10", "cifar100") for name, recipe in methods(resnet18, data).items()
}
