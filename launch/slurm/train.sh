#!/usr/bin/env bash
# Training on all nodes: pre-training, fine-tuning, reward models, DPO, and RL whose servers share the trainer's nodes.
# By hand: fill in the lines from here to "filled in", then: sbatch launch/slurm/train.sh
# `megatron-r1 submit` fills in the same lines and nothing else.
#SBATCH --job-name=megatron_r1
#SBATCH --account=ACCOUNT
#SBATCH --partition=PARTITION
#SBATCH --qos=QOS
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

set -euo pipefail
functions=launch/slurm/job.sh
python=.venv/bin/python
run=runs/pretrain
output=runs/pretrain
arguments=(pretrain platform=cuda name=pretrain)
restart=requeue
max_restarts_without_progress=3
grace_s=120
preflight=true
preflight_limit_s=600
environment=(OMP_NUM_THREADS=8)
env_file=
srun_options=()
container=()
setup=()
# filled in

# shellcheck source=launch/slurm/job.sh
source "$functions"
begin
start trainer "$SLURM_JOB_NUM_NODES" "$SLURM_NTASKS_PER_NODE" -- "$python" -m megatron_r1 "${arguments[@]}"
finish
