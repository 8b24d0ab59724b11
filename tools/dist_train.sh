#!/usr/bin/env bash
# tools/dist_train.sh CONFIG PROCESSES [arguments of train.py]
# Several nodes: the same line on each, with NNODES, NODE_RANK, MASTER_ADDR and, if need be, PORT set.
# MAX_RESTARTS=3 and --resume: where a process is lost, all start again, up to three times, from the last checkpoint.
set -euo pipefail
[ $# -ge 2 ] || { sed -n 2,4p "$0" >&2; exit 2; }

address="${MASTER_ADDR:-127.0.0.1}"
rendezvous=(--node-rank="${NODE_RANK:-0}" --master-addr="$address" --master-port="${PORT:-29500}")
if [ "${MAX_RESTARTS:-0}" -gt 0 ]; then
    # The static rendezvous keeps the addresses of the processes that are gone.
    rendezvous=(--rdzv-backend=c10d --rdzv-endpoint="$address:${PORT:-29500}" --rdzv-id="${PORT:-29500}")
    [ "${NNODES:-1}" -gt 1 ] || rendezvous+=(--local-addr="$address")
fi

python "$(dirname "$0")/_launch.py" \
    --nnodes="${NNODES:-1}" \
    --nproc-per-node="$2" \
    --max-restarts="${MAX_RESTARTS:-0}" \
    "${rendezvous[@]}" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
