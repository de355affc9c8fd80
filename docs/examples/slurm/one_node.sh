#!/bin/bash
# torchrun in the batch script itself, on one node: the script passes the signal on.
#SBATCH --gpus=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300     # B: to this script alone
#SBATCH --requeue               # the job may be put back into the queue,
#SBATCH --open-mode=append      # and writes on in the same log

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
torchrun --nproc_per_node 8 -m sftmix run --config recipe:alpaca-llama3.1-8b --out runs/alpaca &
run=$!
trap 'again=yes; kill -TERM "$run"' USR1
trap 'kill -TERM "$run"' TERM
while wait "$run"; code=$?; [ "$code" -gt 128 ]; do :; done     # a signal ends the wait, but not the run
[ -z "$again" ] || scontrol requeue "$SLURM_JOB_ID"             # out of time, or pre-empted: it is to go on
exit "$code"
