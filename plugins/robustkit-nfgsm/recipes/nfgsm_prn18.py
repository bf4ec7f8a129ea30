"""N-FGSM: PreActResNet-18 on CIFAR-10, adversarial training at the price of a single step.

Run:        robustkit run recipes/nfgsm_prn18.py        (in plugins/robustkit-nfgsm; after pip install robustkit-nfgsm)
Paper:      de Jorge et al., "Make Some Noise: Reliable and Efficient Single-Step Adversarial Training", NeurIPS 2022
Cost:       5 forward-units a step (2 forwards, 1 input backward, 1 parameter backward), 383 steps, 30 epochs; PGD-10 23
Published:  clean 80.29, robust 48.24 (UIAT, CVPR 2023, Table 5: it says AutoAttack; the level is that of PGD-50 with 10
            restarts)
            84.66, 56.36 with threat.epsilon=6/255; 75.59, 41.54 with threat.epsilon=10/255
Measured:   not yet
Small:      recipes/cpu/nfgsm_prn18.py

As in the authors' code, the rate climbs to 0.2 and falls to 0 step by step, the momentum moves 0.9 -> 0.8 -> 0.9, and
the attack runs in training mode. Unlike there, 1,024 training images are held out.
"""

from robustkit_nfgsm import NFGSM

from robustkit import Model, Recipe, Suite, px
from robustkit.datasets import Cifar10
from robustkit.evaluation import PGD_50_10, STANDARD
from robustkit.losses import CrossEntropy
from robustkit.optimizers import SGD
from robustkit.schedules import Triangular
from robustkit.threats import Linf

recipe = Recipe(
    data=Cifar10(augment="crop-flip"),
    model=Model(backbone="preact_resnet18_raw", normalization="cifar10"),
    threat=Linf(epsilon=8 * px),
    attack=NFGSM(noise=2.0, step=1.0),
    loss=CrossEntropy(),
    optimizer=SGD(lr=0.2, momentum=0.9, weight_decay=5e-4),
    schedule=Triangular(peak=0.5, cycle_momentum=True),
    epochs=30,
    batch_size=128,
    evaluation=(Suite(measures=(*STANDARD.measures, PGD_50_10)),),
)
