#!/usr/bin/env bash
# Runs the program as several processes on this machine, as a rehearsal for a cluster.
#   launch/local.sh [--dry-run] PROCESSES -- --config=FILE --workdir=DIR ...
# DEVICES=N gives each process N virtual CPU devices; PYTHON names the interpreter.
set -euo pipefail

# For those that fail for the same reason to say so themselves.
GRACE_SECONDS=5

fail() { echo "local.sh: $1" >&2; exit 2; }

dry_run=no
if [ "${1:-}" = --dry-run ]; then dry_run=yes; shift; fi
[ $# -ge 1 ] || fail "the number of processes is missing: local.sh [--dry-run] N -- ..."
processes=$1
shift
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES must be a number, got '$processes'"
[ "${1:-}" = -- ] || fail "'--' and the arguments of nad_jax.main are missing"
shift
[ $# -ge 1 ] || fail "the arguments of nad_jax.main are missing after '--'"

python=${PYTHON:-python}
if [ -n "${DEVICES:-}" ]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
  export JAX_PLATFORMS=cpu
fi
if [ -n "${PORT:-}" ]; then
  port=$PORT
elif [ "$dry_run" = yes ]; then
  port=PORT
else
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
fi

children=()
stop() { [ ${#children[@]} -eq 0 ] || kill -"$1" "${children[@]}" 2>/dev/null || true; }
trap 'stop TERM' TERM
trap 'stop INT' INT

for ((process = 0; process < processes; process++)); do
  command=("$python" -m nad_jax.main "$@" --distributed=required
    "--coordinator_address=localhost:$port" "--num_processes=$processes"
    "--process_id=$process")
  if [ "$dry_run" = yes ]; then
    [ -z "${DEVICES:-}" ] || printf 'XLA_FLAGS=%q JAX_PLATFORMS=cpu ' "$XLA_FLAGS"
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}" &
    children+=($!)
  fi
done

# The first failure ends all: the others would wait for a process that is gone.
status=0
while [ ${#children[@]} -gt 0 ]; do
  code=0
  ended=
  wait -n -p ended "${children[@]}" || code=$?
  [ -n "${ended:-}" ] || continue # a signal to this script, passed on by the trap
  # One that was waited for is no job any more, and its number may be another's.
  left=()
  for child in "${children[@]}"; do
    [ "$child" = "$ended" ] || left+=("$child")
  done
  children=("${left[@]}")
  if [ $code -ne 0 ] && [ $status -eq 0 ]; then
    status=$code
    sleep "$GRACE_SECONDS"
    stop KILL
  fi
done
exit $status
