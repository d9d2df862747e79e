#!/usr/bin/env bash
# Runs the program on a TPU slice, got as a queued resource.
#   launch/tpu_vm.sh [--dry-run] create        ask for the slice and wait until it is there
#   launch/tpu_vm.sh [--dry-run] run -- ARGS   install this checkout on all workers, start
#   launch/tpu_vm.sh [--dry-run] logs          follow worker 0
#   launch/tpu_vm.sh [--dry-run] delete        give the slice back
# Needs PROJECT, ZONE and NAME; `create` also ACCELERATOR_TYPE and RUNTIME_VERSION, and
# takes SPOT=yes. `run` takes the commit that is checked out, and refuses a checkout that
# differs from it; the workers' reports name it. They need a python3 of 3.11 or newer,
# which depends on RUNTIME_VERSION. A preempted slice loses its disks: let --workdir be on
# a mounted POSIX file system, such as Filestore or another NFS (a bucket renames no
# folder in one piece and locks no file), at least on worker 0, and repeat `create` and
# `run`.
set -euo pipefail

fail() { echo "tpu_vm.sh: $1" >&2; exit 2; }

# Prints a command, or runs it.
run() {
  if [ "$dry_run" = yes ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

need() {
  local variable
  for variable in "$@"; do
    [ -n "${!variable:-}" ] || fail "the environment variable $variable is missing"
  done
}

dry_run=no
if [ "${1:-}" = --dry-run ]; then dry_run=yes; shift; fi
action=${1:-}
[ $# -eq 0 ] || shift
case $action in
  create) need PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION ;;
  run | logs | delete) need PROJECT ZONE NAME ;;
  *) fail "the action must be create, run, logs or delete, got '$action'" ;;
esac
where=("--project=$PROJECT" "--zone=$ZONE")
queue=(gcloud compute tpus queued-resources)
machine=(gcloud compute tpus tpu-vm)

create() {
  local options=()
  [ "${SPOT:-no}" != yes ] || options+=(--spot)
  run "${queue[@]}" create "$NAME" "${where[@]}" "--node-id=$NAME" \
    "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION" \
    "${options[@]}"
  local describe=("${queue[@]}" describe "$NAME" "${where[@]}" "--format=value(state.state)")
  if [ "$dry_run" = yes ]; then
    run "${describe[@]}"
    return
  fi
  local state
  while true; do
    state=$("${describe[@]}")
    echo "$NAME: $state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING) exit 1 ;;
    esac
    sleep 30
  done
}

# One line where pip, with an old Python, would print a page.
check_python="python3 -c 'import sys; sys.version_info >= (3, 11) or sys.exit(\"tpu_vm.sh: python3 must be 3.11 or newer, got \" + sys.version.split()[0])'"

start() {
  [ "${1:-}" = -- ] || fail "'--' and the arguments of nad_jax.main are missing"
  shift
  [ $# -ge 1 ] || fail "the arguments of nad_jax.main are missing after '--'"
  local root commit arguments
  root=$(cd "$(dirname "$0")/.." && pwd)
  commit=$(git -C "$root" rev-parse HEAD) || fail "$root is no git checkout"
  if [ "$dry_run" = no ] && [ -n "$(git -C "$root" status --porcelain)" ]; then
    fail "the checkout differs from commit $commit; commit or stash the changes"
  fi
  arguments=$(printf '%q ' "$@")
  archive=$(mktemp -d)/nad_jax-checkout.tar.gz
  trap 'rm -rf "$(dirname "$archive")"' EXIT
  run git -C "$root" archive --format=tar.gz "--output=$archive" "$commit"
  run "${machine[@]}" scp "$archive" "$NAME:" "${where[@]}" --worker=all
  run "${machine[@]}" ssh "$NAME" "${where[@]}" --worker=all "--command=$check_python"
  run "${machine[@]}" ssh "$NAME" "${where[@]}" --worker=all \
    "--command=mkdir -p nad_jax && tar -xzf nad_jax-checkout.tar.gz -C nad_jax && python3 -m venv venv && venv/bin/pip install --quiet --constraint nad_jax/constraints.txt './nad_jax[tpu]'"
  # Each worker goes on without the connection.
  run "${machine[@]}" ssh "$NAME" "${where[@]}" --worker=all \
    "--command=cd nad_jax && NAD_JAX_COMMIT=$commit nohup ../venv/bin/python -m nad_jax.main ${arguments}--distributed=required > ../nad_jax.log 2>&1 < /dev/null &"
}

case $action in
  create) create ;;
  run) start "$@" ;;
  logs)
    run "${machine[@]}" ssh "$NAME" "${where[@]}" --worker=0 \
      "--command=tail -n 100 -f nad_jax.log"
    ;;
  delete) run "${queue[@]}" delete "$NAME" "${where[@]}" --force --quiet ;;
esac
