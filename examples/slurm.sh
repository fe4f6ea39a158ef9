#!/bin/bash
#SBATCH --job-name=dopsd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Trains under SLURM, on one node or many, and goes on by itself after a time limit. From the checkout, where .venv is:
#
#   sbatch examples/slurm.sh zimage_turbo_full data.path=/shared/my_images output.dir=/shared/runs/mine
#   sbatch --nodes=2 examples/slurm.sh zimage_turbo_full_2nodes data.path=/shared/my_images output.dir=/shared/runs/mine
#
# The checkout, the model, the data and output.dir must lie where every node sees them. One task is one rank on one GPU: a node of
# 4 GPUs needs --ntasks-per-node=4 --gpus-per-node=4, and with zimage_turbo_full_2nodes also the argument
# deepspeed.config.zero_optimization.zero_hpz_partition_size=4.
#
# srun starts the ranks itself. No launcher stands between, so that the signal ten minutes before the limit reaches the ranks alone:
# they end the step, save and leave with the code 143, and the job is queued again. resume=auto continues it.
#
# Tried with a stand-in for srun and CPU ranks, not on a cluster.

cd "$SLURM_SUBMIT_DIR" || exit 1
source .venv/bin/activate || exit 1

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$SLURM_NTASKS LOCAL_SIZE=$SLURM_NTASKS_PER_NODE
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over from sbatch since SLURM 22.05

# A rank that is lost is reported by the others, which then end by themselves: srun must not end them before.
srun --kill-on-bad-exit=0 bash -c \
    'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec python dopsd_fast/train.py "$@"' train "$@" resume=auto
code=$?

if [ "$code" = 143 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
