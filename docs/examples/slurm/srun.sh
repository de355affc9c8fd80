#!/bin/bash
# Without torchrun: srun starts the ranks themselves.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8     # one task for each rank
#SBATCH --gpus-per-node=8
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m sftmix "$@"' sftmix \
  run --config recipe:alpaca-llama3.1-8b --training.parallel hsdp --out /shared/runs/alpaca
code=$?
[ "$code" -ne 143 ] || scontrol requeue "$SLURM_JOB_ID"         # stopped by a signal, and saved
exit "$code"
