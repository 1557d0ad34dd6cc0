#!/usr/bin/env bash
# bash run.sh          the real run: all five scripts, data and model from the hub, results in outputs/
# bash run.sh demo     all five scripts on an invented sample with a tiny model, offline, results in outputs/demo
# bash run.sh test     the tests; further arguments go to pytest
# bash run.sh setup    only creates .venv, with everything that the three above need
# bash run.sh --help   these lines
# All but --help create .venv the first time. PYTHON=/path/to/python3 selects the Python that creates it.
set -euo pipefail

DEMO_DIR=outputs/demo
DEMO_BUILD=(--samsum tests/fixtures/samsum --trivia-qa tests/fixtures/trivia_qa
    --max-context-words 120 --test-examples-per-task 100)
DEMO_TRAIN=(--model tests/fixtures/tiny_llama3 --learning-rate 4e-3 --num-train-epochs 4 --max-length 1024
    --gradient-accumulation-steps 1 --eval-steps 190 --save-steps 190 --logging-steps 20 --overwrite)

die() {
    echo "$1" >&2
    exit 2
}

usage() {
    die "usage: bash run.sh [demo | setup | test [pytest arguments]]; bash run.sh --help explains them"
}

check_python() { # $1: an interpreter
    command -v "$1" >/dev/null || die "no $1 here: install Python 3.11 to 3.14, or set PYTHON to one"
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        die "$1 does not run: install Python 3.11 to 3.14, or set PYTHON to one"
    case $version in
        3.11 | 3.12 | 3.13 | 3.14) ;;
        *) die "$1 is Python $version: this needs Python 3.11 to 3.14 (set PYTHON to one, and remove .venv if there is one)" ;;
    esac
}

make_venv() {
    check_python "$PYTHON"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$PYTHON has no venv module: install it (on Debian and Ubuntu: apt install python3-venv)"
    echo "creating .venv with $PYTHON"
    "$PYTHON" -m venv --clear .venv
}

size_of() { # $1: a requirements file; what pip downloads for it
    case $1 in
        requirements.txt) echo "2.9 GB to download with torch for CUDA, 0.4 GB with torch for CPUs, see README.md" ;;
        *) echo "70 MB to download" ;;
    esac
}

install() { # $@: requirement files; does nothing if they were installed before and have not changed
    local stamp=.venv/installed-${1//\//-}.cksum log=.venv/install.log checksum flags=() file
    checksum=$(cat "$@" | cksum)
    if [[ -f $stamp && $(<"$stamp") == "$checksum" ]]; then
        return
    fi
    for file in "$@"; do flags+=(-r "$file"); done
    echo "installing $1 into .venv ($(size_of "$1"); .venv/install.log shows the progress)"
    .venv/bin/python -m pip install --disable-pip-version-check "${flags[@]}" >$log 2>&1 ||
        die "pip could not install $1: $(grep -i error $log | tail -n 1 || true) (all of it is in $log)"
    echo "$checksum" >"$stamp" # last: an interrupted installation is done again
}

setup() { # $1: "tests" installs tests/requirements.txt too
    # pip comes last into a venv: without it, making .venv was interrupted.
    if [[ ! -x .venv/bin/pip || ! -x .venv/bin/python ]]; then make_venv; fi
    check_python .venv/bin/python
    install requirements.txt
    # Together, so that pip cannot change a pinned version of the first file for the second.
    if [[ ${1:-} == tests ]]; then install tests/requirements.txt requirements.txt; fi
}

step() { # echoes a command, then runs it
    printf '\n+'
    printf ' %s' "$@"
    printf '\n'
    "$@"
}

finished() { # $1: seconds, $2: the folder with the results
    printf '\nthe five scripts took %d s; results are in %s: open %s/evaluation.html in a browser\n' "$1" "$2" "$2"
}

demo() {
    export HF_HUB_OFFLINE=1
    local start=$SECONDS python=.venv/bin/python
    step $python build_dataset.py "${DEMO_BUILD[@]}" --output-dir $DEMO_DIR
    step $python train_llama.py "${DEMO_TRAIN[@]}" --output-dir $DEMO_DIR
    step $python test_llama.py --overwrite --output-dir $DEMO_DIR
    step $python evaluations.py --output-dir $DEMO_DIR
    step $python merge_llama.py --output-dir $DEMO_DIR
    finished $((SECONDS - start)) $DEMO_DIR
}

real_run() {
    local start=$SECONDS script
    for script in build_dataset train_llama test_llama evaluations merge_llama; do
        step .venv/bin/python $script.py
    done
    finished $((SECONDS - start)) outputs
}

PYTHON=${PYTHON:-python3}
# A relative path is relative to the folder of the caller, not to the repository.
if [[ $PYTHON == */* && $PYTHON != /* ]]; then PYTHON=$PWD/$PYTHON; fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null

case ${1-} in
    "")
        [[ $# -eq 0 ]] || usage
        setup
        real_run
        ;;
    demo)
        [[ $# -eq 1 ]] || usage
        setup
        demo
        ;;
    -h | --help | help)
        sed -n '2,/^[^#]/s/^# //p' run.sh
        ;;
    setup)
        [[ $# -eq 1 ]] || usage
        setup tests
        ;;
    test)
        shift
        setup tests
        # Two files at a time: what the tests of a file share is made once. In this order both end together.
        .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
        ;;
    *) usage ;;
esac
