"""DAT, dynamic adversarial training: attack an image until it meets a criterion that tightens in training.

Run:        robustkit run recipes/dat.py:dat, or recipes/dat.py:dat-code
Paper:      Wang et al., On the Convergence and Robustness of Adversarial Training, ICML 2019; settings from its code
Schedule:   120 epochs in batches of 128, SGD from 0.01, a tenth from epoch 60, a hundredth from 100; the criterion
            falls from 0.5 to 0 over the first 100
Cost:       at most so many forward-units a step as in the last column; 383 steps an epoch, as 1,024 images are held out
Measured:   not yet
Open:       `dat` is the paper's method: the criterion measured from the clean image, all images weighing the same.
            `dat-code` is what the code does: measured from the random start, and each image's loss times its own value.
            The row below is as FAT's authors (ICML 2020) list it; which of the two it is, nobody says.
Differs:    the code is in Keras. Its WRN-32-10 has the widths and blocks of wrn34_10 (it counts 6n + 2 layers), but
            biases in its convolutions, and no normalisation before a block's first convolution. Its rate also falls by
            1 / (1 + step / 10,000), to 0.18 of what it would be at the end. It rotates by up to 10 degrees and shifts
            by up to 6 pixels, repeating those of the border; here 15 degrees, 4 pixels, zeros. Its L2 penalty of 0.002
            on kernels is a weight decay of 0.004 that spares norms and biases.

Published:     clean   FGSM    PGD-20   CW      forward-units
    dat        85.03   63.53   48.70    47.27   23
    dat-code   85.03   63.53   48.70    47.27   23 / 24 from the second epoch
"""

from robustkit import Model, Recipe, Suite, evolve
from robustkit.attacks import Dynamic
from robustkit.datasets import Cifar10
from robustkit.evaluation import STANDARD, Attacked
from robustkit.losses import CrossEntropy, SelfWeighted
from robustkit.objectives import Margin
from robustkit.optimizers import SGD
from robustkit.schedules import MultiStep
from robustkit.threats import Linf

fgsm = Attacked(key="fgsm", steps=1, step_size=0.031)
cw_30 = Attacked(key="cw-30", steps=30, objective=Margin())
dat = Recipe(
    data=Cifar10(augment="crop-flip-rotate"),
    model=Model(backbone="wrn34_10"),
    threat=Linf(epsilon=0.031),
    attack=Dynamic(steps=10, threshold=0.5, until=100 / 120, center="clean"),
    loss=CrossEntropy(),
    optimizer=SGD(lr=0.01, momentum=0.9, weight_decay=4e-3, decay_norm_and_bias=False),
    schedule=MultiStep(at=(59, 99)),
    epochs=120,
    batch_size=128,
    evaluation=(Suite(measures=(*STANDARD.measures, fgsm, cw_30)),),
)
recipes = {
    "dat": dat,
    "dat-code": evolve(dat, attack=evolve(dat.attack, center="start"), loss=SelfWeighted()),
}
