#!/bin/sh
# Latent diffusion and `icons` beside each other, on one GPU: sh docs/runs/icons-ldm/run.sh DATA WORK CODEC
# DATA is the icon pack, WORK a new folder, CODEC the weights of icons' own autoencoder. AE (400) is the seconds of the
# autoencoder, N128 (1600) and N256 (250) the steps of both networks. What is left in WORK: the runs kl, ldm-128, ldm,
# icons-128, icons, an evaluation of each of the two, packed weights, logs.
set -eu
data=$1 work=$2 codec=$3 cache=$2/cache
here=$(dirname "$0") n128=${N128:-1600} n256=${N256:-250}
mkdir -p "$work"
ldm() { # NAME, arguments
    name=$1
    shift
    echo "$(date +%T) $name"
    python3 "$here/ldm.py" "$@" >"$work/$name.log" 2>&1 || { echo "$name failed: $work/$name.log says why"; exit 1; }
}
newest() { ls -d "$1"/checkpoints/step-* | tail -1; }
evaluated() { # RUN, NAME
    python3 tools/pack.py "$work/$1/final/$2.safetensors" "$work/$2.safetensors" >>"$work/$1.log" 2>&1
    python3 -m limner evaluate "$work/$2.safetensors" --data "$data" --cache "$cache" --no-speed --batch 128 \
        ${EVALUATE:-} --out "$work/$1-evaluation" >"$work/$1-evaluation.log" 2>&1 || echo "$1 is not evaluated"
}
ldm render-128 render "$data" "$cache" 128
ldm render-256 render "$data" "$cache" 256 &
ldm icons-128 icons "$data" "$cache" "$work/icons-128" "$codec" 128 "$n128"
wait
ldm kl autoencoder "$data" "$cache" "$work/kl" "${AE:-400}"
kl=$work/kl/final/icons-kl.safetensors
ldm ldm-128 network "$data" "$cache" "$work/ldm-128" "$kl" 128 "$n128"
ldm ldm network "$data" "$cache" "$work/ldm" "$kl" 256 "$n256" "$(newest "$work/ldm-128")/ema.safetensors"
evaluated ldm icons-ldm &
ldm icons icons "$data" "$cache" "$work/icons" "$codec" 256 "$n256" "$(newest "$work/icons-128")/ema.safetensors"
evaluated icons icons-beside
wait
echo "$(date +%T) done"
