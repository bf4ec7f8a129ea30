"""UIAT's Table 4: a million generated images beside CIFAR's own; PreActResNet-18 and WRN-28-10 with SiLU, L-inf 8/255.

Run:        robustkit run recipes/uiat_table4.py:cifar10-prn18-uiat data.root=FOLDER, or another name below
Paper:      Dong et al., CVPR 2023, Table 4 (HAT: Rade and Moosavi-Dezfooli 2022; images: Rebuffi et al. 2021)
Data:       cifar10_ddpm.npz or cifar100_ddpm.npz in FOLDER: a million images of a diffusion model, which Rebuffi et al.
            list at github.com/google-deepmind/deepmind-research, adversarial_robustness. Own images are 0.3 (CIFAR-10)
            or 0.4 (CIFAR-100) of each batch
Schedule:   one cycle to 0.2, 400 epochs of 98 batches of 512; averaged weights (0.995). HAT's numbers are its authors'
            own, so its recipes are as they trained: batches of 1,024 at 0.4, 49 an epoch
Cost:       forward-units a step in the last column. UIAT one-off keeps forwarding after epoch 320: of 512 images most
            were not drawn in that epoch
Helper:     HAT needs a natural network of its own architecture first, trained on CIFAR's own images:
            robustkit run recipes/uiat_table4.py:cifar10-prn18-helper --out runs/uiat-helper-cifar10-prn18
Measured:   not yet
Open:       UIAT states neither its weight here (3.5 as without synthetic data), nor label smoothing (0.1 on its
            cross-entropy, as HAT's code), nor which checkpoint (here last, and best on held-out images by PGD-40 on the
            margin, as HAT's code). The numbers of HAT on CIFAR-100 with WRN-28-10 are its authors' for WRN-34-10.
Rebuffi:    their own too, after their published code: TRADES, batches of 1,024 at 0.4, a rise of 10 epochs and half a
            cosine, an attack that steps by Adam, smoothed labels of generated images alone, running statistics of
            adversarial images alone. Theirs are of 256 images on each of four devices, here of the whole batch; their
            average begins at 0.1 of the old weights, ours at 2/11; which images they held out is not known

Published:                        clean   AutoAttack   forward-units
    cifar10-prn18-uiat            87.34   58.46        28
    cifar10-prn18-uiat-oneoff     87.10   58.15        24 / 28 / 24 before, in and after epoch 320
    cifar10-prn18-hat             86.86   57.09        31
    cifar10-prn18-rebuffi         83.53   56.66        27
    cifar10-prn18-helper          -       -            3
    cifar10-wrn28-uiat            88.93   61.32        28
    cifar10-wrn28-uiat-oneoff     88.50   61.40        24 / 28 / 24
    cifar10-wrn28-hat             88.16   60.97        31
    cifar10-wrn28-rebuffi         85.97   60.73        27
    cifar10-wrn28-helper          -       -            3
    cifar100-prn18-uiat           62.20   29.40        28
    cifar100-prn18-uiat-oneoff    61.54   28.90        24 / 28 / 24
    cifar100-prn18-hat            61.50   28.88        31
    cifar100-prn18-rebuffi        56.87   28.50        27
    cifar100-prn18-helper         -       -            3
    cifar100-wrn28-uiat           63.26   31.18        28
    cifar100-wrn28-uiat-oneoff    62.45   31.43        24 / 28 / 24
    cifar100-wrn28-hat            62.21   31.16        31
    cifar100-wrn28-rebuffi        59.18   30.81        27
    cifar100-wrn28-helper         -       -            3
"""

from typing import Literal

from uiat_helper import recipes as helpers

from robustkit import Model, Recipe, Validation, evolve, px
from robustkit.attacks import PGD, AdamPGD
from robustkit.datasets import Cifar10, Cifar100, WithSynthetic
from robustkit.losses import Align, CrossEntropy, Hat, Helper, Trades
from robustkit.objectives import KL, InverseObjective, Margin
from robustkit.optimizers import SGD
from robustkit.schedules import Cosine, OneCycle
from robustkit.targets import Momentum, OneOff, Universal
from robustkit.threats import Linf
from robustkit.weights import Exponential

DATA = {
    "cifar10": WithSynthetic(inner=Cifar10(), file="cifar10_ddpm.npz", original=0.3),
    "cifar100": WithSynthetic(inner=Cifar100(), file="cifar100_ddpm.npz", original=0.4),
}
BACKBONES = {"prn18": "preact_resnet18_silu", "wrn28": "wrn28_10_silu"}


def methods(data: Literal["cifar10", "cifar100"], network: str) -> dict[str, Recipe]:
    """The methods on one data set with one network, and the helper that HAT needs."""
    base = Recipe(
        data=DATA[data],
        model=Model(backbone=BACKBONES[network], normalization=data, adopt_first_batch=True),
        threat=Linf(epsilon=8 * px),
        attack=PGD(steps=10, step_size=2 * px),
        loss=CrossEntropy(),
        optimizer=SGD(lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4, decay_norm=False),
        schedule=OneCycle(warm_up=0.25),
        average=Exponential(rate=0.995),
        epochs=400,
        batch_size=512,
        validation=Validation(images=1024, attack=PGD(steps=40, step_size=2 * px, objective=Margin())),
    )
    universal = Universal(radius=4 * px, objective=InverseObjective(beta=1.0))
    aligned = evolve(base, target=universal, loss=Align(weight=3.5, label_smoothing=0.1))
    folder, name = f"runs/uiat-helper-{data}-{network}", f"recipes/uiat_table4.py:{data}-{network}-helper"
    hat = Hat(weight=3.5, helper_weight=0.5, label_smoothing=0.1, helper=Helper(run=folder, made_by=name))
    return {
        "uiat": evolve(aligned, target=Momentum(inner=universal, gamma=0.9, start=350 / 400)),
        "uiat-oneoff": evolve(aligned, target=OneOff(inner=universal, start=320 / 400)),
        "hat": evolve(
            base,
            attack=evolve(base.attack, objective=KL(), mode="train-frozen"),
            loss=hat,
            optimizer=evolve(base.optimizer, lr=0.4),
            batch_size=1024,
        ),
        "rebuffi": evolve(
            base,
            attack=AdamPGD(steps=10, lr=0.1, drop=5, objective=KL(), mode="train-frozen"),
            loss=Trades(weight=6.0, label_smoothing=0.1, smoothed="synthetic", natural_statistics=False),
            optimizer=evolve(base.optimizer, lr=0.4),
            schedule=Cosine(every="step", warm_up=10 / 400),
            batch_size=1024,
        ),
        "helper": evolve(helpers[data], model=base.model),
    }


recipes = {
    f"{data}-{network}-{name}": recipe
    for data in DATA
    for network in BACKBONES
    for name, recipe in methods(data, network).items()
}
