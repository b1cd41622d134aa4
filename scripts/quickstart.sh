#!/usr/bin/env bash
# From nothing to pictures in a few minutes: installs, converts a PyTorch checkpoint, samples it, trains, samples again.
set -euo pipefail
. "$(dirname "$0")/_env.sh"
make_env ""
out=${1:-out/quickstart}
rm -rf "$out"
mkdir -p "$out"
sf=.venv/bin/mlx-sf

echo "== this device against the published numbers"
$sf selftest | tail -n 1

echo "== convert a PyTorch checkpoint (a small one with random weights, written by the reference's trainer)"
.venv/bin/python convert/from_torch.py tests/golden/parity/forced.pth "$out/converted.npz" --in-context-start 1 --verify
$sf sample --ckpt "$out/converted.npz" --classes 1,2,3,4 --output "$out/converted.png"

echo "== train briefly on the built-in scenes: 300 steps, enough to recognise the classes"
$sf train --size nano --patch 8 --img-size 32 --batch-size 32 --steps 300 --warmup-epochs 0 --lr 2e-3 \
    --ema-warmup --preview-every 150 --save-every 150 --cfg 2 --output "$out/runs" --name quick
$sf sample --ckpt "$out/runs/quick" --num-images 10 --steps 20 --output "$out/trained.png"

echo "== the demo model that comes with the program"
$sf sample --num-images 10 --output "$out/demo.png"

echo
echo "Pictures:"
ls "$out"/*.png "$out"/runs/quick/*.png 2>/dev/null | sed 's/^/  /'
