#!/bin/bash
# One torchrun on each node, started by srun.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # one torchrun on each node, which starts the ranks
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300       # 300 s before the end: SIGTERM to each torchrun, which hands it to its ranks

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240   # seconds that torchrun then leaves them to save; 30 without this
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 \
  --rdzv_backend c10d --rdzv_endpoint "$first:29500" --rdzv_id "$SLURM_JOB_ID" \
  -m sftmix run --config recipe:alpaca-llama3.1-8b --training.parallel hsdp --out /shared/runs/alpaca
