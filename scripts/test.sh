#!/usr/bin/env bash
# Makes .venv, installs, lints, type-checks, runs the tests. Arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
. "$(dirname "$0")/_env.sh"
make_env dev,test
export MLX_ENABLE_TF32=0
echo "== ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
echo "== mypy"
.venv/bin/mypy
echo "== pytest"
.venv/bin/python -m pytest --durations=5 "$@"
