"""Add what Spark needs for `s3a://` to the pyspark package: hadoop-aws of Spark's own Hadoop version, and the AWS SDK.

python docker/jars.py MAVEN_REPOSITORY HADOOP_AWS_SHA256 AWS_BUNDLE_VERSION AWS_BUNDLE_SHA256
"""

import hashlib
import importlib.util
import sys
import urllib.request
from pathlib import Path


def hadoop_version(jars: Path) -> str:
    """Of the Hadoop client among Spark's jars."""
    (client,) = jars.glob("hadoop-client-api-*.jar")
    return client.stem.removeprefix("hadoop-client-api-")


def add(repository: str, path: str, sha256: str, jars: Path) -> Path:
    """Download one jar of a Maven repository into `jars`; nothing is left there when its checksum differs."""
    target = jars / path.rpartition("/")[2]
    with urllib.request.urlopen(f"{repository.rstrip('/')}/{path}", timeout=600) as response:
        data = response.read()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256.lower():
        raise SystemExit(f"{path} has the sha256 {found}, expected {sha256 or 'none was given'}.")
    target.write_bytes(data)
    return target


def main(repository: str, hadoop_sha256: str, bundle: str, bundle_sha256: str) -> None:
    spec = importlib.util.find_spec("pyspark")
    assert spec is not None and spec.origin is not None
    jars = Path(spec.origin).parent / "jars"
    hadoop = hadoop_version(jars)
    add(repository, f"org/apache/hadoop/hadoop-aws/{hadoop}/hadoop-aws-{hadoop}.jar", hadoop_sha256, jars)
    add(repository, f"software/amazon/awssdk/bundle/{bundle}/bundle-{bundle}.jar", bundle_sha256, jars)


if __name__ == "__main__":
    main(*sys.argv[1:])
