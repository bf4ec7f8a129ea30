"""PGD-AT ("SAT"): ResNet-18 on CIFAR-10, cross-entropy on PGD-10 examples.

Run:        robustkit run recipes/pgd_at_rn18.py
Paper:      Madry et al., ICLR 2018; the "SAT" row of UIAT (CVPR 2023), Table 1, with its common schedule
Cost:       23 forward-units a step (11 forwards, 10 input backwards, 1 parameter backward), 383 steps, 100 epochs
Published:  clean 83.80, PGD-20 51.40, CW 50.17, AutoAttack 47.68 (UIAT Table 1)
Measured:   not yet
"""

from natural import recipe as natural

from robustkit import evolve
from robustkit.attacks import PGD

recipe = evolve(natural, attack=PGD(steps=10))
