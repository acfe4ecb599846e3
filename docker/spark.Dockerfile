# syntax=docker/dockerfile:1
# The Spark jobs: driver, executors, standalone master and worker. Spark is the one of the pyspark package.
#   docker build -f docker/spark.Dockerfile -t crane-spark \
#     --build-arg MAVEN_REPOSITORY=https://HOST/PATH \
#     --build-arg HADOOP_AWS_SHA256=... \
#     --build-arg AWS_BUNDLE_VERSION=... --build-arg AWS_BUNDLE_SHA256=... .
# hadoop-aws is taken of the Hadoop version that this Spark ships, the AWS bundle of the version that its POM names; a
# jar whose sha256 is not the one given fails the build. LOCK=torch-cpu makes an image that runs every job.
#checkov:skip=CKV_DOCKER_7:The base image's version is the default of PYTHON_IMAGE.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG LOCK=spark
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY docker/install.sh docker/install.sh
COPY docker/locks docker/locks
COPY crane_core crane_core
COPY jobs jobs
RUN docker/install.sh "${LOCK}" /opt/crane

FROM build AS jars
ARG MAVEN_REPOSITORY
ARG HADOOP_AWS_SHA256
ARG AWS_BUNDLE_VERSION
ARG AWS_BUNDLE_SHA256
COPY docker/jars.py docker/jars.py
RUN /opt/crane/bin/python docker/jars.py \
      "${MAVEN_REPOSITORY}" "${HADOOP_AWS_SHA256}" "${AWS_BUNDLE_VERSION}" "${AWS_BUNDLE_SHA256}"

FROM ${PYTHON_IMAGE}
# Unpinned: a rebuild takes the security updates of the distribution's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openjdk-17-jre-headless tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin crane \
    && install -d -o crane -g crane /scratch /opt/spark/work-dir
COPY --from=jars /opt/crane /opt/crane
COPY docker/spark-entrypoint.sh /opt/entrypoint.sh
ENV SPARK_HOME=/opt/crane/lib/python3.11/site-packages/pyspark \
    PATH=/opt/crane/bin:$PATH \
    HOME=/tmp \
    JAVA_TOOL_OPTIONS=-Duser.home=/tmp \
    PYSPARK_PYTHON=/opt/crane/bin/python \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /opt/spark/work-dir
HEALTHCHECK --interval=60s --timeout=30s --start-period=30s CMD ["python", "-c", "import pyspark, jobs, crane_core"]
ENTRYPOINT ["/usr/bin/tini", "-g", "--", "/opt/entrypoint.sh"]
CMD ["crane", "--help"]
