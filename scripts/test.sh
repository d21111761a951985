#!/usr/bin/env bash
# Lint and the whole test-suite, in an environment that this script makes itself. Arguments go to pytest.
source "$(dirname "$0")/environment.sh"
make_environment requirements.txt requirements-dev.txt
"$VENV/bin/ruff" check .
exec "$VENV/bin/python" -m pytest "$@"
