"""ECAS-PGD-AT: WRN-34-10 on CIFAR-10, radii cycled over epochs and adjusted by each image's entropy.

Run:        robustkit run recipes/ecas_pgd_at_wrn34.py
Paper:      ECAS, BMVC 2023, Table 1; training recipe from its code (label smoothing 0.7, drops at 99 and 104)
Cost:       24 forward-units a step (12 forwards, 10 input backwards, 1 parameter backward), 383 steps, 110 epochs
Published:  clean 86.32, PGD-10 57.80, PGD-20 56.80, PGD-50 56.48, C&W 55.89, AutoAttack 53.43, best epoch on test
Measured:   not yet
Note:       compare with recipes/ecas_table1.py:fixed, which is this very recipe at one radius: label smoothing alone
            moves these numbers. The published ones select the epoch on the test set; here validation images do.
"""

from robustkit import Model, Recipe, px
from robustkit.attacks import PGD
from robustkit.datasets import Cifar10
from robustkit.epsilons import ECAS
from robustkit.evaluation import ECAS as SUITE
from robustkit.heads import Linear
from robustkit.losses import CrossEntropy
from robustkit.optimizers import SGD
from robustkit.schedules import MultiStep
from robustkit.threats import Linf

recipe = Recipe(
    data=Cifar10(),
    model=Model(backbone="wrn34_10"),
    head=Linear(zero_bias=True),
    threat=Linf(epsilon=8 * px),
    epsilon=ECAS(values=tuple(k * px for k in range(3, 13)), big=3, h_low=1.3, h_high=2.274),
    attack=PGD(steps=10),
    loss=CrossEntropy(label_smoothing=1 / 3),
    optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
    schedule=MultiStep(at=(99, 104)),
    epochs=110,
    batch_size=128,
    evaluation=(SUITE,),
)
