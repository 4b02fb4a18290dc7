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

# --- Processes, and the CPU threads each may use
plan=$("$python" -c '
import os, torch
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
processes = min(gpus, 2) or 2
print(processes, max(1, cores // processes), "GPU" if gpus else "CPU", cores)')
read -r processes threads device cores <<<"$plan"

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
echo "Training on $processes processes, $device: runs/$name"
started=$SECONDS
OMP_NUM_THREADS=$threads PYTHON=$python ./distributed_train.sh "$processes" --config configs/quickstart.yaml \
    --train.name "$name" --train.resume never "$@"
echo "Trained in $((SECONDS - started)) s. Evaluating the best checkpoint:"
OMP_NUM_THREADS=$cores "$python" validate.py --config "$run/config.yaml" --checkpoint "$run/best.pt"

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
