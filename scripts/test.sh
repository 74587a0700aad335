#!/usr/bin/env bash
# Lint, types, tests. Needs only Python >= 3.11 and a package index.
# usage: bash scripts/test.sh [PYTEST_ARGUMENT ...]
set -euo pipefail
# curvlinops comes without its dependencies: through backpack they pull torchvision, and with it another torch
source "$(dirname "$0")/environment.sh" scripts/requirements-test.txt \
  curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 unfoldNd==0.2.3 einconv==0.1.0
ruff check .
ruff format --check .
mypy
# one thread per worker: two workers that each start two threads on two cores wait for one another
OMP_NUM_THREADS=1 python -m pytest -n "$(python -c 'import os; print(min(os.cpu_count() or 1, 8))')" "$@"
