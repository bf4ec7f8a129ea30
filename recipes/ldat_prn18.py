"""LDAT: pre-activation ResNet-18 on CIFAR-10. A Gaussian for each class, natural and adversarial images mixed.

Run:        robustkit run recipes/ldat_prn18.py
Paper:      Learnable distribution adversarial training, CMC 78(3), 2024, Table 1
Cost:       26 forward-units a step (12 forwards, 10 input backwards, 2 parameter backwards), 383 steps, 250 epochs
Published:  natural 89.02; L-inf 8/255: PGD 58.44, APGD 59.63, FAB 48.57, DeepFool 69.19; L2 0.5: PGD 64.55,
            APGD 69.28, FAB 64.21, C&W 66.66, DeepFool 72.59
Measured:   not yet
Mind:       in L-inf FAB takes 9.87 points more than PGD, which tells of masked gradients: PGD's number is no measure of
            this model. The paper does not report AutoAttack; here it decides. Run `robustkit audit` on the result.
Open:       the weight of the likelihood grows from 0 to 1 here, as the paper argues; its experiments let it fall
            (`head.likelihood_schedule=down`). It gives no steps of the training attack (10 here), no margin's formula
            (L-GM's), and neither batch size, momentum, weight decay, augmentation, normalisation of the input, modes
            nor the checkpoint that it reports. It trains in L2 1.5; validation is in the L-inf ball that judges.
"""

from robustkit import Model, Recipe, Suite, px
from robustkit.attacks import LDAT, Within
from robustkit.datasets import Cifar10
from robustkit.evaluation import CW, PGD_20, PGD_40, AutoAttack, Clean
from robustkit.evaluation.suites import APGD_DLR, FAB
from robustkit.heads import GaussianMixture
from robustkit.losses import Mixed
from robustkit.optimizers import SGD
from robustkit.schedules import Cosine
from robustkit.threats import L2, Linf

recipe = Recipe(
    data=Cifar10(augment="crop-flip"),
    model=Model(backbone="preact_resnet18"),
    head=GaussianMixture(margin=0.1, likelihood=1.0, likelihood_schedule="up"),
    threat=Linf(epsilon=8 * px),
    attack=Within(threat=L2(epsilon=1.5), inner=LDAT(steps=10, step="adam", lr=0.2, gamma=0.2)),
    loss=Mixed(beta=0.5),
    optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
    schedule=Cosine(),
    epochs=250,
    batch_size=128,
    evaluation=(
        Suite(measures=(Clean(), PGD_20, PGD_40, CW, APGD_DLR, FAB, AutoAttack())),
        Suite(name="l2", threat=L2(epsilon=0.5), measures=(PGD_40, APGD_DLR, FAB, AutoAttack())),
    ),
)
