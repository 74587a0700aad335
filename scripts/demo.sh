#!/usr/bin/env bash
# Prunes the packaged demo model by three methods and prints a table. Needs only Python >= 3.11 and a package index.
# usage: bash scripts/demo.sh [--out FOLDER]
set -euo pipefail
source "$(dirname "$0")/environment.sh" scripts/requirements.txt
kfac-prune demo "$@"
