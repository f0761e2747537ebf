#!/usr/bin/env bash
# Trains until the end, on one TPU after another: keep_on.sh CONFIG.py [...]
#
# A spot TPU that was preempted stays listed but is never started again.
set -uo pipefail
cd "$(dirname "$0")/../.."
. examples/tpu_vm/settings.sh

if [ -z "$BUCKET" ]; then
  echo "set BUCKET: a TPU that is preempted takes its own runs/ with it" >&2
  exit 1
fi

until bash examples/tpu_vm/train.sh "$@"; do
  sleep 120 # processes hear of a preemption before it is listed
  state=$(gcloud compute tpus tpu-vm describe "$TPU" --zone "$ZONE" \
    --format 'value(state)' 2>/dev/null)
  if [ "$state" = READY ]; then
    echo "the TPU is there, so the run itself failed" >&2
    exit 1
  fi
  gcloud compute tpus queued-resources delete "$TPU" --zone "$ZONE" \
    --force --quiet
  bash examples/tpu_vm/create.sh || exit 1
done
