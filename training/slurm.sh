#!/bin/bash
# Pretrain members on machines of a SLURM cluster. At its time limit the job saves, is queued again and continues.
# Submit it from the root of the repository; all machines must see the output folder. Options go before the script:
#   sbatch --nodes 4 training/slurm.sh training/recipes/imagenet_resnet50_cat4.yaml --parallelism auto
#SBATCH --job-name=members
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
set -u

# What a machine runs. Mixed precision and compilation are the recipe's. A single process needs no launcher, which
# would end at once on SIGTERM and not wait for it.
# shellcheck disable=SC2016  # the machine expands it
machine='
processes=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1}))
if [ "$processes" -eq 1 ]; then
    exec python training/pretrain_members.py "$@"
fi
exec accelerate launch --multi_gpu --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes "$processes" --main_process_ip "$MAIN_MACHINE" --main_process_port "$PORT" \
    training/pretrain_members.py "$@"
'
MAIN_MACHINE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000)) # another one for each job on the same machine
export MAIN_MACHINE PORT
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since SLURM 22.05, srun does not take it from sbatch
fi

# Five minutes before the time limit SLURM sends USR1 to this script alone. The signal goes on to the training, which
# saves and ends; without --batch or --full, scancel leaves this script alone.
time_is_up=
trap 'time_is_up=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun bash -c "$machine" bash "$@" &
training=$!
interrupted=$((128 + $(kill -l USR1)))
while wait "$training"; code=$?; [ "$code" -eq "$interrupted" ]; do
    : # USR1 has interrupted the wait; the training is still saving
done
if [ -n "$time_is_up" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit
fi
exit "$code"
