"""TRADES: ResNet-18 on CIFAR-10, cross-entropy on natural images and KL to their adversarial examples.

Run:        robustkit run recipes/trades_rn18.py
Paper:      Zhang et al., ICML 2019; the TRADES row of UIAT (CVPR 2023), Table 1, with its common schedule
Cost:       27 forward-units a step (13 forwards, 10 input backwards, 2 parameter backwards), 383 steps, 100 epochs
Published:  clean 82.45, PGD-20 52.21, CW 50.29, AutoAttack 48.88 (UIAT Table 1; the weight is not stated there: 6)
Measured:   not yet
"""

from natural import recipe as natural

from robustkit import evolve
from robustkit.attacks import PGD
from robustkit.losses import Trades
from robustkit.objectives import KL

recipe = evolve(natural, attack=PGD(steps=10, objective=KL(), start="gaussian"), loss=Trades(weight=6.0))
