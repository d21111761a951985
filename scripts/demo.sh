#!/usr/bin/env bash
# Make an environment, draw a contact sheet with the embedded model, run the first workflow in ComfyUI if one is found,
# and print where the pictures are. Arguments go to scripts/demo.py.
source "$(dirname "$0")/environment.sh"
make_environment requirements.txt requirements-dev.txt
exec "$VENV/bin/python" scripts/demo.py "$@"
