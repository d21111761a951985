# Sourced by the other scripts: a Python environment of its own in .venv, with a CPU build of PyTorch where one can be had.
#   PYTHON        interpreter to start from (default python3, 3.10 or newer)
#   NEXTSTEP_VENV where the environment goes (default .venv in the repository)
#   TORCH         what pip installs as PyTorch (default torch==2.13.0); on Linux, point pip at PyTorch's CPU index
#                 (PIP_EXTRA_INDEX_URL, see PyTorch's install page) to avoid the much larger CUDA build
#   COMFYUI_PATH  a ComfyUI checkout (default: the one this pack is installed in, else ~/ComfyUI)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
VENV=${NEXTSTEP_VENV:-.venv}

find_comfyui() {
    local candidate
    for candidate in ${COMFYUI_PATH:+"$COMFYUI_PATH"} ../.. "$HOME/ComfyUI"; do
        if [ -f "$candidate/comfy/model_management.py" ]; then (cd "$candidate" && pwd); return; fi
        if [ -n "${COMFYUI_PATH:-}" ]; then return; fi
    done
}

# make_environment REQUIREMENTS_FILE...: create it once, install what is asked for and what the found ComfyUI needs.
make_environment() {
    "$PYTHON" -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    local pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check) file comfyui
    "$VENV/bin/python" -c "import torch" 2>/dev/null || "${pip[@]}" "${TORCH:-torch==2.13.0}"
    local arguments=()
    for file in "$@"; do arguments+=(-r "$file"); done
    comfyui=$(find_comfyui)
    if [ -n "$comfyui" ]; then
        # torchvision and torchaudio have no CPU build everywhere, and none of our graphs needs them. spandrel wants
        # torchvision, so it comes without what it wants; the tests have a stand-in for the little that it imports. The
        # frontend cannot make a loader node without the core's upscale loader, which needs spandrel.
        grep -vE '^(torch|torchvision|torchaudio|spandrel)\b' "$comfyui/requirements.txt" > "$VENV/comfyui-requirements.txt"
        arguments+=(-r "$VENV/comfyui-requirements.txt")
    fi
    "${pip[@]}" "${arguments[@]}"
    if [ -n "$comfyui" ]; then "${pip[@]}" --no-deps spandrel; fi
}
