#!/usr/bin/env bash
# Spark on Kubernetes starts its executors with the single word `executor` and their settings in the environment.
# Everything else is a command.
set -euo pipefail

if [ "${1:-}" != executor ]; then
    exec "$@"
fi
options=()
while IFS= read -r -d '' variable; do
    case $variable in SPARK_JAVA_OPT_*) options+=("${variable#*=}") ;; esac
done < <(env -0 | sort -z -t_ -k4 -n)
exec java "${options[@]}" "-Xms$SPARK_EXECUTOR_MEMORY" "-Xmx$SPARK_EXECUTOR_MEMORY" \
    -cp "${SPARK_CONF_DIR:+$SPARK_CONF_DIR:}$SPARK_HOME/jars/*" \
    org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend \
    --driver-url "$SPARK_DRIVER_URL" \
    --executor-id "$SPARK_EXECUTOR_ID" \
    --cores "$SPARK_EXECUTOR_CORES" \
    --app-id "$SPARK_APPLICATION_ID" \
    --hostname "$SPARK_EXECUTOR_POD_IP" \
    --resourceProfileId "$SPARK_RESOURCE_PROFILE_ID" \
    --podName "$SPARK_EXECUTOR_POD_NAME"
