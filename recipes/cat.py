"""CAT, curriculum adversarial training: ResNet-18 on CIFAR-10, from natural images to PGD-7, a stage at a time.

Run:        robustkit run recipes/cat.py
Paper:      Cai et al., Curriculum Adversarial Training, IJCAI 2018; settings from its code
Cost:       10 forward-units a step in the last stage, k + 3 in stage k; 245 steps an epoch, 300 epochs
Published:  on a WRN-32-10, as FAT's authors list it (ICML 2020): clean 77.43, FGSM 57.17, PGD-20 46.06, CW 42.28
Measured:   not yet
Differs:    the code trains ResNet-50 or DenseNet-161 by Adam at 1e-4; here its other choice, SGD at 0.1, on the
            ResNet-18 of the other recipes. Its validation rounds pixels to 16 levels: left out. Its stages have no end
            under this rule; here the 7th is the last. In a new stage it measures the weights it went back to, and
            keeps an epoch that is better than those; here the first epoch of a stage is always kept.
Note:       `stage` in metrics.jsonl is the stage of each epoch. It ends only above 90 % accuracy on training batches;
            where that is out of reach: epsilon.train_accuracy=0.8, or epsilon.rule=training.
"""

from robustkit import Model, Recipe, Validation, px
from robustkit.attacks import PGD, Grouped
from robustkit.datasets import Cifar10
from robustkit.epsilons import Curriculum
from robustkit.losses import CrossEntropy
from robustkit.optimizers import SGD
from robustkit.schedules import Constant
from robustkit.threats import Linf

recipe = Recipe(
    data=Cifar10(augment="crop-flip"),
    model=Model(backbone="resnet18_cifar"),
    threat=Linf(epsilon=8 * px),
    epsilon=Curriculum(value=0.032, stages=7, rule="validation", patience=10, train_accuracy=0.9),
    attack=Grouped(inner=PGD(steps=7, mode="train")),
    loss=CrossEntropy(),
    optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
    schedule=Constant(),
    epochs=300,
    batch_size=200,
    validation=Validation(images=1000),
)
