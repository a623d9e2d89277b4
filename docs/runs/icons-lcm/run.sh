#!/bin/sh
# `icons` taught to draw in four steps, or with half the evaluations, unattended and ready in time:
#     sh docs/runs/icons-lcm/run.sh DATA WORK SECONDS
# DATA is the icon pack, WORK a folder for what comes out. KIND=lcm (the default) or guidance-distillation; GUIDANCE=3 is
# what the student learns for good, BATCH=512 and LR=2e-4 are for all GPUs of the machine together, which share the
# training; MORE has further FIELD=VALUE, LIMIT a number of prompts to evaluate with instead of all. AFTER and BEFORE are
# seconds for what follows the training and for what goes before it. What is left in WORK: KIND.safetensors, evaluations
# of it and of its teacher, each in a folder named after its steps, and summary.txt of their figures; logs, metrics.jsonl.
set -eu
data=$1 work=$2 end=$(($(date +%s) + $3)) kind=${KIND:-lcm}
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
mkdir -p "$work"
left() { echo $((end - $(date +%s))); }
if [ "$gpus" -gt 0 ]; then
    device=cuda fast='precision=bf16 compile=true'
    limner() { torchrun --nproc-per-node "$gpus" -m limner "$@"; }
else
    device=cpu fast=precision=fp32
    limner() { python3 -m limner "$@"; }
fi
train() {
    out=$1
    shift
    # shellcheck disable=SC2086
    limner train "$kind" --model icons --device "$device" -o "$out" data.source=icons data.folder="$data" \
        data.cache="$work/cache" data.size=256 data.latent_views=2 distillation.guidance="${GUIDANCE:-3}" \
        batch_size="${BATCH:-512}" lr="${LR:-2e-4}" lr_schedule=cosine lr_final=0.05 betas=0.9,0.95 \
        ema_half_life=50000 save_every=1000 sample_every=0 $fast "$@" ${MORE:-} >"$out.log" 2>&1
}
# how long a step takes: the second of two stretches, when all is compiled
train "$work/probe" steps="${PROBE:-60}" log_every=$((${PROBE:-60} / 3)) warmup=10
steps=$(python3 - "$work/probe" "$(left)" "${AFTER:-240}" "${BEFORE:-120}" <<'END'
import json, pathlib, sys
run, left, after, before = pathlib.Path(sys.argv[1]), *map(float, sys.argv[2:])
rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
first, last = [row for row in rows if "images_per_second" in row][-2:]
step = (last["images"] - first["images"]) / (last["step"] - first["step"]) / last["images_per_second"]
print(max(10, int(0.95 * (left - after - before) / step)))
END
)
train "$work/run" steps="$steps" log_every=$((steps > 100 ? 50 : 5)) warmup=$((steps > 1000 ? 100 : steps / 10))
cp "$work/run/final/$kind.safetensors" "$work/$kind.safetensors"
cp "$work/run/metrics.jsonl" "$work/metrics.jsonl"
evaluate() {
    out=$work/$1 model=$2
    shift 2
    # shellcheck disable=SC2086
    python3 -m limner evaluate "$model" --data "$data" --cache "$work/cache" --device "$device" --batch 128 --no-speed \
        --no-copying ${LIMIT:+--limit "$LIMIT"} "$@" --out "$out" >"$out.log" 2>&1
    { echo "== $out" && cat "$out/evaluation.md"; } >>"$work/summary.txt"
}
: >"$work/summary.txt"
if [ "$kind" = lcm ]; then
    evaluate student-4 "$work/lcm.safetensors" --steps 4
else
    evaluate student-12 "$work/$kind.safetensors"
fi
evaluate teacher-12 icons
evaluate teacher-4 icons --steps 4
cat "$work/summary.txt"
