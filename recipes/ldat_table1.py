"""LDAT's Table 1: LDAT and its baselines on CIFAR-10, PreActResNet-18; and the other readings of LDAT.

Run:        robustkit run recipes/ldat_table1.py:ldat, or another name below
Paper:      Learnable distribution adversarial training, CMC 78(3), 2024, Table 1 (TRADES: Zhang et al. 2019; MART: Wang
            et al. 2020; LBGAT: Cui et al. 2021); ALP (Kannan et al. 2018) is not in it
Schedule:   cosine from 0.1, 250 epochs in batches of 128, for all: the paper gives it for LDAT
Cost:       forward-units a step in the last column; 383 steps an epoch, as 1,024 images are held out. LBGAT's are 27
            and 3 of its teacher
Measured:   not yet
Note:       `ldat` is recipes/ldat_prn18.py. `ldat-down`: the likelihood's weight falls from 1; `ldat-unit`: the attack
            adds unit gradients (Algorithm 1) in place of Adam's steps; `ldat-no-margin`: Eq. 6 read literally;
            `ldat-fixed`: centres fixed on a simplex
Open:       what recipes/ldat_prn18.py says. Of the baselines the paper gives LBGAT's weight, 6; here PGD-10 in L-inf
            8/255, weights 6 (TRADES) and 5 (MART), and a ResNet-18 teacher. Its standard row lies between the best and
            the last epoch of recipes/pgd_at_rice_prn18.py. `lbgat-0` and `alp`, at its authors' 0.5, are our additions.
Mind:       "APGD" is untargeted, on DLR; AutoAttack is not in the table, and decides here. DeepFool (both norms) and
            C&W, which need foolbox, are measured by `robustkit eval RUN --suite ldat`

Published:            clean   L-inf: PGD   APGD    FAB     DeepFool   L2: PGD   APGD    FAB     C&W     DeepFool   units
    standard          84.78   48.88   49.71   47.83   53.02   60.73   60.48   59.62   60.70   63.44   23
    trades            82.76   51.46   49.62   49.60   54.54   60.32   58.88   58.81   58.81   63.48   27
    mart              82.62   52.46   49.47   48.50   53.81   62.31   59.56   58.94   59.90   63.06   26
    lbgat             85.35   51.58   50.81   50.88   55.34   62.54   61.35   61.23   61.58   65.53   30
    ldat              89.02   58.44   59.63   48.57   69.19   64.55   69.28   64.21   66.66   72.59   26
    lbgat-0           -       30
    alp               -       26
    ldat-down         -       26
    ldat-unit         -       26
    ldat-no-margin    -       26
    ldat-fixed        -       26
"""

from ldat_prn18 import recipe as ldat

from robustkit import Recipe, evolve
from robustkit.attacks import LDAT, PGD
from robustkit.heads import Linear
from robustkit.losses import ALP, LBGAT, CrossEntropy, Mart, Trades
from robustkit.objectives import KL


def baselines(ldat: Recipe) -> dict[str, Recipe]:
    """The methods that LDAT is compared with, under its schedule."""
    plain = evolve(ldat, head=Linear(), attack=PGD(steps=10), loss=CrossEntropy())
    gaussian = PGD(steps=10, start="gaussian")
    kl = evolve(gaussian, objective=KL())
    return {
        "standard": plain,
        "trades": evolve(plain, attack=kl, loss=Trades(weight=6.0)),
        "mart": evolve(plain, attack=gaussian, loss=Mart(weight=5.0)),
        "lbgat": evolve(plain, attack=kl, loss=LBGAT(weight=6.0)),
    }


def readings(ldat: Recipe) -> dict[str, Recipe]:
    """LDAT where the paper can be read in another way, one change each."""
    unit = LDAT(steps=10, step="unit", gamma=0.2)
    return {
        "ldat-down": evolve(ldat, head=evolve(ldat.head, likelihood_schedule="down")),
        "ldat-unit": evolve(ldat, attack=evolve(ldat.attack, inner=unit)),
        "ldat-no-margin": evolve(ldat, head=evolve(ldat.head, margin=0.0)),
        "ldat-fixed": evolve(ldat, head=evolve(ldat.head, centres="simplex", centre_norm=10.0)),
    }


family = baselines(ldat)
recipes = {
    **family,
    "ldat": ldat,
    "lbgat-0": evolve(family["lbgat"], loss=LBGAT(weight=0.0)),
    "alp": evolve(family["standard"], loss=ALP(weight=0.5)),
    **readings(ldat),
}
