#!/bin/sh
# The theory line, trained alike, measured and drawn, on one GPU: sh docs/runs/theory.sh DATA MNIST WORK RUN ...
# DATA is the icon pack, MNIST the folder of mnist.npz, WORK a folder; the RUNs go one after another, as those that begin
# with others want; weights that are there are WORK/NAME.safetensors. Runs from nothing have STEPS (4000) of 256 pictures.
# DO (learn sheet figures bits) is what is done. What is left: WORK/NAME, a run with its log, WORK/NAME.png, WORK/NAME.jsonl
# and WORK/NAME.bits.jsonl. Several at once are slower in all: one fills the GPU.
set -eu
data=$1 mnist=$2 work=$3
shift 3
here=$(dirname "$0") STEPS=${STEPS:-4000}
unseen="save_every=100000 sample_every=0 sample_prompts=[]"
icons="data.folder=$data data.cache=$work/cache $unseen"
mkdir -p "$work"

of() { if [ -f "$work/$1.safetensors" ]; then echo "$work/$1.safetensors"; else echo "$work/$1"; fi; }

learn() { # RUN: its recipe, what it begins with, and what is said of it besides
    case $1 in
    sohl-dickstein-2015) set -- "$1" "$1" "data.folder=$mnist" steps=10000 sample_every=0 ;;
    ot-flow-matching) set -- "$1" flow-matching $icons "steps=$STEPS" loss.coupling=optimal ;;
    adm-classifier) set -- "$1" "$1" $icons steps=2000 validation=0.03 ;;
    reflow) set -- "$1" reflow --model "$(of flow-matching)" $icons ;;
    reflow-2) set -- "$1" reflow --model "$(of reflow)" $icons ;;
    one-step) set -- "$1" one-step --model "$(of reflow-2)" $icons ;;
    consistency) set -- "$1" "$1" --model "$(of edm)" $icons precision=fp16 ;;
    consistency-training) set -- "$1" "$1" $icons precision=fp16 ;;
    lcm) set -- "$1" "$1" --model "$(of flow-matching)" $icons data.source=icons data.size=32 \
        data.caption_from=style data.even=true distillation.guidance=1.5 distillation.steps=16 steps=2000 \
        batch_size=256 lr=2e-4 lr_schedule=cosine lr_final=0.02 \
        warmup=100 ema_half_life=50000 precision=fp16 ;;
    progressive) set -- "$1" "$1" --model "$(of flow-matching)" $icons ;;
    *) set -- "$1" "$1" $icons "steps=$STEPS" ;;
    esac
    name=$1
    shift
    python3 -m limner train "$@" --out "$work/$name" >"$work/$name.log" 2>&1
}

real() {
    [ -f "$work/reference.pt" ] ||
        python3 "$here/theory.py" reference "$data" "$work/cache" "$work/reference.pt" >"$work/theory.json"
}

figures() { # but of digits
    case $1 in sohl* | adm-classifier) return ;; esac
    real
    python3 "$here/theory.py" measure "$work/reference.pt" "$(of "$1")" "$work/$1.jsonl"
}

bits() { # and straightness, of flows; what leaps in a step or a few is no equation's solution
    case $1 in consistency* | lcm | progressive | one-step | adm-classifier) return ;; esac
    pictures=$data
    case $1 in sohl*) pictures=$mnist ;; esac
    python3 "$here/theory.py" bits "$pictures" "$work/cache" "$(of "$1")" "$work/$1.bits.jsonl"
    case $1 in *flow* | sit-32)
        real
        python3 "$here/theory.py" straightness "$work/reference.pt" "$(of "$1")" "$work/$1.bits.jsonl" ;;
    esac
}

sheet() {
    case $1 in adm-classifier) return ;; esac
    python3 "$here/theory.py" sheet "$(of "$1")" "$work/$1.png"
}

for run in "$@"; do
    for what in ${DO:-learn sheet figures bits}; do
        echo "$(date +%T) $run: $what"
        "$what" "$run" || echo "$run: $what failed"
    done
done
