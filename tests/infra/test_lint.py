"""Every tool of `make lint-infra` finds a planted fault. Run by `make test-infra`, in the tools' own environment."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PARTS = ("infra", "docker", ".ci", "crane_core/presets", "tests/bench/gpu.sh", ".yamllint.yaml", "pyproject.toml")


@pytest.fixture
def copy(tmp_path):
    for part in PARTS:
        source, target = PROJECT / part, tmp_path / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    return tmp_path


def lint(copy, *steps):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [copy / "infra" / "lint.sh", *steps],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )


def plant(copy, file, pattern, replacement):
    path = copy / file
    text, count = re.subn(pattern, replacement, path.read_text(), count=1)
    assert count == 1, f"{pattern} is not in {file}"
    path.write_text(text)


FAULTS = [
    (
        "shell",
        "docker/install.sh",
        r'"\$folder/bin/python" -m compileall',
        "$folder/bin/python -m compileall",
        "SC2086",
    ),
    ("yaml", "infra/kubernetes/base/pods.yaml", "kind: PodTemplate", "kind:  PodTemplate", "too many spaces"),
    ("yaml", "docker/compose.yaml", "restart: unless-stopped", "restart: no\n  restart: always", "duplication of key"),
    ("docker", "docker/torch.Dockerfile", "USER 10001:10001", "RUN sudo true", "DL3004"),
    ("docker", "docker/spark.Dockerfile", "WORKDIR /src", "WORKDIR src", "DL3000"),
    ("compose", "docker/compose.yaml", "restart: unless-stopped", "restrat: unless-stopped", "restrat"),
    ("compose", "docker/compose.yaml", "condition: service_healthy", "condition: service_well", "service_well"),
    ("compose", "docker/compose.yaml", "- objects:/data", "- objcts:/data", "mounts objcts"),
    ("compose", "docker/compose.yaml", "spark-master: {", "spark-mastr: {", "waits for spark-mastr"),
    ("compose", "docker/compose.yaml", r"\./compose\.crane", "./compose.krane", "mounts ./compose.krane.yaml"),
    ("compose", "docker/compose.env.example", "CRANE_JWT_SECRET=", "", "CRANE_JWT_SECRET is not in"),
    (
        "kubernetes",
        "infra/kubernetes/base/training.yaml",
        "onJobFailureReasons",
        "onJobFailure",
        "rules[0].onJobFailure",
    ),
    ("kubernetes", "infra/kubernetes/base/training.yaml", "numNodes: 1", "numNodes: one", "numNodes"),
    ("kubernetes", "infra/kubernetes/base/pods.yaml", "runAsNonRoot: true", "runAsNonRoot: 'yes'", "runAsNonRoot"),
    ("kubernetes", "infra/kubernetes/base/pods.yaml", "serviceAccountName:", "serviceAcount:", "serviceAcount"),
    ("kubernetes", "infra/kubernetes/base/secrets.yaml", "kind: ExternalSecret", "kind: Sekret", "Sekret"),
    ("kubernetes", "infra/kubernetes/overlays/large/gpu.yaml", "containers/0", "containers/7", "missing path"),
    ("terraform", "infra/terraform/bucket.tf", r"bucket = var.bucket\n}", "bucket = var.bucket\n", "bucket.tf"),
    ("terraform", "infra/terraform/iam.tf", r"aws_kms_key\.crane\.arn", "aws_kms_key.other.arn", "aws_kms_key.other"),
    (
        "policy",
        "infra/terraform/database.tf",
        r"publicly_accessible\s+= false",
        "publicly_accessible = true",
        "CKV_AWS_17",
    ),
    ("policy", "infra/kubernetes/base/mlflow.yaml", "readOnlyRootFilesystem: true", "privileged: true", "CKV_K8S_16"),
    ("policy", "docker/torch.Dockerfile", r"HEALTHCHECK .*", "", "CKV_DOCKER_2"),
]


@pytest.mark.parametrize(
    ("step", "file", "pattern", "replacement", "finding"), FAULTS, ids=[f"{each[0]}-{each[4]}" for each in FAULTS]
)
def test_a_planted_fault_is_found(copy, step, file, pattern, replacement, finding):
    plant(copy, file, pattern, replacement)
    ended = lint(copy, step)
    assert ended.returncode != 0
    assert finding in ended.stdout + ended.stderr
    assert f"{step}: failed" in ended.stderr


def test_what_is_here_is_clean(copy):
    ended = lint(copy)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr.count(": clean") == 7


def test_every_suppression_says_why():
    """A suppression is a line with a reason; there is no list of ignored rules anywhere."""
    found = 0
    for path in [*(PROJECT / "infra").rglob("*"), *(PROJECT / "docker").rglob("*")]:
        if not path.is_file() or path.suffix not in {".tf", ".yaml", ".sh", ".Dockerfile"}:
            continue
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if match := re.search(r"checkov:skip=\w+(.*)|checkov\.io/skip\d+: \w+(.*)", line):
                reason = (match.group(1) or match.group(2))[1:]
                assert len(reason) > 15, f"{path}:{number + 1}"
                found += 1
            if re.search(r"(hadolint|shellcheck) .*(ignore|disable)=|yamllint disable", line):
                assert lines[number - 1].startswith("#") and len(lines[number - 1]) > 30, f"{path}:{number + 1}"
                found += 1
    assert found > 10


def test_rendered_overlays_agree(copy):
    """One image per kind of pod in each overlay, executors run the driver's, and no placeholder name is left."""
    yaml = pytest.importorskip("yaml")
    assert lint(copy, "kubernetes").returncode == 0
    for file in (copy / "build" / "infra").glob("*.yaml"):
        documents = list(yaml.safe_load_all(file.read_text()))
        pods = {
            each["metadata"]["name"]: each["template"]["spec"] for each in documents if each["kind"] == "PodTemplate"
        }
        (runtime,) = [each for each in documents if each["kind"] == "TrainingRuntime"]
        training = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        images = {name: spec["containers"][0]["image"] for name, spec in pods.items()}
        assert all("/" in image and ":" in image for image in images.values())
        driver = pods["crane-spark"]["containers"][0]
        environment = {each["name"]: each.get("value") for each in driver["env"]}
        assert environment["CRANE_SPARK_IMAGE"] == driver["image"]
        assert training["containers"][0]["image"] == images["crane-gpu"]
        gpus = training["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        maps = {each["metadata"]["name"]: each["data"] for each in documents if each["kind"] == "ConfigMap"}
        runtime_section = yaml.safe_load(maps["crane-config"]["crane.yaml"])["runtime"]
        assert runtime_section["device"] == ("cuda" if gpus else "cpu")
        assert runtime_section.get("world_size", 1) == int(gpus or 1)
        quota = next(each for each in documents if each["kind"] == "ResourceQuota")["spec"]["hard"]
        needed = int(gpus or 0) * runtime["spec"]["mlPolicy"]["numNodes"] + (1 if gpus else 0)
        assert int(quota["requests.nvidia.com/gpu"]) >= needed
        if file.stem == "large":
            roles = {
                each["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].rpartition("/")[2]
                for each in documents
                if each["kind"] == "ServiceAccount"
            }
            terraform = (copy / "infra" / "terraform" / "iam.tf").read_text()
            assert all(f"    {role} = {{" in terraform for role in roles)
            accounts = [each["metadata"]["name"] for each in documents if each["kind"] == "ServiceAccount"]
            assert all(f'"crane:{name}"' in terraform for name in accounts)
            values = yaml.safe_load((copy / "infra" / "airflow" / "values.yaml").read_text())
            for each in values.values():
                account = each.get("serviceAccount") if isinstance(each, dict) else None
                if account is None:
                    continue
                role = account.get("annotations", {}).get("eks.amazonaws.com/role-arn", "").rpartition("/")[2]
                assert (f'"airflow:{account["name"]}"' in terraform) == (role == "crane-airflow")
            repositories = (copy / "infra" / "terraform" / "registry.tf").read_text()
            for image in (*images.values(), values["images"]["airflow"]["repository"] + ":"):
                assert f'"{image.partition("/")[2].rpartition(":")[0]}"' in repositories
