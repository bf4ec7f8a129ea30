"""PGD-AT on MNIST at L-inf 0.3: a small convolutional network, 40 steps of 0.01.

Run:        robustkit run recipes/mnist.py      (in plugins/robustkit-mnist; after pip install robustkit-mnist)
Paper:      Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018
Cost:       83 forward-units a step (41 forwards, 40 input backwards, 1 parameter backward), 460 steps, 12 epochs
Published:  none with this network and this many epochs
Measured:   not yet
"""

from robustkit_mnist import Mnist

from robustkit import Model, Recipe, Suite
from robustkit.attacks import PGD
from robustkit.evaluation import Attacked, AutoAttack, Clean
from robustkit.losses import CrossEntropy
from robustkit.optimizers import SGD
from robustkit.schedules import OneCycle
from robustkit.threats import Linf

attacked = Attacked(key="pgd-40", steps=40, step_size=0.01)
recipe = Recipe(
    data=Mnist(),
    model=Model(backbone="convnet_small"),
    threat=Linf(epsilon=0.3),
    attack=PGD(steps=40, step_size=0.01),
    loss=CrossEntropy(),
    optimizer=SGD(lr=0.05, momentum=0.9, nesterov=True),
    schedule=OneCycle(),
    epochs=12,
    batch_size=128,
    evaluation=(Suite(measures=(Clean(), attacked, AutoAttack(images=1000))),),
)
