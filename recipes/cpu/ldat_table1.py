"""LDAT and its baselines under one small budget: that of recipes/cpu/uiat_table1.py, for two CPU cores.

Run:        robustkit run recipes/cpu/ldat_table1.py:ldat-up, or another name below
Papers:     as recipes/ldat_table1.py, whose strategies it uses at their own settings
Changed:    the schedule is that of recipes/cpu/uiat_table1.py, for all: 10,000 images (512 of them held out), 12 epochs
            in batches of 128, one cycle to 0.1; a quarter of the width, of LBGAT's teacher, too. The likelihood's
            weight is 0.05, which the paper's grows to in its first twelve of 250 epochs; with its 1 in twelve epochs
            (`ldat-likelihood-1`) the network learns nothing (docs/methods/ldat.md says why)
Cost:       forward-units a step below, 75 steps an epoch
Published:  nothing at this size
Measured:   all, one seed each, on a JPEG copy of CIFAR-10: docs/results.md; outcomes of each image, but for
            `ldat-likelihood-1`, in docs/studies/ldat
Judged:     in L-infinity as the table, but for DeepFool, which needs foolbox, on 1,000 images, and by AutoAttack on
            256; in L2 by the two attacks that stand oddly to each other there (docs/methods/ldat.md)
Note:       `ldat-up` lets the likelihood's weight grow from 0, `ldat-down` fall to 0; `ldat-unit` is `ldat-up` with the
            attack of the paper's Algorithm 1 in place of Adam's steps

                         forward-units
    pgd-at               23
    trades               27
    alp                  26
    lbgat                30
    ldat-up              26
    ldat-down            26
    ldat-unit            26
    ldat-likelihood-1    26
"""

from uiat_table1 import kl, natural, pgd_at

from robustkit import Model, Suite, evolve
from robustkit.attacks import LDAT, Within
from robustkit.evaluation import CW, PGD_20, PGD_40, AutoAttack, Clean
from robustkit.evaluation.suites import APGD_DLR, FAB
from robustkit.heads import GaussianMixture
from robustkit.losses import ALP, LBGAT, Mixed, Trades
from robustkit.threats import L2

suites = (
    Suite(images=1000, measures=(Clean(), PGD_20, PGD_40, CW, APGD_DLR, FAB, AutoAttack(images=256))),
    Suite(images=1000, name="l2", threat=L2(epsilon=0.5), measures=(PGD_40, APGD_DLR)),
)
natural, pgd_at = (evolve(recipe, evaluation=suites) for recipe in (natural, pgd_at))
head = GaussianMixture(margin=0.1, likelihood=0.05, likelihood_schedule="up")
ldat = evolve(natural, head=head, attack=Within(threat=L2(epsilon=1.5), inner=LDAT(steps=10)), loss=Mixed(beta=0.5))
recipes = {
    "pgd-at": pgd_at,
    "trades": evolve(natural, attack=kl, loss=Trades(weight=6.0)),
    "alp": evolve(pgd_at, loss=ALP(weight=0.5)),
    "lbgat": evolve(natural, attack=kl, loss=LBGAT(weight=6.0, teacher=Model(backbone="resnet18_cifar_w16"))),
    "ldat-up": ldat,
    "ldat-down": evolve(ldat, head=evolve(head, likelihood_schedule="down")),
    "ldat-unit": evolve(ldat, attack=Within(threat=L2(epsilon=1.5), inner=LDAT(steps=10, step="unit"))),
    "ldat-likelihood-1": evolve(ldat, head=evolve(head, likelihood=1.0)),
}
