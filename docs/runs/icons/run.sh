#!/bin/sh
# A run of `icons`, unattended and ready in time: sh docs/runs/icons/run.sh DATA WORK SECONDS [START]
# DATA is the icon pack, WORK a folder for what comes out, START weights to go on from (else a stage at 128 px comes
# first, and AUTOENCODER names the weights of the autoencoder). All GPUs of the machine share the training; with JUDGE=new
# a judge is trained beside it on the last of them, else the one in the package judges. Pictures that WORK/cache does not
# hold are drawn first, by each of them. What is left in WORK: icons.safetensors, evaluation-4/ (of guidance 4),
# settings-0.jsonl and one more for each further GPU, judge/ if one was trained, logs.
set -eu
data=$1 work=$2 end=$(($(date +%s) + $3)) start=${4:-}
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
last=$((gpus - 1)) run='' step=${STEP:-0.135} # seconds of a step at 256 px on two H100
mkdir -p "$work"
left() { echo $((end - $(date +%s))); }
train() {
    out=$1
    shift
    torchrun --nproc-per-node "$gpus" -m limner train icons -o "$out" data.folder="$data" data.cache="$work/cache" \
        sample_prompts=[] sample_every=0 log_every=100 "$@" >"$out.log" 2>&1
}

judge=''
if [ "${JUDGE:-}" = new ]; then
    CUDA_VISIBLE_DEVICES=$last python3 -m limner evaluate --prepare-judge --data "$data" --cache "$work/cache" \
        --out "$work/judge" --device cuda >"$work/judge.log" 2>&1 &
    judge=$!
fi
autoencoder=${AUTOENCODER:-${start:?START or AUTOENCODER must name weights}}
if [ -z "$start" ]; then
    train "$work/small" system.autoencoder_from="$autoencoder" data.size=128 data.other_sizes=[] lr_schedule=constant \
        steps=100000 save_every=100000 --stop-after $(($(left) / 4)) || true  # it ends by time
    start=$(ls -d "$work"/small/checkpoints/step-* | tail -1)/ema.safetensors
fi
# what follows the training takes 180 s, what goes before it (starting, encoding, compiling) 230 s beside the judge; a run that breaks off
# is begun again from its newest weights
for attempt in 1 2 3; do
    [ "$(left)" -gt 400 ] || break
    steps=$(python3 -c "print(int(($(left) - ${AFTER:-180} - ${BEFORE:-230}) / $step) // 100 * 100)")
    run=$work/run-$attempt
    train "$run" system.autoencoder_from="$autoencoder" init_from="$start" steps="$steps" lr="${LR:-1e-3}" \
        warmup="${WARMUP:-100}" save_every=1000 --stop-after $(($(left) - ${AFTER:-180} + 20)) && break
    newest=$(ls -d "$run"/checkpoints/step-* 2>/dev/null | tail -1)
    [ -z "$newest" ] || start=$newest/ema.safetensors
done
# a run that its time cut short has no final weights, but its averages of then are as good: the rate was near its end
weights=${run:+$run/final/icons.safetensors}
[ -f "$weights" ] || weights=$(ls -d "$work"/run-*/checkpoints/step-* 2>/dev/null | tail -1)
if [ -z "$weights" ]; then
    echo "no weights: $work/run-*.log says why" >&2
    exit 1
fi
python3 tools/pack.py "$weights" "$work/icons.safetensors"
if [ -n "$judge" ]; then
    wait "$judge"
    mkdir -p src/limner/weights/judge
    cp "$work"/judge/judge.* src/limner/weights/judge/
fi
evaluate() {
    export CUDA_VISIBLE_DEVICES="$1" OMP_NUM_THREADS=8 # or they crowd each other out
    [ "$1" != 0 ] || python3 -m limner evaluate "$work/icons.safetensors" --data "$data" --cache "$work/cache" \
        --device cuda --batch 128 --no-speed --guidance 4 --out "$work/evaluation-4" >"$work/evaluation-4.log" 2>&1
    python3 docs/runs/icons/settings.py "$work/icons.safetensors" "$data" "$work/cache" \
        "$1" "$gpus" $(($(left) - 5)) >"$work/settings-$1.jsonl" 2>"$work/settings-$1.log"
}
for gpu in $(seq 0 "$last"); do
    evaluate "$gpu" &
done
wait
