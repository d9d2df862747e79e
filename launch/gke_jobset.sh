#!/usr/bin/env bash
# Runs the program as a JobSet on a TPU slice of a GKE cluster that kubectl reaches.
#   NAME=... IMAGE=... TPU_ACCELERATOR=tpu-v4-podslice TPU_TOPOLOGY=2x2x4 HOSTS=4 \
#     VOLUME=CLAIM MOUNT=/runs launch/gke_jobset.sh [--dry-run] -- --config=FILE \
#     --workdir=/runs/NAME ...
# IMAGE is built from launch/Dockerfile. VOLUME is a PersistentVolumeClaim that several
# nodes may write, mounted at MOUNT on every pod: pods that restart have lost their own
# disks, so the workdir must be there. It has to be a POSIX file system, such as Filestore
# or another NFS: a bucket (GCS FUSE) renames no folder in one piece and locks no file.
# CHIPS_PER_HOST is 4 unless given. GKE tells the pods of each other. A pod that was asked
# to stop before there is a result fails, so that the JobSet is started again. With
# --dry-run the JobSet is printed.
set -euo pipefail

fail() { echo "gke_jobset.sh: $1" >&2; exit 2; }

dry_run=no
if [ "${1:-}" = --dry-run ]; then dry_run=yes; shift; fi
for variable in NAME IMAGE TPU_ACCELERATOR TPU_TOPOLOGY HOSTS VOLUME MOUNT; do
  [ -n "${!variable:-}" ] || fail "the environment variable $variable is missing"
done
[[ $HOSTS =~ ^[1-9][0-9]*$ ]] || fail "HOSTS must be a number, got '$HOSTS'"
[[ $MOUNT == /?* ]] || fail "MOUNT must be an absolute path, got '$MOUNT'"
[ "${1:-}" = -- ] || fail "'--' and the arguments of nad_jax.main are missing"
shift
[ $# -ge 1 ] || fail "the arguments of nad_jax.main are missing after '--'"

workdir=
for argument in "$@"; do
  case $argument in --workdir=*) workdir=${argument#--workdir=} ;; esac
done
case $workdir in
  */../* | */..) fail "--workdir must be below MOUNT=$MOUNT, without .., got '$workdir'" ;;
  "${MOUNT%/}"/?*) ;;
  *) fail "--workdir must be below MOUNT=$MOUNT, got '$workdir'" ;;
esac

# A YAML string in single quotes.
quoted() { printf "'%s'" "${1//\'/\'\'}"; }

# The program ends with 0 when it was asked to stop, and Kubernetes would call that
# succeeded. Pod 0 writes the results; others might see an old listing of the volume. In
# one process, as a shell in front of the program would keep SIGTERM to itself.
program='import os, sys
from nad_jax import main
code = main.main(sys.argv)
results = ("report", "audit", "inspection")
paths = [os.path.join(os.environ["WORKDIR"], name + ".json") for name in results]
if code == 0 and os.environ["JOB_COMPLETION_INDEX"] == "0":
    code = 0 if any(map(os.path.exists, paths)) else 143
sys.exit(code)'

jobset() {
  cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(quoted "$NAME")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 10
  replicatedJobs:
    - name: workers
      replicas: 1
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          completionMode: Indexed
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              # The group of the image's user: a new volume belongs to root.
              securityContext:
                fsGroup: 1000
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: $(quoted "$VOLUME")
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(quoted "$TPU_ACCELERATOR")
                cloud.google.com/gke-tpu-topology: $(quoted "$TPU_TOPOLOGY")
              containers:
                - name: nad-jax
                  image: $(quoted "$IMAGE")
                  command:
                    - python
                    - -c
                    - |
                      ${program//$'\n'/$'\n'                      }
                  env:
                    - name: WORKDIR
                      value: $(quoted "$workdir")
                  ports:
                    - containerPort: 8471
                    - containerPort: 8482
                  volumeMounts:
                    - name: runs
                      mountPath: $(quoted "$MOUNT")
                  resources:
                    limits:
                      google.com/tpu: ${CHIPS_PER_HOST:-4}
                  args:
YAML
  local argument
  for argument in "$@" --distributed=required; do
    printf '                    - %s\n' "$(quoted "$argument")"
  done
}

if [ "$dry_run" = yes ]; then
  jobset "$@"
else
  jobset "$@" | kubectl apply -f -
fi
