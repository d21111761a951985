# Sourced by the other scripts: a Python environment of its own in .venv, with a CPU build of PyTorch where one can be had.
#   PYTHON        interpreter to start from (default python3, 3.10 or newer)
#   NEXTSTEP_VENV where the environment goes (default .venv in the repository)
#   TORCH         what pip installs as PyTorch (default torch==2.13.0); on Linux, point pip at PyTorch's CPU index
#                 (PIP_EXTRA_INDEX_URL, see PyTorch's install page) to avoid the much larger CUDA build
#   COMFYUI_PATH  a ComfyUI checkout (default: the one this pack is installed in, else ~/ComfyUI)
#   COMFYUI_HOSTS folder of the hosts that scripts/hosts.sh makes for the tests (default ~/comfyui-hosts)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
VENV=${NEXTSTEP_VENV:-.venv}
HOSTS=${COMFYUI_HOSTS:-$HOME/comfyui-hosts}

find_comfyui() {
    local candidate
    # the parent by its name, not "..": the pack may be a link in custom_nodes
    for candidate in ${COMFYUI_PATH:+"$COMFYUI_PATH"} "${PWD%/*/*}" "$HOME/ComfyUI"; do
        if [ -f "$candidate/comfy/model_management.py" ]; then (cd "$candidate" && pwd); return; fi
        if [ -n "${COMFYUI_PATH:-}" ]; then return; fi
    done
}

# find_hosts: the folders of the finished test hosts, in the order of their versions.
find_hosts() {
    local folder
    for folder in "$HOSTS"/*; do
        if [ -f "$folder/ready" ]; then echo "$folder"; fi
    done | sort -V
}

# make_environment REQUIREMENTS_FILE...: create it once, install what is asked for and what the found ComfyUI needs.
make_environment() {
    "$PYTHON" -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
    if [ ! -x "$VENV/bin/python" ]; then
        echo "Making a Python environment in $VENV ..."
        "$PYTHON" -m venv "$VENV"
    fi
    local pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check) file comfyui
    if ! "$VENV/bin/python" -c "import torch" 2>/dev/null; then
        echo "Installing ${TORCH:-torch==2.13.0} there, which takes some minutes ..."
        "${pip[@]}" "${TORCH:-torch==2.13.0}"
    fi
    local arguments=()
    for file in "$@"; do arguments+=(-r "$file"); done
    comfyui=$(find_comfyui)
    if [ -n "$comfyui" ]; then
        # torchvision and torchaudio have no CPU build everywhere, and none of our graphs needs them: the host imports
        # stand-ins. spandrel wants torchvision, so it comes without what it wants. The frontend cannot make a loader
        # node without the core's upscale loader, which needs spandrel.
        grep -vE '^(torch|torchvision|torchaudio|spandrel)\b' "$comfyui/requirements.txt" > "$VENV/comfyui-requirements.txt"
        arguments+=(-r "$VENV/comfyui-requirements.txt")
    fi
    echo "Installing what is missing in $VENV of $*${comfyui:+ and what ComfyUI requires} ..."
    "${pip[@]}" "${arguments[@]}"
    if [ -n "$comfyui" ]; then
        "${pip[@]}" --no-deps spandrel
        stand_in torchvision torchaudio
    fi
}

# stand_in PACKAGE...: a package that has nothing but its names; a real one is left alone.
stand_in() {
    local site package
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for package in "$@"; do
        if [ ! -e "$site/$package" ] || grep -qs 'class Missing' "$site/$package/__init__.py"; then
            mkdir -p "$site/$package"
            cp scripts/host_stand_in.py "$site/$package/__init__.py"
        fi
    done
}
