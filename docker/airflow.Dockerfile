# syntax=docker/dockerfile:1
# Airflow with the DAGs: scheduler, triggerer, DAG processor and API server. It holds no library of the jobs.
#   docker build -f docker/airflow.Dockerfile --target airflow -t crane-airflow .
# The target `standalone` (docker/compose.yaml) adds Airflow to an image of the jobs, for a machine without Kubernetes:
#   docker build -f docker/airflow.Dockerfile --target standalone --build-arg JOBS_IMAGE=crane-jobs -t crane-standalone .
#checkov:skip=CKV_DOCKER_7:The base image's version is the default of PYTHON_IMAGE.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
ARG JOBS_IMAGE=crane-jobs:0.1.0

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY docker/install.sh docker/install.sh
COPY docker/locks docker/locks
RUN docker/install.sh airflow /opt/airflow-venv

FROM ${JOBS_IMAGE} AS standalone
# Only to make folders and copy; the account of the jobs image takes over below.
# hadolint ignore=DL3066
USER root
RUN install -d -o 10001 -g 10001 /opt/airflow /opt/airflow-logs
COPY --from=build /opt/airflow-venv /opt/airflow-venv
COPY dags /opt/crane-project/dags
COPY jobs /opt/crane-project/jobs
ENV AIRFLOW_HOME=/opt/airflow \
    AIRFLOW__CORE__DAGS_FOLDER=/opt/crane-project/dags \
    AIRFLOW__CORE__LOAD_EXAMPLES=False \
    AIRFLOW_VAR_CRANE_PROJECT=/opt/crane-project \
    AIRFLOW_VAR_CRANE_JOBS_PYTHON=/opt/crane/bin/python \
    PATH=/opt/airflow-venv/bin:$PATH
USER 10001:10001
WORKDIR /opt/airflow
HEALTHCHECK --interval=60s --timeout=60s --start-period=120s CMD ["airflow", "jobs", "check", "--local"]
CMD ["airflow", "version"]

FROM ${PYTHON_IMAGE} AS airflow
# The chart runs Airflow as 50000 in group 0. Unpinned: a rebuild takes the distribution's security updates.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 50000 --gid 0 --no-create-home --home-dir /opt/airflow --shell /usr/sbin/nologin airflow \
    && install -d -o airflow -g 0 -m 0775 /opt/airflow /opt/airflow/logs
COPY --from=build /opt/airflow-venv /opt/airflow-venv
COPY dags /opt/crane-project/dags
ENV AIRFLOW_HOME=/opt/airflow \
    AIRFLOW__CORE__DAGS_FOLDER=/opt/crane-project/dags \
    AIRFLOW__CORE__LOAD_EXAMPLES=False \
    PATH=/opt/airflow-venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 50000:0
WORKDIR /opt/airflow
# Of every component that runs as a job; the API server is asked over HTTP by who starts it.
HEALTHCHECK --interval=60s --timeout=60s --start-period=120s CMD ["airflow", "jobs", "check", "--local"]
ENTRYPOINT ["/usr/bin/tini", "-g", "--"]
CMD ["airflow", "version"]
