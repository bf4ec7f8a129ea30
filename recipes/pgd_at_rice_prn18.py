"""PGD-AT as Rice et al. train it: pre-activation ResNet-18 on CIFAR-10, 200 epochs. It overfits after the first drop.

Run:        robustkit run recipes/pgd_at_rice_prn18.py
Paper:      Rice et al., Overfitting in adversarially robust deep learning, ICML 2020; the curves of UIAT, Figure 2 (a)
Cost:       23 forward-units a step (11 forwards, 10 input backwards, 1 parameter backward), 383 steps, 200 epochs
Published:  epoch 106, best on the test set: clean 82.92, PGD-10 53.49; epoch 200: clean 84.93, PGD-10 45.59 (from the
            logs that its authors released)
Measured:   not yet
Note:       the attack runs in training mode and moves the running statistics, as theirs does. Theirs also forwards the
            natural images once more after each step, for the log, which moves the statistics once more: not done here.
            It holds out 1,000 training images for choosing an epoch, or none; here it is 1,024.
"""

from robustkit import Model, Recipe, Suite, px
from robustkit.attacks import PGD
from robustkit.datasets import Cifar10
from robustkit.evaluation import CW, PGD_10, PGD_20, AutoAttack, Clean
from robustkit.losses import CrossEntropy
from robustkit.optimizers import SGD
from robustkit.schedules import MultiStep
from robustkit.threats import Linf

recipe = Recipe(
    data=Cifar10(augment="crop-flip", padding="reflect"),
    model=Model(backbone="preact_resnet18", normalization="cifar10"),
    threat=Linf(epsilon=8 * px),
    attack=PGD(steps=10, step_size=2 * px, mode="train"),
    loss=CrossEntropy(),
    optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
    schedule=MultiStep(at=(0.5, 0.75)),
    epochs=200,
    batch_size=128,
    evaluation=(Suite(measures=(Clean(), PGD_10, PGD_20, CW, AutoAttack())),),
)
