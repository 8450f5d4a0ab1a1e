#!/usr/bin/env bash
# From nothing, as a newcomer: clones this repository's last commit and, in an environment of PATH and HOME alone,
# times `make test` and counts what the robot's computer installs.
#
#   tests/clean_clone.sh [FOLDER]     FOLDER (default: a new one under /tmp) is kept for a look
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
git clone --quiet "$here" "$folder/tether"
mkdir -p "$folder/home"
cd "$folder/tether"
clean() { env -i PATH="$PATH" HOME="$folder/home" "$@"; }

start=$SECONDS
clean make test
echo "make test, installation included: $((SECONDS - start)) s"

clean "${PYTHON:-python3}" -m venv "$folder/robot"
clean "$folder/robot/bin/python" -m pip install --quiet '.[sim]'
clean "$folder/robot/bin/tether" drive --help >/dev/null
clean "$folder/robot/bin/python" -c "
from importlib.metadata import distributions
from importlib.util import find_spec
names = sorted({d.name for d in distributions()})
assert find_spec('jax') is None, 'jax is in the base installation'
print('base and [sim]:', len(names), 'distributions:', *names)
"
[ -z "$(git status --porcelain)" ] || { echo "not ignored by git:"; git status --short; exit 1; }
echo "$folder"
