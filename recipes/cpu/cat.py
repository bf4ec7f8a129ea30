"""CAT under a small budget: 10,000 images of CIFAR-10, a quarter of the width, two CPU cores.

Run:        robustkit run recipes/cpu/cat.py
Paper:      as recipes/cat.py
Changed:    all but data, threat, loss and evaluation: the budget is that of recipes/cpu/uiat_table1.py, 12 epochs of 75
            steps in batches of 128 on one cycle, bfloat16 where the CPU has it. Stages that wait ten epochs would not
            pass in twelve, so they end by the paper's other rule, at 30 % accuracy on training batches. The radius is
            8/255.
Cost:       10 forward-units a step in the last stage, k + 3 in stage k
Published:  nothing at this size
Measured:   not yet
"""

from uiat_table1 import natural

from robustkit import evolve
from robustkit.attacks import PGD, Grouped
from robustkit.epsilons import Curriculum

recipe = evolve(
    natural,
    epsilon=Curriculum(rule="training", train_accuracy=0.3),
    attack=Grouped(inner=PGD(steps=7, mode="train")),
)
