"""UIAT one-off: ResNet-18 on CIFAR-10, inverse adversarial targets computed in one epoch and kept.

Run:        robustkit run recipes/uiat_oneoff_rn18.py
Paper:      Dong et al., CVPR 2023, section 3.3 and supplement 2.2, Table 1
Cost:       24 forward-units a step before epoch 80, 28 in it, 23 after it; 383 steps, 100 epochs
Published:  clean 84.98, PGD-20 54.79, CW 51.29, AutoAttack 49.05
Measured:   not yet
"""

from uiat_rn18 import recipe as uiat

from robustkit import evolve, px
from robustkit.targets import OneOff, Universal

recipe = evolve(uiat, target=OneOff(inner=Universal(radius=4 * px), start=0.8))
