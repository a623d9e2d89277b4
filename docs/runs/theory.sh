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
    progressive-4) set -- "$1" progressive --model "$(of flow-matching)" $icons distillation.least=4 steps=2400 ;;
    progressive-2) set -- "$1" progressive --model "$(of progressive-4)" $icons distillation.steps=4 \
        distillation.least=2 steps=800 ;;
    *) set -- "$1" "$1" $icons "steps=$STEPS" ;;
    esac
    name=$1
    shift
    python3 -m limner train "$@" --out "$work/$name" >"$work/$name.log" 2>&1
}

does() { case " ${DO:-learn sheet figures bits} " in *" $1 "*) ;; *) return 1 ;; esac; }

real() {
    [ -f "$work/reference.pt" ] ||
        python3 "$here/theory.py" reference "$data" "$work/cache" "$work/reference.pt" >"$work/theory.json"
}

measure() { # RUN: what is done of what it has, all in one process
    run=$1 model=$(of "$1") pictures=$data has="sheet figures bits"
    case $run in
    adm-classifier) return ;;
    sohl*) pictures=$mnist has="sheet bits" ;;                        # digits have no FD
    consistency* | lcm | progressive* | one-step) has="sheet figures" ;; # what leaps is no equation's solution
    *flow* | sit-32) has="sheet figures bits straightness" ;;
    esac
    set --
    for what in $has; do
        case $what in straightness) does bits ;; *) does "$what" ;; esac || continue
        case $what in figures | straightness) real || return ;; esac
        case $what in
        sheet) set -- "$@" -- sheet "$model" "$work/$run.png" ;;
        figures) set -- "$@" -- measure "$work/reference.pt" "$model" "$work/$run.jsonl" ;;
        bits) set -- "$@" -- bits "$pictures" "$work/cache" "$model" "$work/$run.bits.jsonl" ;;
        straightness) set -- "$@" -- straightness "$work/reference.pt" "$model" "$work/$run.bits.jsonl" ;;
        esac
    done
    [ $# = 0 ] || python3 "$here/theory.py" "$@"
}

for run in "$@"; do
    echo "$(date +%T) $run: ${DO:-learn sheet figures bits}"
    ! does learn || learn "$run" || { echo "$run: learn failed"; continue; }
    measure "$run" || echo "$run: measure failed"
done
