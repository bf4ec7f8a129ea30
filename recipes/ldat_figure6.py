"""LDAT's Figure 6: its training attack, or PGD in its place; CIFAR-10, PreActResNet-18.

Run:        robustkit run recipes/ldat_figure6.py:pgd-ce-l2, or another name below
Paper:      Learnable distribution adversarial training, CMC 78(3), 2024, Figure 6: bars without numbers
Schedule:   as recipes/ldat_prn18.py, which is `ldat`
Cost:       forward-units a step in the last column; 383 steps an epoch, as 1,024 images are held out
Measured:   not yet
Figure:     robustkit report runs/ldat_figure6-* --figure bars
Open:       the paper gives no settings of PGD: as many steps as LDAT's, of 2/255 in L-inf 8/255, and of 2.5 R / 10 in
            L2 R = 1.5; KL starts from 0.001 N(0, 1), as TRADES

                   forward-units
    ldat           26
    pgd-ce-linf    26
    pgd-ce-l2      26
    pgd-kl-linf    27
    pgd-kl-l2      27
"""

from ldat_prn18 import recipe as ldat

from robustkit import evolve, px
from robustkit.attacks import PGD
from robustkit.objectives import KL

linf, l2 = PGD(steps=10, step_size=2 * px), PGD(steps=10, step_size=2.5 * 1.5 / 10)
attacks = {
    "ldat": ldat.attack,
    "pgd-ce-linf": linf,
    "pgd-ce-l2": evolve(ldat.attack, inner=l2),
    "pgd-kl-linf": evolve(linf, objective=KL(), start="gaussian"),
    "pgd-kl-l2": evolve(ldat.attack, inner=evolve(l2, objective=KL(), start="gaussian")),
}
recipes = {name: evolve(ldat, attack=attack) for name, attack in attacks.items()}
