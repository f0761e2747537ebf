#!/usr/bin/env bash
# Asks for a spot TPU, waits for it, and puts this tree on all of its VMs.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/tpu_vm/settings.sh

if [ -n "$BUCKET" ] && ! gcloud storage buckets describe "gs://$BUCKET" \
  >/dev/null 2>&1; then
  # A checkpoint is whole when its folder is renamed: let that be one operation.
  gcloud storage buckets create "gs://$BUCKET" --location "${ZONE%-*}" \
    --uniform-bucket-level-access --enable-hierarchical-namespace
fi

gcloud compute tpus queued-resources create "$TPU" --node-id "$TPU" \
  --zone "$ZONE" --accelerator-type "$TYPE" --runtime-version "$IMAGE" --spot
until [ "$(gcloud compute tpus tpu-vm describe "$TPU" --zone "$ZONE" \
  --format 'value(state)' 2>/dev/null)" = READY ]; do
  case "$(gcloud compute tpus queued-resources describe "$TPU" --zone "$ZONE" \
    --format 'value(state.state)' 2>/dev/null)" in
  FAILED | SUSPENDED)
    echo "no such TPU was given: see gcloud compute tpus queued-resources" \
      "describe $TPU --zone $ZONE" >&2
    exit 1
    ;;
  esac
  sleep 30
done

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git archive --format tar.gz --output "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU":adaptivejax.tar.gz \
  --zone "$ZONE" --worker all
everywhere "mkdir -p adaptivejax && tar xzf adaptivejax.tar.gz -C adaptivejax &&
  BUCKET=$BUCKET bash adaptivejax/examples/tpu_vm/install.sh"
