#!/bin/sh
# A ControlNet for `icons` that is told Canny's edges, unattended and ready in time, on one GPU:
# sh docs/runs/icons-control/run.sh DATA WORK SECONDS [START]
# DATA is the icon pack, WORK a folder for what comes out, START a checkpoint's ema.safetensors or a file of an earlier run
# to go on from. What is left in WORK: control.safetensors (in 8 bits, as it ships), edges.jsonl (see edges.py), sheet.png,
# run-N/ with the log and drawings of the training. STEP are the seconds of a step of 256 pictures, BEFORE what goes before
# the first (drawing and encoding the pictures, their edges, compiling), AFTER what edges.py takes for COUNT pictures.
set -eu
data=$1 work=$2 end=$(($(date +%s) + $3)) start=${4:-}
mkdir -p "$work"
left() { echo $((end - $(date +%s))); }
for attempt in 1 2 3; do # one that breaks off is begun again from its newest weights
    [ "$(left)" -gt $((${AFTER:-180} + 60)) ] || break
    run=$work/run-$attempt
    steps=${STEPS:-$(python3 -c "print(max(200, int(($(left) - ${AFTER:-180} - ${BEFORE:-150}) / ${STEP:-0.08}) // 100 * 100))")}
    python3 -m limner train control -m icons -o "$run" --device "${DEVICE:-auto}" --stop-after $(($(left) - ${AFTER:-180})) \
        data.source=icons data.folder="$data" data.cache="$work/cache" data.size=256 data.latent_views="${VIEWS:-3}" \
        data.limit="${LIMIT:-0}" data.hints=canny control.bits=8 control.caption_dropout="${DROPOUT:-0.3}" \
        batch_size="${BATCH:-256}" precision="${PRECISION:-bf16}" compile="${COMPILE:-true}" \
        optimizer=muon muon_lr_scale=3 lr="${LR:-1e-3}" betas=0.9,0.95 weight_decay=0.05 warmup="${WARMUP:-100}" \
        lr_schedule=cosine lr_final=0.02 ema_half_life=100000 steps="$steps" log_every="${LOG:-100}" save_every=1000 \
        sample_every=2000 init_from="$start" >"$run.log" 2>&1 && break
    newest=$(ls -d "$run"/checkpoints/step-* 2>/dev/null | tail -1)
    [ -z "$newest" ] || start=$newest/ema.safetensors
done
# what its time cut short has no file yet, but its averages of then are as good
if [ -f "$run/control.safetensors" ]; then
    cp "$run/control.safetensors" "$work/control.safetensors"
else
    newest=$(ls -d "$work"/run-*/checkpoints/step-* 2>/dev/null | tail -1)
    [ -n "$newest" ] || { echo "no weights: $work/run-*.log says why" >&2 && exit 1; }
    python3 tools/pack.py "$newest" "$work/control.safetensors"
fi
python3 docs/runs/icons-control/edges.py "$work/control.safetensors" "$data" "$work/cache" "$work/sheet.png" \
    "${COUNT:-200}" "${DEVICE:-auto}" >"$work/edges.jsonl" 2>"$work/edges.log"
cat "$work/edges.jsonl"
