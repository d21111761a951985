#!/usr/bin/env bash
# Makes the ComfyUI hosts that scripts/test.sh tests in: for each a checkout, an environment for a CPU, and frontends.
# bash scripts/hosts.sh [NAME]
#   The hosts that are promised to work, of TESTED below, or one of them. Each comes from the first git directory of COMFYUI_GIT
#   (separated by colons) that has its commit, else from the public repository.
# bash scripts/hosts.sh NAME SOURCE [COMMIT [FRONTEND_VERSION...]]
#   Another one. SOURCE is an address or a git directory to take COMMIT from, or a ComfyUI folder, which is used as it is
#   when no COMMIT is named. The browser tests also run with each further version of the frontend.
# They lie in COMFYUI_HOSTS (default ~/comfyui-hosts): NAME/ComfyUI, NAME/venv, NAME/frontends/VERSION. What is there
# already is kept. See scripts/environment.sh for PYTHON and TORCH.
source "$(dirname "$0")/environment.sh"
PUBLIC=https://github.com/Comfy-Org/ComfyUI.git
TESTED=(
    "0.3.64 a125cd84b054a57729b5eecab930ca9408719832"      # October 2025, the oldest that is promised
    "0.33 0f1fa67ad8a68b62c65ebc97a7bf485df2459c3a 1.58.1"  # August 2026, also with a frontend of that autumn
)

# check_out GIT_DIRECTORY COMMIT FOLDER: the commit's files. A git directory may lack large ones (ComfyUI's tokenizers of
# other models, for example): they are named and left out.
check_out() {
    local git=(git --git-dir="$1" --work-tree="$3") errors
    rm -rf "$3"
    mkdir -p "$3"
    export GIT_INDEX_FILE="$3.index"
    "${git[@]}" read-tree "$2"
    if ! errors=$("${git[@]}" checkout-index --all --force 2>&1); then
        sed -n 's/^error: unable to read sha1 file of \(.*\) (.*)$/  left out, absent from the git directory: \1/p' <<< "$errors"
        if grep -v '^error: unable to read sha1 file of ' <<< "$errors" >&2; then exit 1; fi
    fi
    rm "$GIT_INDEX_FILE"
    unset GIT_INDEX_FILE
}

# take_code FOLDER SOURCE COMMIT: FOLDER/ComfyUI, unless it is there in that version.
take_code() {
    local folder=$1 source=$2 commit=$3 git
    if [ -f "$source/comfy/model_management.py" ] && [ -z "$commit" ]; then
        ln -sfn "$(realpath "$source")" "$folder/ComfyUI"
        return
    fi
    if [ -n "$commit" ] && [ "$(cat "$folder/commit" 2>/dev/null)" = "$commit" ]; then return; fi
    rm -f "$folder/ready"
    if git=$(git -C "$source" rev-parse --absolute-git-dir 2>/dev/null); then
        check_out "$git" "${commit:-HEAD}" "$folder/ComfyUI"
    else
        rm -rf "$folder/fetched"
        git init --quiet --bare "$folder/fetched"
        git --git-dir="$folder/fetched" fetch --quiet --depth 1 "$source" "${commit:-HEAD}"
        check_out "$folder/fetched" FETCH_HEAD "$folder/ComfyUI"
        rm -rf "$folder/fetched"
    fi
    echo "${commit:-HEAD}" > "$folder/commit"
}

# make_host NAME SOURCE [COMMIT [FRONTEND_VERSION...]]
make_host() {
    local name=$1 source=$2 commit=${3:-} folder=$HOSTS/$1 version
    echo "ComfyUI $name from $source, in $folder"
    mkdir -p "$folder"
    take_code "$folder" "$source" "$commit"
    VENV=$folder/venv COMFYUI_PATH=$folder/ComfyUI make_environment requirements.txt requirements-dev.txt
    for version in "${@:4}"; do
        if [ ! -d "$folder/frontends/$version" ]; then
            "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
                --target "$folder/frontends/$version" "comfyui-frontend-package==$version"
        fi
    done
    touch "$folder/ready"
}

if [ $# -gt 1 ]; then
    make_host "$@"
    exit
fi
IFS=: read -ra directories <<< "${COMFYUI_GIT:-}"
status=0 made=
for host in "${TESTED[@]}"; do
    read -ra words <<< "$host"
    if [ $# = 1 ] && [ "$1" != "${words[0]}" ]; then continue; fi
    from=$PUBLIC
    for directory in "${directories[@]}"; do
        if git --git-dir="$directory" cat-file -e "${words[1]}^{commit}" 2>/dev/null; then from=$directory; break; fi
    done
    bash "$0" "${words[0]}" "$from" "${words[@]:1}" || status=1
    made=yes
done
if [ -z "$made" ]; then
    echo "$1 is none of the tested hosts. Say where to take it from: an address, a git directory or a ComfyUI folder." >&2
    exit 1
fi
exit $status
