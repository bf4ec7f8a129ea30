"""LDAT's Table 2: LDAT and its baselines on CIFAR-100, WRN-28-10.

Run:        robustkit run recipes/ldat_table2.py:ldat, or another name below
Paper:      Learnable distribution adversarial training, CMC 78(3), 2024, Table 2
Schedule:   cosine from 0.1, 300 epochs in batches of 128, for all: the paper gives it for LDAT
Cost:       forward-units a step in the last column; 383 steps an epoch, as 1,024 images are held out. LBGAT's ResNet-18
            teacher counts as 3 of its 30: next to WRN-28-10 a tenth of that
Measured:   not yet
Open:       what recipes/ldat_table1.py says

Published:      clean   L-inf: PGD   APGD    FAB     DeepFool   L2: PGD   APGD    FAB     C&W     DeepFool   units
    standard    59.72   23.99   24.31   22.68   25.64   32.77   32.55   31.46   32.69   34.22   23
    trades      56.77   27.28   26.26   25.61   27.99   32.52   31.44   30.84   31.81   34.36   27
    mart        58.52   31.21   28.61   27.09   29.63   37.05   34.57   33.15   34.71   36.17   26
    lbgat       60.11   34.40   30.10   29.24   31.92   39.18   35.31   34.17   35.69   38.05   30
    ldat        68.97   33.87   30.24   28.21   40.31   37.71   38.83   36.55   38.51   43.97   26
"""

from ldat_table1 import baselines
from ldat_wrn28 import recipe as ldat

recipes = baselines(ldat) | {"ldat": ldat}
