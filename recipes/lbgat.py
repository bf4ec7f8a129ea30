"""LBGAT, learnable boundary guided adversarial training: WRN-34-10 with a ResNet-18 teacher, CIFAR-10 and CIFAR-100.

Run:        robustkit run recipes/lbgat.py:cifar100-6, or another name below
Paper:      Cui et al., Learnable Boundary Guided Adversarial Training, ICCV 2021; settings from its code
Schedule:   100 epochs in batches of 128: the first at 0.02, then 0.1, 0.01 after epoch 75, 0.001 after 90
Cost:       forward-units a step in the last column (14 forwards, 10 input backwards, 3 parameter backwards); 383 steps
            an epoch, as 1,024 images are held out. 3 are the teacher's, next to WRN-34-10 a twelfth of that
Measured:   not yet
Note:       the number in a name is the weight of the consistency term (LBGAT0, LBGAT6). Trained and judged at 0.031,
            not 8/255, with steps of 0.007, as published. The checkpoint that is reported is not said.

Published:        clean   AutoAttack   forward-units
    cifar10-0     88.22   52.86        30
    cifar10-6     -       -            30
    cifar100-0    70.25   27.16        30
    cifar100-6    60.64   29.33        30
"""

from robustkit import Model, Recipe, evolve
from robustkit.attacks import PGD
from robustkit.datasets import Cifar10, Cifar100
from robustkit.heads import Linear
from robustkit.losses import LBGAT
from robustkit.objectives import KL
from robustkit.optimizers import SGD
from robustkit.schedules import MultiStep
from robustkit.threats import Linf

lbgat = Recipe(
    data=Cifar10(augment="crop-flip"),
    model=Model(backbone="wrn34_10"),
    head=Linear(zero_bias=True),
    threat=Linf(epsilon=0.031),
    attack=PGD(steps=10, step_size=0.007, objective=KL(), start="gaussian"),
    loss=LBGAT(weight=6.0, teacher=Model(backbone="resnet18_cifar")),
    optimizer=SGD(lr=0.02, momentum=0.9, weight_decay=2e-4),
    schedule=MultiStep(at=(1, 75, 90), factor=(5.0, 0.1, 0.1)),
    epochs=100,
    batch_size=128,
)
data = {"cifar10": Cifar10(augment="crop-flip"), "cifar100": Cifar100(augment="crop-flip")}
recipes = {
    f"{name}-{weight:g}": evolve(lbgat, data=images, loss=evolve(lbgat.loss, weight=weight))
    for name, images in data.items()
    for weight in (0.0, 6.0)
}
