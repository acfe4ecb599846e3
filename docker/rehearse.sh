#!/usr/bin/env bash
# Rehearse the images without a container engine: the install steps of the Dockerfiles, from the same locks, as
# an unprivileged user; then a whole retrain of small data, Airflow from one environment and the jobs from the other.
#
#   docker/rehearse.sh [FOLDER]      FOLDER is kept, and goes on after an interruption; a temporary one is removed
#
# It needs Python 3.11 and Java 17, and pip's settings for torch's CPU builds (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL).
# What an engine adds (base image, packages of the distribution, COPY) is not rehearsed.
set -euo pipefail
source="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if [ $# -gt 0 ]; then
    place="$(mkdir -p "$1" && cd "$1" && pwd)"
else
    place="$(mktemp -d)"
    trap 'rm -rf "$place"' EXIT
fi
user=()
if [ "$(id -u)" -eq 0 ]; then
    user=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
fi
# As in an image: an account without a home of its own, a code folder it cannot change, Python of the system.
as_user() {
    "${user[@]}" env --ignore-environment PATH="/usr/local/bin:/usr/bin:/bin" HOME="$place/home" TMPDIR="$place/scratch" \
        JAVA_TOOL_OPTIONS=-Duser.home=/tmp \
        PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1 "${settings[@]}" "$@"
}
settings=()
for name in PIP_FIND_LINKS PIP_EXTRA_INDEX_URL PIP_INDEX_URL PIP_CERT PIP_DEFAULT_TIMEOUT SSL_CERT_FILE HTTPS_PROXY \
    HTTP_PROXY NO_PROXY JAVA_HOME OMP_NUM_THREADS; do
    [ -z "${!name:-}" ] || settings+=("$name=${!name}")
done

# The build context, as .dockerignore lets it through.
rm -rf "$place/src"
mkdir -p "$place/src/docker" "$place/opt" "$place/home" "$place/scratch"
cp -r "$source"/{pyproject.toml,README.md,LICENSE,crane_core,dags,jobs} "$place/src/"
cp -r "$source/docker/"{install.sh,locks} "$place/src/docker/"
find "$place/src" -name __pycache__ -prune -exec rm -rf {} +
chmod -R a+rX "$place"
if [ "${#user[@]}" -gt 0 ]; then
    chown -R nobody:nogroup "$place/src" "$place/opt" "$place/home" "$place/scratch"
fi
for lock in torch-cpu airflow; do
    [ ! -e "$place/opt/$lock/.installed" ] || continue
    started=$SECONDS
    as_user bash "$place/src/docker/install.sh" "$lock" "$place/opt/$lock"
    printf 'rehearse  %s: installed in %d s, %s\n' "$lock" $((SECONDS - started)) "$(du -sh "$place/opt/$lock" | cut -f1)"
    touch "$place/opt/$lock/.installed"
done
jobs="$place/opt/torch-cpu/bin/python" airflow="$place/opt/airflow/bin/airflow"
# As COPY --from leaves it: not the user's to change.
chmod -R a-w "$place/src" "$place/opt"
if [ "${#user[@]}" -gt 0 ]; then
    chown -R root:root "$place/src" "$place/opt"
fi

as_user "$jobs" - "$place/scratch/raw" <<'PYTHON'
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

root, draw = Path(sys.argv[1]), np.random.default_rng(0)
rows = [(f"u{u}", f"i{i}", d) for d in range(1, 29) for u, i in zip(draw.integers(200, size=150), draw.integers(80, size=150))]
for day in range(1, 29):
    folder = root / "interactions" / f"dt=2026-01-{day:02}"
    folder.mkdir(parents=True)
    users, items = zip(*[(u, i) for u, i, d in rows if d == day])
    moment = datetime(2026, 1, day, 12, tzinfo=UTC)
    times = pa.array([moment + timedelta(seconds=n) for n in range(len(users))], pa.timestamp("us", "UTC"))
    pq.write_table(pa.table({"user_id": users, "item_id": items, "event_time": times}), folder / "part.parquet")
folder = root / "features" / "text"
folder.mkdir(parents=True)
vectors = pa.array(list(draw.normal(size=(80, 16)).astype("float32")), pa.list_(pa.float32()))
pq.write_table(pa.table({"item_id": [f"i{n}" for n in range(80)], "vector": vectors}), folder / "part.parquet")
PYTHON
settings+=(
    AIRFLOW_HOME="$place/scratch/airflow"
    AIRFLOW__CORE__DAGS_FOLDER="$place/src/dags"
    AIRFLOW__CORE__LOAD_EXAMPLES=False
    AIRFLOW__USAGE_DATA_COLLECTION__ENABLED=False
    AIRFLOW_VAR_CRANE_PROJECT="$place/scratch"
    AIRFLOW_VAR_CRANE_JOBS_PYTHON="$jobs"
    AIRFLOW_VAR_CRANE_STORE="$place/scratch/store"
)
for profile in local spark kubernetes; do
    as_user env CRANE_PROFILE="$profile" "$place/opt/airflow/bin/python" -c "
import sys; sys.path.insert(0, '$place/src/dags')
import crane_promote, crane_retrain, deployment
print('rehearse  profile', deployment.PROFILE, 'parses:', len(crane_retrain.dag.tasks) + len(crane_promote.dag.tasks), 'tasks')
"
done
log="$place/scratch/airflow.log"
started=$SECONDS
as_user "$airflow" db migrate >"$log" 2>&1
configuration='{"window_end": "2026-01-29T00:00:00Z", "run": "rehearsal", "overrides": ["runtime.raw='$place/scratch/raw'",
  "train.num_epochs=3", "refine.num_steps=20", "etl.validation_days=2", "etl.test_days=2", "knn.min_recall=0"]}'
as_user "$airflow" dags test crane_retrain 2026-01-29 --conf "$configuration" >>"$log" 2>&1 || { tail -n 30 "$log"; exit 1; }
registered="$place/scratch/store/runs/rehearsal/ml.register.json"
[ -s "$registered" ] || { tail -n 30 "$log"; exit 1; }
printf 'rehearse  crane_retrain ran from both environments in %d s: %s\n' $((SECONDS - started)) \
    "$(tr -d '\n ' <"$registered")"
