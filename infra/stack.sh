#!/usr/bin/env bash
# One machine's stack: a Ray head, an MLflow server on SQLite, and an S3 that you bring.
#
#   AWS_ENDPOINT_URL=… AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… infra/stack.sh up      until Ctrl-C
#   (the same) infra/stack.sh test                                 ingest → train → promote through it, then down
#
# Ports, each on 127.0.0.1: RAY_PORT 6390, RAY_DASHBOARD_PORT 8275, MLFLOW_PORT 5075. The bucket is STACK_BUCKET.
set -euo pipefail
cd "$(dirname "$0")/.."

for name in AWS_ENDPOINT_URL AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY; do
    [[ -n "${!name:-}" ]] || { echo "$name is not set; start an S3 server and say where it is" >&2; exit 2; }
done
RAY_PORT=${RAY_PORT:-6390} RAY_DASHBOARD_PORT=${RAY_DASHBOARD_PORT:-8275} MLFLOW_PORT=${MLFLOW_PORT:-5075}
BUCKET=${STACK_BUCKET:-instantbooth-stack-$(date +%s)}
FOLDER=$(mktemp -d)
TRACKING=http://127.0.0.1:$MLFLOW_PORT
PIDS=()

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 DIFFUSERS_DISABLE_REMOTE_CODE=1 OMP_NUM_THREADS=1
# A job's working directory comes without its repository.
export CODE_REVISION=${CODE_REVISION:-$(git describe --always --dirty 2>/dev/null || true)}
# Many self-hosted S3 servers refuse the checksums that clients send by default.
export AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_DEFAULT_REGION=${AWS_DEFAULT_REGION:-us-east-1}

down() {
    local pid
    for pid in "${PIDS[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
    sleep 3
    for pid in "${PIDS[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
    rm -rf "$FOLDER"
}
trap down EXIT

# Runs a server in a process group of its own, so that all of it can be ended.
serve() {
    local log=$1
    shift
    setsid "$@" >"$FOLDER/$log.log" 2>&1 &
    PIDS+=($!)
}

wait_for() {
    local url=$1
    for _ in $(seq 120); do
        curl --silent --output /dev/null "$url" && return
        sleep 1
    done
    echo "nothing answers at $url" >&2
    tail -n 20 "$FOLDER"/*.log >&2
    exit 1
}

up() {
    # The token is there before the cluster: whoever has it may run code.
    ray get-auth-token --generate >/dev/null
    chmod 600 ~/.ray/auth_token
    python -c 'import sys, boto3; boto3.client("s3").create_bucket(Bucket=sys.argv[1])' "$BUCKET"
    serve mlflow mlflow server --host 127.0.0.1 --port "$MLFLOW_PORT" --workers 1 \
        --backend-store-uri "sqlite:///$FOLDER/mlflow.db" --artifacts-destination "s3://$BUCKET/mlflow"
    serve ray ray start --head --block --node-ip-address 127.0.0.1 --port "$RAY_PORT" \
        --dashboard-host 127.0.0.1 --dashboard-port "$RAY_DASHBOARD_PORT" --num-cpus 4 --object-store-memory 536870912
    wait_for "$TRACKING/health"
    wait_for "http://127.0.0.1:$RAY_DASHBOARD_PORT/api/version"
}

job() {
    local environment
    environment=$(python - <<'PYTHON'
import json, os
names = [name for name in os.environ if name.startswith("AWS_")]
names += ["CODE_REVISION", "OMP_NUM_THREADS", "DIFFUSERS_DISABLE_REMOTE_CODE"]
print(json.dumps({"env_vars": {"PYTHONPATH": "platform"} | {name: os.environ[name] for name in names}}))
PYTHON
    )
    for _ in $(seq 30); do
        # A head that has just started has no agent for jobs yet.
        ray job submit --address "http://127.0.0.1:$RAY_DASHBOARD_PORT" --working-dir . \
            --runtime-env-json "$environment" -- python -m "$@" 2>&1 | tee "$FOLDER/job.log" && return
        grep -q "No available agent" "$FOLDER/job.log" || return 1
        sleep 2
    done
    return 1
}

pairs() {
    PYTHONPATH=platform python - "$BUCKET" <<'PYTHON'
import sys
from instantbooth.miniature.samples import write_pairs
from instantbooth.storage import open_store
list(write_pairs(open_store(f"s3://{sys.argv[1]}"), "pairs", 96))
PYTHON
}

case "${1:-up}" in
    up)
        up
        echo "Ray http://127.0.0.1:$RAY_DASHBOARD_PORT   MLflow $TRACKING   s3://$BUCKET   (Ctrl-C ends it)"
        wait
        ;;
    test)
        up
        pairs
        job jobs.ingest --source "s3://$BUCKET/pairs" --output "s3://$BUCKET/curated" --base miniature \
            --validation 0.1
        job jobs.train miniature --data "s3://$BUCKET/curated" --output "s3://$BUCKET/run" \
            --model.tracking-uri "$TRACKING" --adapters.steps 6 --adapters.batch-size 8 --checkpoint-every 3 \
            --validation.every 6 --validation.pairs 4 --validation.pictures 1 --validation.identities 1
        job jobs.promote --tracking-uri "$TRACKING" --identities 2
        MLFLOW_TRACKING_URI=$TRACKING PYTHONPATH=platform python -c \
            'from instantbooth import Personalizer; Personalizer.from_pretrained("models:/instantbooth@champion")'
        echo "ingest → train → promote went through Ray jobs, S3 and MLflow; the champion loads by its name"
        ;;
    *)
        echo "infra/stack.sh up | test" >&2
        exit 2
        ;;
esac
