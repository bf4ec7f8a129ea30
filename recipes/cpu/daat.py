"""DAAT, re-implemented from its abstract, under a small budget: 10,000 images of CIFAR-10, two CPU cores.

Run:        robustkit run recipes/cpu/daat.py
Paper:      as recipes/daat.py; provisional, and nothing measured with it is a result of DAAT
Changed:    the budget is that of recipes/cpu/uiat_table1.py: a ResNet-18 of a quarter of the width, 12 epochs of 75
            steps in batches of 128 on one cycle, bfloat16 where the CPU has it
Helper:     it needs the natural network first:
            robustkit run recipes/cpu/uiat_table1.py:natural --out runs/uiat-helper-cpu
Cost:       31 forward-units a step, 8 of them the helper's
Published:  nothing
Measured:   not yet
"""

from uiat_table1 import helper, pgd_at

from robustkit import evolve
from robustkit.attacks import PGD, Calibrated

recipe = evolve(pgd_at, attack=Calibrated(inner=PGD(steps=10), helper=helper))
