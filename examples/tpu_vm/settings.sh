# Which TPU, and where its runs are kept.  Sourced by the other scripts; set any
# of these in the environment instead of here.
export TPU="${TPU:-adaptivejax}"
export ZONE="${ZONE:-us-west4-a}"
export TYPE="${TYPE:-v5litepod-8}" # one VM; v5litepod-32 is a slice of eight
export IMAGE="${IMAGE:-v2-alpha-tpuv5-lite}"
export BUCKET="${BUCKET:-}" # of runs/; a slice and keep_on.sh need one

# Runs a command on every VM of the TPU.
everywhere() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all \
    --command "$1"
}
