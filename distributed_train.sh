#!/usr/bin/env bash
# train.py on N processes of this machine, or on N processes of each of several machines, under torchrun.
# Everything after N goes to train.py unchanged:
#
#   ./distributed_train.sh 8 --config configs/volo_d1_224.yaml --data.root /data/imagenet
#
# Several machines, fixed places: run the same line on each, with its own NODE_RANK.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 [MASTER_PORT=29500] ./distributed_train.sh 8 --config ...
# Several machines, places found at a rendezvous: the same line everywhere.
#   NNODES=2 RDZV_ENDPOINT=node0:29400 [RDZV_ID=volo] [RDZV_BACKEND=c10d] ./distributed_train.sh 8 --config ...
#
# NUMA_BINDING=node (or another mode of torchrun's --numa-binding) keeps each process on the cores near its GPU.
# MAX_RESTARTS (3) is how often the run starts again, from its last checkpoint, after a process was killed, a peer lost or
# an unforeseen error. A run that was stopped, used wrongly, or gave a reason that would come again is not.
# PYTHON chooses the interpreter; else it is .venv's, else python on PATH.
# Exit codes: those of train.py (0 done, 1 failed, 2 wrong usage, 75 stopped by a signal with a checkpoint saved).
# SIGINT, SIGTERM, SIGHUP and SIGUSR1 (Slurm's warning) stop the run: the step is finished and a checkpoint saved.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1

usage_error() {
    echo "usage: distributed_train.sh N --config RECIPE.yaml [--section.field VALUE ...]" >&2
    echo "distributed_train.sh: error: $1" >&2
    exit 2
}

is_number() { [[ $1 =~ ^(0|[1-9][0-9]*)$ ]]; }

# --- Processes and machines
[ $# -ge 1 ] || usage_error "give N, the number of processes on this machine (one a GPU)"
num_processes=$1
shift
is_number "$num_processes" && [ "$num_processes" -ge 1 ] ||
    usage_error "N is '$num_processes'; it is the number of processes on this machine, 1 or more, and comes first"

MAX_RESTARTS=${MAX_RESTARTS:-3}
is_number "$MAX_RESTARTS" || usage_error "MAX_RESTARTS is '$MAX_RESTARTS'; it is how often a failed run starts again"

place=(--nproc_per_node "$num_processes" --max_restarts "$MAX_RESTARTS")
served_port= # by this machine, where the others look for it
if [ -n "${RDZV_ENDPOINT:-}" ]; then
    [ -n "${NNODES:-}" ] || usage_error "RDZV_ENDPOINT is set but NNODES is not: set it to the number of machines"
    place+=(--nnodes "$NNODES" --rdzv_backend "${RDZV_BACKEND:-c10d}")
    place+=(--rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id "${RDZV_ID:-volo}")
elif [ "${NNODES:-1}" != 1 ]; then
    is_number "$NNODES" && [ "$NNODES" -ge 1 ] || usage_error "NNODES is '$NNODES'; it is the number of machines"
    is_number "${NODE_RANK:-}" && [ "$NODE_RANK" -lt "$NNODES" ] ||
        usage_error "NODE_RANK is '${NODE_RANK:-}'; with NNODES=$NNODES it is 0 ... $((NNODES - 1)), one a machine"
    [ -n "${MASTER_ADDR:-}" ] || usage_error "set MASTER_ADDR to the address of the machine with NODE_RANK=0"
    MASTER_PORT=${MASTER_PORT:-29500}
    is_number "$MASTER_PORT" || usage_error "MASTER_PORT is '$MASTER_PORT'; it is a port number"
    place+=(--nnodes "$NNODES" --node_rank "$NODE_RANK")
    place+=(--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
    [ "$NODE_RANK" != 0 ] || served_port=$MASTER_PORT
else
    place+=(--standalone) # a free port of its own: runs on one machine never clash
fi

# --- Interpreter
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$root/.venv/bin/python" ]; then
        PYTHON=$root/.venv/bin/python
    else
        PYTHON=$(command -v python || command -v python3) ||
            { echo "distributed_train.sh: error: no Python found; run scripts/setup.sh, or set PYTHON" >&2; exit 1; }
    fi
fi

# --- Cores near each GPU
if [ -n "${NUMA_BINDING:-}" ]; then
    "$PYTHON" -m torch.distributed.run --help 2>/dev/null | grep -e --numa-binding >/dev/null ||
        usage_error "NUMA_BINDING is set, but this torchrun has no --numa-binding; unset it, or install a newer PyTorch"
    place+=(--numa-binding "$NUMA_BINDING")
fi

# --- The port, before torchrun's own words on it, which fill a screen
if [ -n "$served_port" ]; then
    "$PYTHON" -c '
import socket, sys
port = int(sys.argv[1])
try:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))
except (OSError, OverflowError) as error:
    sys.exit(f"distributed_train.sh: error: port {port} cannot be used on this machine ({error}); "
             "set MASTER_PORT to a free one, the same on every machine")' "$served_port" || exit 1
