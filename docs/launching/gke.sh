#!/usr/bin/env bash
# A run of cai_jax on a TPU slice of a GKE cluster that xpk made (pip install xpk).
#
#   docs/launching/gke.sh start NAME CONFIG [--config.FIELD=VALUE ...]
#   docs/launching/gke.sh watch NAME   # the output of process 0
#   docs/launching/gke.sh stop NAME    # the pods get SIGTERM. The same start continues the run
#   docs/launching/gke.sh fetch NAME   # copies the results to runs/NAME, while the run is there
#
# Set these to yours, here or in the environment:
: "${PROJECT:=my-project}" "${ZONE:=us-west4-a}" "${CLUSTER:=my-cluster}"
: "${TPU_TYPE:=v5litepod-16}"
: "${IMAGE:=us-docker.pkg.dev/$PROJECT/images/cai_jax:tpu}" # the Dockerfile beside this file, EXTRA=tpu
: "${STORAGE:=runs}" # xpk storage create runs --type=gcpfilestore --mount-point=/data ...
set -euo pipefail

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# Print the pod of process 0.
first_pod() {
  kubectl get pods -o name \
    -l "jobset.sigs.k8s.io/jobset-name=$1,batch.kubernetes.io/job-completion-index=0" | head -n 1
}

[ $# -ge 2 ] || usage
command="$1" name="$2"
shift 2
where=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
case "$command" in
  start)
    [ $# -ge 1 ] || usage
    config="$1"
    shift
    overrides=''
    [ $# = 0 ] || printf -v overrides ' %q' "$@"
    xpk workload create "${where[@]}" --workload="$name" --tpu-type="$TPU_TYPE" --num-slices=1 \
      --docker-image="$IMAGE" --storage="$STORAGE" --max-restarts=50 \
      --termination-grace-period-seconds=300 \
      --command="cd /cai_jax && exec python launch.py --config=$config --workdir=/data/$name$overrides"
    ;;
  watch) kubectl logs -f "$(first_pod "$name")" ;;
  stop) xpk workload delete "${where[@]}" --workload="$name" ;;
  fetch)
    pod="$(first_pod "$name")"
    kubectl cp "${pod#pod/}:/data/$name" "runs/$name"
    ;;
  *) usage ;;
esac
