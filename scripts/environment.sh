# Sourced by demo.sh and test.sh: makes or updates .venv at the root of the repository and activates it.
# usage: source scripts/environment.sh REQUIREMENTS_FILE [PACKAGE_WITHOUT_DEPENDENCIES ...]
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=$1
shift
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
source .venv/bin/activate
stamp=".venv/.installed-$(cat pyproject.toml scripts/requirements*.txt scripts/*.sh | sha256sum | cut -c1-16)-$(basename "$requirements")"
if [ ! -e "$stamp" ]; then
  echo "Installing into .venv (a few minutes the first time) ..."
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  # torch first and alone: a later resolution must not pull another build of it
  python -m pip install --quiet torch==2.13.0
  python -m pip install --quiet torch==2.13.0 -r "$requirements" -e .
  if [ $# -gt 0 ]; then python -m pip install --quiet --no-deps "$@"; fi
  rm -f .venv/.installed-*-"$(basename "$requirements")"
  touch "$stamp"
fi
