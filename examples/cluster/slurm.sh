#!/bin/bash
# STORE=/shared/acts RUN=/shared/run sbatch examples/cluster/slurm.sh --arch topk --l0 16,32,64 --d-sae 16384
#
# A sweep over two nodes, one process on each, with all of its accelerators. Needs sae-jax on the PATH of every
# node, and STORE and RUN in a folder that all nodes share. Three minutes before the time is up, and when a node
# fails or is taken away, the job goes back into the queue, and on from its last checkpoint.
#
# One process per accelerator works as well: --ntasks-per-node=8 --gpus-per-task=1.

#SBATCH --job-name=sae-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append

resume=()
[ -d "$RUN/checkpoints" ] && resume=(--resume)

srun sae-jax sweep "$STORE" --mesh auto --out "$RUN" "${resume[@]}" "$@"
status=$?

# 2 is an option that cannot be used, and would be no better the next time
if [ $status -ne 2 ] && [ ! -e "$RUN/sweep.json" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
