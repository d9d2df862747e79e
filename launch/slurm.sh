#!/usr/bin/env bash
# Submits the program to SLURM.
#   ACCOUNT=... PARTITION=... TIME=HH:MM:SS NODES=N launch/slurm.sh [--dry-run] -- \
#     --config=FILE --workdir=SHARED_DIR ...
# TASKS_PER_NODE (1), CPUS_PER_TASK and GPUS_PER_TASK go to sbatch; PYTHON names the
# interpreter, the same on all nodes. All nodes must see the data and the workdir.
set -euo pipefail

fail() { echo "slurm.sh: $1" >&2; exit 2; }

dry_run=no
if [ "${1:-}" = --dry-run ]; then dry_run=yes; shift; fi
for variable in ACCOUNT PARTITION TIME NODES; do
  [ -n "${!variable:-}" ] || fail "the environment variable $variable is missing"
done
[ "${1:-}" = -- ] || fail "'--' and the arguments of nad_jax.main are missing"
shift
[ $# -ge 1 ] || fail "the arguments of nad_jax.main are missing after '--'"
# What the batch job would refuse, hours later.
bash "$(dirname "$0")/slurm.sbatch" --dry-run "$@" > /dev/null

command=(sbatch "--account=$ACCOUNT" "--partition=$PARTITION" "--time=$TIME"
  "--nodes=$NODES" "--ntasks-per-node=${TASKS_PER_NODE:-1}")
[ -z "${CPUS_PER_TASK:-}" ] || command+=("--cpus-per-task=$CPUS_PER_TASK")
[ -z "${GPUS_PER_TASK:-}" ] || command+=("--gpus-per-task=$GPUS_PER_TASK")
command+=("$(dirname "$0")/slurm.sbatch" "$@")
if [ "$dry_run" = yes ]; then
  printf '%q ' "${command[@]}"
  echo
else
  "${command[@]}"
fi
