#!/usr/bin/env bash
# From nothing to a VOLO trained with token labels: set up .venv if needed, write the handwritten digits, train a
# teacher for a few epochs, let it label every token of every training image, train a student on these labels (two
# torchrun processes, on CPU or on one or two CUDA GPUs), evaluate the student's best checkpoint.
# Five to six minutes on two CPU cores after installation; ends with exit code 1 below 98 % top-1.
#
#   bash scripts/quickstart.sh [--section.field VALUE ...]     options go to both trainings

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
python=.venv/bin/python
"$python" scripts/make_digits.py --output data/digits

processes=$("$python" -c 'import torch; c = torch.cuda; print((min(2, c.device_count()) if c.is_available() else 0) or 2)')

# --- A new folder, so that earlier runs are kept. mkdir fails if another process has just taken the name.
mkdir -p runs
folder=runs/quickstart
for ((n = 2; ; n++)); do
    mkdir "$folder" 2>/dev/null && break
    [ -e "$folder" ] || { echo "quickstart.sh: error: cannot make the folder $folder" >&2; exit 1; }
    folder=runs/quickstart-$n
done
run=$folder/student

train() { # train NAME [options]: into $folder/NAME
    NNODES=1 RDZV_ENDPOINT="" PYTHON=$python ./distributed_train.sh "$processes" --config configs/quickstart.yaml \
        --train.output "$folder" --train.resume never --train.name "$@"
}
started=$SECONDS

echo "1/4 A teacher, trained for half as many epochs as its student on $processes processes: $folder/teacher"
train teacher --schedule.epochs 30 "$@"

echo "2/4 It labels every token of the training images: $folder/labels"
# All ten classes are kept: of those that are not, a label says only that they score 0, which is much for one of ten.
"$python" scripts/generate_token_labels.py --images data/digits/train --teacher volo_nano \
    --teacher_checkpoint "$folder/teacher/best.pt" --output "$folder/labels" --top_k 10

echo "3/4 A student, trained on these labels with MixToken: $run"
train student --token_label.root "$folder/labels" "$@"

echo "4/4 Evaluating its best checkpoint ($((SECONDS - started)) s until here):"
"$python" validate.py --config "$run/config.yaml" --checkpoint "$run/best.pt"

"$python" -c '
import json, sys
top1 = json.load(open(sys.argv[1]))[0]["top1"]
if top1 < 98:
    sys.exit(f"quickstart.sh: error: top-1 is {top1:.2f} %; at least 98 % was expected")' "$run/results.json"

cat <<END

curves:       $run/curves.png
labels:       $run/batch.png (the first batch, with the label of every token)
both in TensorBoard:
              .venv/bin/tensorboard --logdir runs
next to try:  on a folder of your own images, train/<class>/ and val/<class>/:
              ./distributed_train.sh $processes --config configs/cifar10.yaml --model.num_classes CLASSES --data.root FOLDER
              on ImageNet, with 8 GPUs:
              ./distributed_train.sh 8 --config configs/volo_d1_224.yaml --data.root /data/imagenet
END
