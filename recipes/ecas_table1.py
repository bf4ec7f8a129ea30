"""ECAS's Table 1: five schedules of the radius under one recipe, WRN-34-10 on CIFAR-10, L-inf 8/255.

Run:        robustkit run recipes/ecas_table1.py:cyclic, or another name below
Paper:      ECAS, BMVC 2023, Table 1; training recipe from its code, which smooths labels (0.7 on the true class)
Schedule:   110 epochs in batches of 128, the rate is 0.1 and drops at 99 and 104; steps are 0.2 of the radius
Cost:       forward-units a step in the last column; 383 steps an epoch, as 1,024 images are held out
Measured:   not yet
Open:       the row Fixed is probably an earlier paper's, without label smoothing. Smoothing alone raises accuracy under
            PGD and moves the clean one, so that the control of the other rows is `fixed`, which has it, too. Linear
            goes from 3/255 to 12/255 here; the paper does not say. It selects the epoch on the test set.

Published:              clean   PGD-10   PGD-20   PGD-50   C&W     AutoAttack   forward-units
    fixed-unsmoothed    85.17   56.07    55.08    54.88    53.91   51.69        23
    fixed               -       -        -        -        -       -            23
    linear              83.51   57.04    55.87    55.48    54.97   52.73        23
    cyclic-batch        86.82   56.48    54.82    54.51    54.95   52.43        23
    cyclic              86.34   57.66    56.70    56.37    55.67   53.25        23
    ecas                86.32   57.80    56.80    56.48    55.89   53.43        24
"""

from ecas_pgd_at_wrn34 import recipe as ecas

from robustkit import evolve
from robustkit.epsilons import Cyclic, CyclicBatch, Fixed, Linear
from robustkit.losses import CrossEntropy

fixed = evolve(ecas, epsilon=Fixed(step_fraction=0.2))
recipes = {
    "fixed-unsmoothed": evolve(fixed, loss=CrossEntropy()),
    "fixed": fixed,
    "linear": evolve(ecas, epsilon=Linear()),
    "cyclic-batch": evolve(ecas, epsilon=CyclicBatch()),
    "cyclic": evolve(ecas, epsilon=Cyclic()),
    "ecas": ecas,
}
