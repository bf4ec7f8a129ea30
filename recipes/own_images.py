"""Your own pictures, in a folder for each class: TRADES on a ResNet-18 at 64 x 64 pixels, L-inf 4/255.

Run:        robustkit run recipes/own_images.py data.root=photos
Paper:      none; Zhang et al., ICML 2019 for the method
Data:       photos/<class>/*.jpg of any sizes (a fifth of each class becomes test pictures, always the same ones), or
            photos/train/<class>/ and photos/test/<class>/
Set:        radius, size, network and its weights to begin from: docs/own_images.md says which
            robustkit run recipes/own_images.py data.root=photos data.size=128 model.pretrained=true optimizer.lr=0.02
Cost:       27 forward-units a step (13 forwards, 10 input backwards, 2 parameter backwards), 60 epochs
Measured:   docs/own_images.md
"""

from robustkit import Model, Recipe, Suite, Validation, px
from robustkit.attacks import PGD
from robustkit.datasets import ImageFolder
from robustkit.evaluation import PGD_20, AutoAttack, Clean
from robustkit.losses import Trades
from robustkit.objectives import KL
from robustkit.optimizers import SGD
from robustkit.schedules import OneCycle
from robustkit.threats import Linf

recipe = Recipe(
    data=ImageFolder(size=64, augment="crop-flip"),
    model=Model(backbone="resnet18", normalization="imagenet"),
    threat=Linf(epsilon=4 * px),
    attack=PGD(steps=10, objective=KL(), start="gaussian"),
    loss=Trades(weight=6.0),
    optimizer=SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    schedule=OneCycle(warm_up=0.25, cycle_momentum=False),
    epochs=60,
    batch_size=32,
    validation=Validation(images=64, train_images=64),
    evaluation=(Suite(measures=(Clean(), PGD_20, AutoAttack(images=256)), images=1000),),
)
