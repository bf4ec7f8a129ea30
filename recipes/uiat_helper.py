"""HAT's helper: a natural ResNet-18 on CIFAR-10, CIFAR-100 or SVHN, which labels images beyond the adversarial ones.

Run:        robustkit run recipes/uiat_helper.py:cifar10 --out runs/uiat-helper-cifar10
            robustkit run recipes/uiat_helper.py:cifar100 --out runs/uiat-helper-cifar100
            robustkit run recipes/uiat_helper.py:svhn --out runs/uiat-helper-svhn
Paper:      Rade and Moosavi-Dezfooli, ICLR 2022; settings of its code: 50 epochs, one cycle to 0.21, batches of 128
Cost:       3 forward-units a step (1 forward, 1 parameter backward), 383 steps an epoch (SVHN 565)
Published:  no table
Measured:   not yet
Note:       the code keeps the epoch with the best accuracy on the test set; here held-out training images choose.
"""

from natural import recipe as natural

from robustkit import Validation, evolve
from robustkit.datasets import SVHN, Cifar10, Cifar100
from robustkit.optimizers import SGD

helper = evolve(
    natural,
    optimizer=SGD(lr=0.21, momentum=0.9, nesterov=True, weight_decay=5e-4),
    epochs=50,
    validation=Validation(attack=None),
)
recipes = {
    "cifar10": evolve(helper, data=Cifar10()),
    "cifar100": evolve(helper, data=Cifar100()),
    "svhn": evolve(helper, data=SVHN()),
}
