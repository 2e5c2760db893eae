#!/usr/bin/env bash
# Reinforcement learning in one allocation: the first nodes train, the other `engine_nodes` run the servers.
# By hand: fill in the lines from here to "filled in", then: sbatch launch/slurm/rl.sh
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
run=runs/r1_zero
output=runs/r1_zero
arguments=(grpo platform=cuda name=r1_zero init.from=runs/pretrain)
engine_nodes=1
servers_per_node=8
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
trainer_nodes=$((SLURM_JOB_NUM_NODES - engine_nodes))
ports=$(ports "$servers_per_node")
arguments+=(rollout.sglang.slurm.nodes=job "rollout.sglang.slurm.skip_nodes=$trainer_nodes")
arguments+=("rollout.sglang.slurm.ports=[$ports]")
make_keys
program=("$python" -m megatron_r1)
start servers "$engine_nodes" 1 --relative="$trainer_nodes" -- "${program[@]}" serve "${arguments[@]}"
start trainer "$trainer_nodes" "$SLURM_NTASKS_PER_NODE" --relative=0 -- "${program[@]}" "${arguments[@]}"
finish
