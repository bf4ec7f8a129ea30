"""N-FGSM + UIAT one-off: PreActResNet-18 on CIFAR-10, single-step attacks, inverse adversarial targets of one epoch.

Run:        robustkit run recipes/nfgsm_uiat_prn18.py   (in plugins/robustkit-nfgsm; after pip install robustkit-nfgsm)
Paper:      Dong et al., "The Enemy of My Enemy is My Friend" (UIAT), CVPR 2023, section 4.3 and supplement 2.3
Cost:       6 forward-units a step before epoch 24, 8 in it, 5 after it; 383 steps, 30 epochs
Published:  clean 81.85, robust 49.84 (UIAT, Table 5: it says AutoAttack; the level is that of PGD-50 with 10 restarts)
            85.53, 58.21 with threat.epsilon=6/255; 77.85, 42.77 with threat.epsilon=10/255
Measured:   not yet

The paper states neither the target's weight, nor its epoch, its radius or the network here: these are those of its
other experiments and of N-FGSM. The feature term is off (beta = 0), as it says.
"""

from nfgsm_prn18 import recipe as nfgsm

from robustkit import evolve, px
from robustkit.losses import Align
from robustkit.objectives import InverseObjective
from robustkit.targets import OneOff, Universal

recipe = evolve(
    nfgsm,
    target=OneOff(inner=Universal(radius=4 * px, objective=InverseObjective(beta=0.0)), start=0.8),
    loss=Align(weight=3.5),
)
