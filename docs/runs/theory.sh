#!/bin/sh
# The theory line, trained alike, measured and drawn, on one GPU: sh docs/runs/theory.sh DATA MNIST WORK RUN ...
# DATA is the icon pack, MNIST the folder of mnist.npz, WORK a folder; the RUNs go one after another, as those that begin
# with others want, or are told by WORK/NAME.safetensors, which was there. Runs from nothing have STEPS (4000) of 256
# pictures. DO (learn figures sheet) is what is done. What is left: WORK/NAME, a run with its log, WORK/NAME.jsonl with
# figures, WORK/NAME.bits.jsonl and WORK/NAME.png. Several at once are slower in all: one fills the GPU.
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
    progressive) set -- "$1" "$1" --model "$(of flow-matching)" $icons ;;
    *) set -- "$1" "$1" $icons "steps=$STEPS" ;;
    esac
    name=$1
    shift
    python3 -m limner train "$@" --out "$work/$name" >"$work/$name.log" 2>&1
}

measured() { # RUN, settings
    name=$1
    shift
    python3 "$here/theory.py" measure "$work/reference.pt" "$(of "$name")" "$work/$name.jsonl" "$@"
}

bits() { python3 "$here/theory.py" bits "$data" "$work/cache" "$(of "$1")" "$work/$1.bits.jsonl"; }

straight() { python3 "$here/theory.py" straightness "$work/reference.pt" "$(of "$1")" "$work/$1.bits.jsonl"; }

figures() {
    led="sampler=ddim steps=50"
    case $1 in
    ddpm)
        measured "$1" "" steps=1000 "steps=1000 sampler=ddpm_large" "$led eta=0.5" "$led eta=1" \
            "sampler=ddim steps=10 eta=0.5" "sampler=ddim steps=10 eta=1" \
            $(for n in 5 10 20 50 100 1000; do echo "sampler=ddim#steps=$n"; done | tr '#' '\037') ;;
    esac
}

for run in "$@"; do
    for what in ${DO:-learn figures sheet}; do
        echo "$(date +%T) $run: $what"
        "$what" "$run" || echo "$run: $what failed"
    done
done
