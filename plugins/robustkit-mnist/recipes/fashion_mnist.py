"""PGD-AT on Fashion-MNIST at L-inf 0.1: a PreActResNet-18 on images padded to 32x32.

Run:        robustkit run recipes/fashion_mnist.py  (in plugins/robustkit-mnist; after pip install robustkit-mnist)
Paper:      Madry et al., ICLR 2018, on the data of Xiao et al. 2017
Cost:       23 forward-units a step (11 forwards, 10 input backwards, 1 parameter backward), 460 steps, 30 epochs
Published:  none with these settings
Measured:   not yet
"""

from robustkit_mnist import FashionMnist

from robustkit import Model, Recipe
from robustkit.attacks import PGD
from robustkit.losses import CrossEntropy
from robustkit.optimizers import SGD
from robustkit.schedules import OneCycle
from robustkit.threats import Linf

recipe = Recipe(
    data=FashionMnist(size=32, augment="crop"),
    model=Model(backbone="preact_resnet18"),
    threat=Linf(epsilon=0.1),
    attack=PGD(steps=10),
    loss=CrossEntropy(),
    optimizer=SGD(lr=0.1, momentum=0.9),
    schedule=OneCycle(),
    epochs=30,
    batch_size=128,
)
