#!/usr/bin/env bash
# Set up .venv if needed, then check lint and formatting and run all tests. Arguments go to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh -k resume -x

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
python=.venv/bin/python

"$python" -m ruff check .
"$python" -m ruff format --check .

# One test process per core, with one thread each: more threads would compete for the same cores.
# At most eight: some tests start processes of their own, and each needs memory for PyTorch.
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=1
exec "$python" -m pytest -n "$((cores < 8 ? cores : 8))" --durations=15 "$@"
