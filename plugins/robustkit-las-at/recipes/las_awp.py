"""LAS-AWP: AT-AWP whose radius, steps and step size are drawn for each image from a policy that is learnt.

Run:        robustkit run recipes/las_awp.py:cifar10-wrn34, or another name below
            (in plugins/robustkit-las-at; after pip install robustkit-las-at)
Paper:      Jia et al., "LAS-AT: Adversarial Training with Learnable Attack Strategy", CVPR 2022; settings of its code
Cost:       forward-units a step below, on average: 38 (cifar100: 36), and 83 (81) more for what the policy learns
            from, in each step (cifar100: each 10th); 383 steps, 200 epochs. S is a forward of the policy's ResNet-18:
            1 beside a ResNet-18, 0.083 beside a WRN-34-10. AT-AWP has 26
Published:  as ECAS (BMVC 2023), Tables 2 and 3, reports it; the epoch is selected on the test set
Measured:   not yet

                    clean  AutoAttack   forward-units
    cifar10-wrn34   87.74  55.52        121 + 4 S
    cifar10-rn18    82.61  49.86        121 + 4 S
    cifar100-wrn34  64.89  30.77        44.1 + 1.3 S
    cifar100-rn18   -      -            44.1 + 1.3 S

As in the code, examples end within 8/255 whatever their radius, and only the rehearsed step smooths labels. Unlike
there, every forward on CIFAR-10 normalises its images (the code forgets it in the rewards and in the rehearsed
perturbation of weights), there is no second forward of the natural images for the log, 1,024 training images are held
out, and the epoch is selected on them.
"""

from robustkit_las_at import LASAT

from robustkit import Model, Recipe, evolve, px
from robustkit.attacks import PGD
from robustkit.datasets import Cifar10, Cifar100
from robustkit.heads import Linear
from robustkit.losses import CrossEntropy
from robustkit.optimizers import SGD
from robustkit.schedules import MultiStep
from robustkit.threats import Linf
from robustkit.weights import AWP

drops = MultiStep(at=(100, 150))
cifar10 = Recipe(
    data=Cifar10(augment="crop-flip", padding="reflect"),
    model=Model(backbone="wrn34_10", normalization="cifar10"),
    head=Linear(zero_bias=True),
    threat=Linf(epsilon=8 * px),
    epsilon=LASAT(
        radii=tuple(k * px for k in range(7, 16)),
        steps=tuple(range(8, 17)),
        step_sizes=tuple(k * px for k in range(2, 6)),
        interval=1,
        robust_reward=1.0,
        natural_reward=1.0,
        rehearsal_loss=CrossEntropy(label_smoothing=1 / 3),  # the code's factor 0.7
        stop_when_fooled=False,
        schedule=drops,
    ),
    attack=PGD(steps=16, start_epsilon=8 * px, final_epsilon=8 * px),
    loss=CrossEntropy(),
    weights=AWP(gamma=0.01),
    optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
    schedule=drops,
    epochs=200,
    batch_size=128,
)
cifar100 = evolve(
    cifar10,
    data=Cifar100(augment="crop-flip"),
    model=Model(backbone="wrn34_10"),
    epsilon=evolve(
        cifar10.epsilon,
        steps=tuple(range(8, 16)),
        interval=10,
        robust_reward=4.0,
        natural_reward=2.0,
        rehearsal_loss=CrossEntropy(label_smoothing=0.30303),
        momentum=0.9,
        weight_decay=5e-4,
    ),
    attack=PGD(steps=15, start_epsilon=8 * px, final_epsilon=8 * px),
)
recipes = {
    "cifar10-wrn34": cifar10,
    "cifar10-rn18": evolve(cifar10, model=Model(backbone="resnet18_cifar", normalization="cifar10"), head=Linear()),
    "cifar100-wrn34": cifar100,
    "cifar100-rn18": evolve(cifar100, model=Model(backbone="resnet18_cifar"), head=Linear()),
}