fi

# --- CPU threads of each process; torchrun would make it one, whatever the machine has
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$(($(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) / num_processes))
    export OMP_NUM_THREADS=$((threads > 1 ? threads : 1))
fi

# --- Run. torchrun makes 1 of every exit code of its processes, and ends with a screen of its own words. So the first
# process of this machine leaves its code in this file, and the first that fails its reason beside it.
exit_file=$(mktemp "${TMPDIR:-/tmp}/volo_exit.XXXXXX") || exit 1
trap 'rm -f "$exit_file" "$exit_file".reason.*' EXIT
export VOLO_EXIT_FILE=$exit_file
# To this process they send SIGUSR2 when another attempt would end as theirs did.
export VOLO_LAUNCHER=$$
# A stopped run needs time to write its checkpoint before torchrun kills it (torchrun's own default: 30 s).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

signalled=0 # by the signal that interrupted the last wait
stop=       # the first signal
torchrun=
# shellcheck disable=SC2329 # the trap below calls it
forward() {
    signalled=1
    [ -z "$stop" ] || return # a second signal makes torchrun leave while its processes are still saving
    stop=$1
    [ -z "$torchrun" ] || kill -s "$stop" "$torchrun" 2>/dev/null # it may have ended by itself
    [ -z "${2:-}" ] || return
    echo "distributed_train.sh: stopping: the step is finished and a checkpoint saved" >&2
}
trap 'forward INT' INT
trap 'forward TERM' TERM HUP USR1
trap 'forward TERM forgo-restarts' USR2
trap '' PIPE # Ctrl-C also ends the reader of "... 2>&1 | tee log": saying so must not end this script

# Job control gives torchrun a process group of its own: Ctrl-C reaches it once, through `forward`, not twice.
# SIGUSR1 to every process of a job would end torchrun, which knows it not, before its processes have saved.
set -m
(
    trap '' USR1 USR2
    exec "$PYTHON" -m torch.distributed.run "${place[@]}" "$root/train.py" "$@" </dev/null
) &
torchrun=$!
[ -z "$stop" ] || kill -s "$stop" "$torchrun" # it came before torchrun was there
while signalled=0; wait "$torchrun"; code=$?; [ $signalled = 1 ]; do :; done

if [ $code -ne 0 ] && [ -s "$exit_file" ]; then
    recorded=$(cat "$exit_file")
    # 0 there means another rank failed after rank 0 was done.
    is_number "$recorded" && [ "$recorded" -ne 0 ] && code=$recorded
fi
reason=
for file in "$exit_file".reason.*; do reason=$file; done # of the last attempt
if [ "$code" -ne 0 ] && [ "$code" -ne 75 ] && [ -s "$reason" ]; then
    echo "distributed_train.sh: error: $(cat "$reason")" >&2
fi
exit "$code"
