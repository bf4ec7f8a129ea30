"""UIAT's Table 3: four methods at larger radii, trained and judged at 10, 12 and 16/255, ResNet-18 on CIFAR-10.

Run:        robustkit run recipes/uiat_table3.py:eps12-uiat, or another name below
Paper:      Dong et al., CVPR 2023, Table 3
Schedule:   as recipes/uiat_table1.py: one cycle to 0.1, 100 epochs in batches of 128
Cost:       forward-units a step in the last column; 383 steps an epoch, as 1,024 images are held out
Helper:     HAT needs a natural network first:
            robustkit run recipes/uiat_helper.py:cifar10 --out runs/uiat-helper-cifar10
Measured:   not yet
Open:       besides what Table 1 leaves open, the paper states no step sizes, inverse radius and weights at these radii:
            they stay as at 8/255. Ten steps of 2/255 do not span a ball of 12 or 16/255.

Published:              clean   AutoAttack   forward-units
    eps10-trades        82.28   38.55        27
    eps10-hat           81.94   40.12        31
    eps10-uiat          82.79   40.61        28
    eps10-uiat-oneoff   82.76   41.16        24 / 28 / 23 before, in and after epoch 80
    eps12-trades        79.37   31.84        27
    eps12-hat           79.43   33.28        31
    eps12-uiat          79.50   34.32        28
    eps12-uiat-oneoff   79.30   34.61        24 / 28 / 23
    eps16-trades        74.89   18.70        27
    eps16-hat           74.45   19.42        31
    eps16-uiat          74.29   21.82        28
    eps16-uiat-oneoff   74.86   21.96        24 / 28 / 23
"""

from natural import recipe as natural
from uiat_table1 import methods

from robustkit import evolve, px
from robustkit.threats import Linf

recipes = {
    f"eps{epsilon}-{name}": recipe
    for epsilon in (10, 12, 16)
    for name, recipe in methods(evolve(natural, threat=Linf(epsilon=epsilon * px)), "cifar10", step_size=2 * px).items()
    if name in ("trades", "hat", "uiat", "uiat-oneoff")
}
