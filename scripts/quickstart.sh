#!/usr/bin/env bash
# From nothing to a trained and evaluated VOLO: set up .venv where needed, write the handwritten digits, train on
# them with two torchrun processes (on CPU, or on one or two CUDA GPUs), evaluate the best checkpoint.
# Some two minutes on two CPU cores after installation; ends with exit code 1 below 98 % top-1.
#
#   bash scripts/quickstart.sh [--section.field VALUE ...]     options go to train.py

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
python=.venv/bin/python
"$python" scripts/make_digits.py --output data/digits

processes=$("$python" -c 'import torch; c = torch.cuda; print((min(2, c.device_count()) if c.is_available() else 0) or 2)')

# --- A run folder of its own: what an earlier quickstart left stays as it is. mkdir takes the name for us alone.
mkdir -p runs
name=quickstart
for ((n = 2; ; n++)); do
    mkdir "runs/$name" 2>/dev/null && break
    [ -e "runs/$name" ] || { echo "quickstart.sh: error: cannot make the folder runs/$name" >&2; exit 1; }
    name=quickstart-$n
done
run=runs/$name

# --- Train and evaluate
echo "Training with $processes processes: runs/$name"
started=$SECONDS
NNODES=1 RDZV_ENDPOINT="" PYTHON=$python ./distributed_train.sh "$processes" --config configs/quickstart.yaml \
    --train.name "$name" --train.resume never "$@"
echo "Trained in $((SECONDS - started)) s. Evaluating the best checkpoint:"
"$python" validate.py --config "$run/config.yaml" --checkpoint "$run/best.pt"

"$python" -c '
import json, sys
top1 = json.load(open(sys.argv[1]))[0]["top1"]
if top1 < 98:
    sys.exit(f"quickstart.sh: error: top-1 is {top1:.2f} %; at least 98 % was expected")' "$run/results.json"

cat <<EOF

curves:       $run/curves.png
the same in TensorBoard:
              .venv/bin/tensorboard --logdir runs
next to try:  on a folder of your own images, train/<class>/ and val/<class>/:
              ./distributed_train.sh $processes --config configs/cifar10.yaml --model.num_classes CLASSES --data.root FOLDER
              on ImageNet, with 8 GPUs:
              ./distributed_train.sh 8 --config configs/volo_d1_224.yaml --data.root /data/imagenet
EOF
