#!/usr/bin/env bash
# Runs on each VM: a Python that is new enough, this library, and runs/.
set -euo pipefail
cd "$(dirname "$0")/../.."

command -v uv >/dev/null || python3 -m pip install --user uv
PATH="$HOME/.local/bin:$PATH"
uv venv --python 3.11 .venv
uv pip install --python .venv -c constraints.txt -e '.[tpu,data]'

if [ -n "${BUCKET:-}" ]; then # runs/ is that of all VMs
  if ! command -v gcsfuse >/dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    repository="gcsfuse-$(lsb_release -cs)"
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee $key >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt $repository main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get update && sudo apt-get install -y gcsfuse
  fi
  mkdir -p runs
  # Each VM must see at once what another wrote: no cache of what is there.
  mountpoint -q runs ||
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 "$BUCKET" runs
fi
