#!/usr/bin/env bash
# Trains on all VMs of the TPU, or goes on: train.sh CONFIG.py [--field value ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/tpu_vm/settings.sh

command=$(printf '%q ' adaptivejax train "$@")
everywhere "cd adaptivejax && . .venv/bin/activate && $command"
