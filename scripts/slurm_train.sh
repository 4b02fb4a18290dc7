#!/usr/bin/env bash
# A training run as a Slurm job on any number of machines, which goes on in the queue until it is finished:
#
#   sbatch --nodes 4 --gpus-per-node 8 --time 12:00:00 scripts/slurm_train.sh --config configs/volo_d1_224.yaml \
#       --data.root /data/imagenet
#
# Everything after the script goes to train.py. Submit it from the checkout, or name that in VOLO_ROOT; the run folder
# (train.output) has to be on a disk that every machine sees. PROCESSES is the number of processes on each machine, by
# default its GPUs in this job.
#
# Two minutes before the time limit Slurm sends SIGUSR1. The run saves a checkpoint and ends with code 75, and so it
# does at train.stop_after_minutes or if it is preempted; the job then goes back into the queue and resumes there. A job
# that was cancelled, failed or finished does not.
#
#SBATCH --job-name=volo
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -uo pipefail

fail() {
    echo "slurm_train.sh: error: $1" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is a batch script; submit it: sbatch --nodes N scripts/slurm_train.sh --config ..."
[ $# -gt 0 ] || fail "give the options of train.py, --config first"
root=${VOLO_ROOT:-$SLURM_SUBMIT_DIR} # Slurm runs a copy of this script from elsewhere
[ -x "$root/distributed_train.sh" ] ||
    fail "there is no distributed_train.sh in $root; submit from the checkout, or set VOLO_ROOT to it"
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-}}
[ -n "$processes" ] || fail "this job has no GPUs; give sbatch --gpus-per-node, or set PROCESSES"

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || fail "scontrol cannot name the hosts of this job"
export NNODES=$SLURM_JOB_NUM_NODES
export RDZV_ENDPOINT=${hosts%%$'\n'*}:${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export RDZV_ID=volo-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0} # a requeued job meets no process of the one before

signalled=0 # by the signal that interrupted the last wait
step=
# shellcheck disable=SC2329 # the trap below calls it
forward() {
    signalled=1
    [ -z "$step" ] || kill -s USR1 "$step" # srun passes it on to distributed_train.sh on every machine
}
trap forward USR1 TERM

# One launcher on each machine. If one of them fails for good, the others need not wait for it.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 "$root/distributed_train.sh" "$processes" "$@" &
step=$!
while signalled=0; wait "$step"; code=$?; [ $signalled = 1 ]; do :; done

if [ $code -eq 75 ] && scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=CANCELLED'; then
    echo "slurm_train.sh: the job was cancelled: it does not go back into the queue" >&2
elif [ $code -eq 75 ]; then
    echo "slurm_train.sh: stopped with a checkpoint saved; back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID" || exit 1
fi
exit $code
