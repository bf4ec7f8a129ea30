"""`python -m robustkit` is `robustkit`; for `accelerate launch -m robustkit run ...`."""

import sys

from robustkit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
