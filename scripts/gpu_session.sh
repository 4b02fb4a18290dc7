#!/usr/bin/env bash
# The first half hour on a GPU: is it right, how fast is it, does the loader keep up? One table and one JSON at the end.
#
#   bash scripts/gpu_session.sh [PART ...]        right, speed, compiled, largest, loader; without any: all, in order
#
#   OUT=gpu-session      folder for the output of every step, summary.txt and session.json
#   PYTHON=.venv/bin/python
#   DEVICE=cpu           rehearse everything on the CPU, with small networks: its numbers mean nothing

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-gpu-session} DEVICE=${DEVICE:-cuda}
export VOLO_GPU_TESTS_DEVICE=$DEVICE

parts=("$@")
[ $# -gt 0 ] || parts=(right speed compiled largest loader)
for part in "${parts[@]}"; do
    case $part in
    right | speed | compiled | largest | loader) ;;
    *) echo "gpu_session.sh: error: there is no part '$part'; parts are right, speed, compiled, largest, loader" >&2
        exit 2 ;;
    esac
done

if [ -e "$OUT" ] && [ ! -f "$OUT/steps.tsv" ]; then # its runs and results are about to be removed
    echo "gpu_session.sh: error: OUT is $OUT, which is there and is not of an earlier session; name another" >&2
    exit 2
fi
mkdir -p "$OUT"
rm -rf "$OUT/runs" "$OUT"/*.json
: >"$OUT/steps.tsv"

step() { # step NAME SECONDS COMMAND...: one line of the table
    local name=$1 limit=$2 begin=$SECONDS rc=0
    shift 2
    echo "--- $name"
    timeout -k 10 "$limit" "$@" >"$OUT/$name.txt" 2>&1 || rc=$?
    printf '%s\t%s\t%s\t%s\n' "$name" "$rc" "$((SECONDS - begin))" "$(grep -v '^\s*$' "$OUT/$name.txt" | tail -1)" \
        >>"$OUT/steps.tsv"
    tail -3 "$OUT/$name.txt"
}

bench() { # bench NAME SECONDS OPTIONS...
    step "$1" "$2" "$PYTHON" scripts/benchmark/step.py --device "$DEVICE" --json "$OUT/$1.json" "${@:3}"
}

networks=(volo_d1:224:128 volo_d2:224:128 volo_d3:448:32 volo_d4:224:128 volo_d5:224:128 volo_d5:512:30)
rounds=5
if [ "$DEVICE" = cpu ]; then
    networks=(volo_d1:32:2)
    rounds=2
fi
all=$(IFS=, && echo "${networks[*]}")

right() { # 5 minutes
    command -v nvidia-smi >/dev/null && step card 60 nvidia-smi
    step tests 600 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu
    command -v compute-sanitizer >/dev/null && step memcheck 300 compute-sanitizer --tool memcheck \
        "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu/test_kernels.py -k "bfloat16 and not large"
}

speed() { # 8 minutes: training and inference beside timm
    bench step-d1 300 --networks "${networks[0]}" --variants 0,1,2,3 --rounds "$rounds" --profile true
    bench step-all 600 --networks "$all" --variants 1 --rounds "$rounds"
}

compiled() { # 6 minutes, most of them the compiler's
    bench compiled 600 --networks "${networks[0]}" --variants 1,4 --compile true --rounds "$rounds"
}

largest() { # 4 minutes
    bench largest 400 --networks "$all" --variants 1 --largest true --inference false
}

loader() { # 6 minutes: 4,400 photographs of ImageNet's size, made on the spot
    local images=4400 batch=128 recipe=(configs/volo_d1_224.yaml) workers
    if [ "$DEVICE" = cpu ]; then
        images=44 batch=4
        recipe+=(--model.img_size 32)
    fi
    step photographs 120 "$PYTHON" scripts/benchmark/gpu_session.py photographs "$OUT/photographs" "$images"
    bench step-loader 240 --networks "${networks[0]}" --variants 1 --inference false --rounds "$rounds" \
        --images "$OUT/photographs"
    for workers in 8 16; do
        step "loader-$workers" 240 "$PYTHON" train.py --config "${recipe[@]}" --data.root "$OUT/photographs" \
            --data.class_list folders --model.num_classes 10 --train.batch_size "$batch" --train.device "$DEVICE" \
            --schedule.epochs 3 --schedule.warmup_epochs 1 --schedule.cooldown_epochs 0 --train.log_every_steps 10 \
            --token_label.root null --train.output "$OUT/runs" --train.name "loader-$workers" --train.resume never \
            --data.workers "$workers"
    done
}

for part in "${parts[@]}"; do
    "$part"
done
"$PYTHON" scripts/benchmark/gpu_session.py summary "$OUT" | tee "$OUT/summary.txt"
