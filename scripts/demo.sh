#!/usr/bin/env bash
# bash scripts/demo.sh
#   Make an environment, draw a contact sheet with the embedded model, run the first workflow in ComfyUI if one is found,
#   and print where the pictures are. Arguments go to scripts/demo.py.
# bash scripts/demo.sh --comfyui DIR [--port N]
#   For those without ComfyUI: clone it into DIR (COMFYUI_SOURCE says from where) unless it is there already, install what
#   it needs, link this pack into it, start it, and print the address that opens the first workflow.
set -euo pipefail
if [ "${1:-}" = --comfyui ]; then
    [ -n "${2:-}" ] || { echo "Give the folder where ComfyUI is, or where to put it: bash scripts/demo.sh --comfyui DIR" >&2; exit 2; }
    if [ ! -f "$2/comfy/model_management.py" ]; then
        if [ -n "$(ls -A "$2" 2>/dev/null)" ]; then
            echo "$2 is neither empty nor a ComfyUI. Give an empty folder, or the folder with ComfyUI's main.py." >&2
            exit 2
        fi
        echo "Downloading ComfyUI into $2 ..."
        git clone --depth 1 "${COMFYUI_SOURCE:-https://github.com/Comfy-Org/ComfyUI.git}" "$2"
    fi
    COMFYUI_PATH=$(cd "$2" && pwd)
    export COMFYUI_PATH
    shift 2
    set -- --serve "$@"
fi
source "$(dirname "$0")/environment.sh"
make_environment requirements.txt requirements-dev.txt
found=$(find_comfyui)
if [ -n "$found" ]; then export COMFYUI_PATH=$found; fi
exec "$VENV/bin/python" -m scripts.demo "$@"
