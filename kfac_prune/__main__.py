"""``python -m kfac_prune`` is ``kfac-prune``."""

import sys

from kfac_prune.cli import main

sys.exit(main())
