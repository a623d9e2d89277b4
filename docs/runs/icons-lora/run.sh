#!/bin/sh
# A style LoRA of `icons` in several ranks, and what each does: sh docs/runs/icons-lora/run.sh SPRITES ICONS WORK
# SPRITES is the folder of sprites32_crawl.npz, ICONS the icon pack, WORK a new folder. What is left in it: pictures/,
# a run for each rank, ranks.jsonl and sheets.
set -eu
sprites=$1 icons=$2 work=$3
here=$(dirname "$0")
mkdir -p "$work"
python3 "$here/style.py" pictures "$sprites" "$work/pictures" "${COUNT:-300}"
[ "${OTHERS:=900}" = 0 ] || python3 "$here/style.py" others "$icons" "$work/pictures" "$OTHERS"
for rank in ${RANKS:-1 2 4 8 16 32}; do
    python3 -m limner train lora --model icons --data "$work/pictures" --out "$work/rank-$rank" \
        adapter.rank="$rank" steps="${STEPS:-900}" batch_size=16 lr="${LR:-1e-3}" data.size=256 sample_every=0 \
        save_every=100000 log_every=100 ${MORE:-} >"$work/rank-$rank.log" 2>&1 &
done
wait
WEIGHTS="${WEIGHTS:-1 0.7 0.6 0.5}" python3 "$here/style.py" measure "$sprites" "$icons" "$work/sheets" "$work"/rank-*/lora.safetensors \
    >"$work/ranks.jsonl"
