#!/usr/bin/env bash
# Lint, the tests that need no ComfyUI, and then those of tests/browser and tests/host in every host that scripts/hosts.sh
# has made, each in its own environment; the browser tests once more with each further frontend of a host.
# Where COMFYUI_PATH is set, or no such host is there: the whole suite in one environment, with that ComfyUI or the one
# that this pack is installed in.
# Arguments go to pytest. Paths, if any, begin with tests/, and only the parts that they belong to run.
source "$(dirname "$0")/environment.sh"
make_environment requirements.txt requirements-dev.txt requirements-kernels.txt
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check --quiet .
"$VENV/bin/mypy"

NEXTSTEP_TALLY=$(mktemp)
export NEXTSTEP_TALLY
trap 'rm -f "$NEXTSTEP_TALLY"' EXIT
NOTHING=5  # pytest's status when no test was chosen
status=$NOTHING

# run ENVIRONMENT ARGUMENT...: pytest. The first failure decides the end, and parts where no test was chosen do not.
run() {
    local ended=0
    "$1/bin/python" -m pytest "${@:2}" || ended=$?
    if [ $ended != $NOTHING ] && { [ $status = 0 ] || [ $status = $NOTHING ]; }; then status=$ended; fi
}

hosts=()
if [ -z "${COMFYUI_PATH:-}" ]; then mapfile -t hosts < <(find_hosts); fi
if [ ${#hosts[@]} = 0 ]; then
    run "$VENV" "$@"
    exit $status
fi

options=() without=() within=() in_browser=()
for argument in "$@"; do
    case $argument in
        tests/browser*) in_browser+=("$argument") within+=("$argument") ;;
        tests/host*) within+=("$argument") ;;
        tests/*) without+=("$argument") ;;
        *) options+=("$argument") ;;
    esac
done
if [ ${#without[@]} = 0 ] && [ ${#within[@]} = 0 ]; then
    without=(tests --ignore=tests/browser --ignore=tests/host)
    in_browser=(tests/browser)
    within=(tests/browser tests/host)
fi
if [ ${#without[@]} != 0 ]; then run "$VENV" "${options[@]}" "${without[@]}"; fi
if [ ${#within[@]} != 0 ]; then
    for host in "${hosts[@]}"; do
        export COMFYUI_PATH=$host/ComfyUI
        VENV=$host/venv make_environment requirements.txt requirements-dev.txt
        run "$host/venv" "${options[@]}" "${within[@]}"
        if [ ${#in_browser[@]} = 0 ]; then continue; fi
        for frontend in "$host"/frontends/*; do
            if [ -d "$frontend" ]; then
                COMFYUI_FRONTEND=$frontend run "$host/venv" "${options[@]}" "${in_browser[@]}"
            fi
        done
    done
fi
exit $status
