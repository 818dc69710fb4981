#!/usr/bin/env bash
# Runs a command on a Ray cluster over the nodes of an allocation. Every node runs this script, the head with rank 0:
#
#     deploy/with_ray.sh RANK NUM_NODES HEAD_ADDRESS COMMAND...
#
# The head starts Ray, waits for the other nodes, runs the command and ends with its exit code. Ray ends with it, and the
# other nodes end when the head is gone. Nodes share Ray's token: ~/.ray/auth_token, in a home that all of them have.
#
# RAY_PORT, RAY_TMPDIR   where several allocations share a node (default: 6379, /tmp/ray)
# RAY_START_FLAGS        more flags of `ray start`, such as --num-gpus=1
set -euo pipefail
rank=$1 num_nodes=$2 head=$3
shift 3

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
port=${RAY_PORT:-6379}
export RAY_ADDRESS=$head:$port
wait_s=${RAY_WAIT_S:-900}
read -ra flags <<<"${RAY_START_FLAGS:-}"

[ -s ~/.ray/auth_token ] || [ -n "${RAY_AUTH_TOKEN:-}" ] || {
  echo "with_ray: no token on $(hostname): run 'ray get-auth-token --generate' where all nodes see the home" >&2
  exit 2
}

if [ "$rank" -gt 0 ]; then
  for ((waited = 0; waited < wait_s; waited++)); do
    (: >"/dev/tcp/$head/$port") 2>/dev/null && break
    sleep 1
  done
  # It ends when the head does, which is no failure of this node.
  ray start --address="$RAY_ADDRESS" --block --disable-usage-stats "${flags[@]}" || true
  exit 0
fi

ray start --head --block --port="$port" --node-ip-address="$head" --dashboard-host=127.0.0.1 --disable-usage-stats \
  "${flags[@]}" &
ray=$!
trap 'kill "$ray" 2>/dev/null || true; wait "$ray" || true' EXIT

python - "$num_nodes" "$wait_s" <<'PYTHON'
"""Waits until all nodes of the allocation are there."""
import sys, time
import ray

wanted, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
found = None
while time.monotonic() < end:
    try:
        ray.init(log_to_driver=False, logging_level="ERROR") if not ray.is_initialized() else None
        found = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:
        found = 0
    if found >= wanted:
        sys.exit()
    time.sleep(1)
sys.exit(f"with_ray: {found} of {wanted} nodes came within {sys.argv[2]} s")
PYTHON

"$@"
