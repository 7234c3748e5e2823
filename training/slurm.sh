#!/bin/bash
# Pretrain members on several machines of a SLURM cluster. The job is requeued at its time limit and continues where it stopped.
#   sbatch --nodes 4 training/slurm.sh training/recipes/imagenet_resnet50_cat4.yaml --parallelism members
# All machines must see the output folder.
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

# Five minutes before the time limit: let the training save and exit, then queue the same job again.
requeue() {
    scancel --signal=TERM --steps "$SLURM_JOB_ID"
    wait
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue USR1

main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c 'exec accelerate launch --multi_gpu --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" --main_process_ip "$0" --main_process_port 29500 \
    --mixed_precision bf16 --dynamo_backend no training/pretrain_members.py "$@"' "$main" "$@" &
wait
