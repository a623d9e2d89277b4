#!/bin/sh
# The theory line, trained alike and measured, on one GPU: sh docs/runs/theory.sh DATA MNIST WORK [RUN ...]
# DATA is the icon pack, MNIST the folder of mnist.npz, WORK a folder, RUN some of those below. STEPS (4000) of 256 pictures,
# JOBS (1) runs at once (three are slower in all: one fills the GPU). What is left: WORK/NAME, a run each with its log.
set -eu
data=$1 mnist=$2 work=$3
shift 3
here=$(dirname "$0")
icons="data.folder=$data data.cache=$work/cache save_every=100000 sample_every=0 sample_prompts=[]"
mkdir -p "$work"
export here icons work mnist STEPS="${STEPS:-4000}"
learn() { # NAME RECIPE [FIELD=VALUE ...]
    name=$1
    shift
    echo "$(date +%T) $name"
    python3 -m limner train "$@" --out "$work/$name" >"$work/$name.log" 2>&1 || echo "$name failed: $work/$name.log"
}
one() {
    case $1 in
    sohl-dickstein-2015) learn "$1" "$1" "data.folder=$mnist" "steps=${DIGITS:-10000}" batch_size=512 sample_every=0 ;;
    ot-flow-matching) learn "$1" flow-matching $icons "steps=$STEPS" loss.coupling=optimal ;;
    *) learn "$1" "$1" $icons "steps=$STEPS" ;;
    esac
}
if [ "${ONE:-}" ]; then one "$ONE"; exit; fi
[ -f "$work/reference.pt" ] || python3 "$here/theory.py" reference "$data" "$work/cache" "$work/reference.pt" \
    >"$work/reference.json"
printf '%s\n' "${@:-ddpm}" | xargs -P "${JOBS:-1}" -I{} env ONE={} sh "$0" "$data" "$mnist" "$work"
