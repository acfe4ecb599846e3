"""The kubernetes profile: the DAGs render the very manifests of infra/kubernetes, and run them over the API."""

import asyncio
import json
import re
from types import SimpleNamespace

import deployment
import kubernetes_job
import pytest
import yaml
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from cluster import Cluster, applied
from conftest import BAD_ROW, DAGS, PROJECT
from job_output import FinalJobError
from kubernetes_job import PodJobOperator, TrainJobOperator


@pytest.fixture
def cluster(play, tmp_path, monkeypatch):
    made = Cluster(play.folder)
    extra = {"kube_config_path": str(made.kubeconfig(tmp_path / "kubeconfig"))}
    connection = {"conn_type": "kubernetes", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_KUBERNETES_DEFAULT", json.dumps(connection))
    monkeypatch.setattr(kubernetes_job, "POLL_SECONDS", 0.1)
    yield made
    made.close()


def task(name, **options):
    operator, arguments = deployment._kubernetes(name, deployment.JOBS[name].engine)
    made = operator(task_id=name.rpartition(".")[2], **arguments, **({"flags": "[]"} | options))
    if isinstance(made, PodJobOperator):
        made.startup_check_interval_seconds = made.base_container_status_polling_interval = 0.1
    return made


def context(run="r1", try_number=1):
    instance = SimpleNamespace(
        dag_id="crane_retrain", task_id="t", run_id=run, map_index=-1, try_number=try_number, xcom_push=lambda **_: None
    )
    return {"ti": instance, "run_id": run, "dag": SimpleNamespace(parent_dag=None)}


def pod_spec(name):
    """The pod that the manifests prescribe for a job, and the name of its container."""
    engine = deployment.JOBS[name].engine
    if engine != "torchrun":
        return applied("PodTemplate")[f"crane-{engine}"]["template"]
    runtime = applied("TrainingRuntime")["crane-torchrun"]["spec"]
    return runtime["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]


def without_empty(value):
    if isinstance(value, dict):
        return {key: kept for key, each in value.items() if (kept := without_empty(each)) not in (None, {}, [])}
    return [without_empty(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["plan", "etl.interactions", "ml.refine", "ml.train"])
def test_every_engine_becomes_the_pod_of_the_manifests(cluster, name):
    flags = ["--store", "s3://bucket/a prefix", "--run", "r1", "--config", "/etc/crane/crane.yaml"]
    task(name, flags=json.dumps(flags)).execute(context())
    pods = {pod["metadata"]["name"]: pod for pod in cluster.created}
    assert len(pods) == 1
    (pod,) = pods.values()
    expected = json.loads(json.dumps(pod_spec(name)["spec"]))
    container = expected["containers"][0]
    container |= {"command": ["python"], "args": ["-m", f"jobs.{name}", *flags]}
    found = pod["spec"]
    # What the operator adds by itself: the default, and explicitly no host network.
    assert found["containers"][0].pop("terminationMessagePolicy", "File") == "File"
    assert found.pop("hostNetwork", False) is False
    assert without_empty(found) == without_empty(expected)
    assert pod_spec(name)["metadata"]["labels"].items() <= pod["metadata"]["labels"].items()
    assert cluster.deleted


def test_pods_meet_the_restricted_standard_and_hold_no_secret():
    templates = [pod_spec(name) for name in deployment.JOBS]
    executor = yaml.safe_load((PROJECT / "infra/kubernetes/base/executor.yaml").read_text())
    for template in [*templates, executor]:
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is (spec["serviceAccountName"] == "crane-spark")
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            for variable in container.get("env", []):
                assert "SECRET" not in variable["name"] or "valueFrom" in variable


def test_names_in_pods_exist_in_the_manifests():
    """Accounts, claims, maps, secrets and priorities that pods name are applied with them."""
    kustomization = yaml.safe_load((PROJECT / "infra/kubernetes/base/kustomization.yaml").read_text())
    maps = {each["name"] for each in kustomization["configMapGenerator"]}
    overlay = PROJECT / "infra/kubernetes/overlays/small/object-store.yaml"
    secrets = set(applied("ExternalSecret")) | {yaml.safe_load(overlay.read_text())["metadata"]["name"]}
    executor = yaml.safe_load((PROJECT / "infra/kubernetes/base/executor.yaml").read_text())
    pods = [pod_spec(name)["spec"] for name in deployment.JOBS]
    pods += [executor["spec"], applied("Deployment")["crane-mlflow"]["spec"]["template"]["spec"]]
    for spec in pods:
        assert spec["serviceAccountName"] in applied("ServiceAccount")
        assert spec.get("priorityClassName", "crane-job") in applied("PriorityClass")
        for volume in spec["volumes"]:
            assert volume.get("configMap", {"name": "crane-config"})["name"] in maps
            assert volume.get("persistentVolumeClaim", {"claimName": "crane-scratch"})["claimName"] in applied(
                "PersistentVolumeClaim"
            )
        for container in spec["containers"]:
            for source in container["envFrom"]:
                assert source.get("configMapRef", {"name": "crane-environment"})["name"] in maps
                assert source.get("secretRef", {"name": "crane-object-store"})["name"] in secrets
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                assert reference is None or reference["name"] in secrets


def test_airflow_may_do_what_its_operators_do_and_read_no_secret():
    role = applied("Role")["crane-airflow"]
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    needed = {("pods", verb) for verb in ("create", "get", "list", "watch", "patch", "delete")}
    needed |= {("podtemplates", "get"), ("pods/log", "get"), ("events", "list")}
    needed |= {("trainjobs", verb) for verb in ("create", "get", "delete")}
    assert needed <= allowed
    assert not {resource for resource, _ in allowed} & {"secrets", "pods/exec", "*"}
    named = next(rule["resourceNames"] for rule in role["rules"] if rule["resources"] == ["podtemplates"])
    assert set(named) == set(applied("PodTemplate"))
    engines = {job.engine for job in deployment.JOBS.values()}
    assert {f"crane-{engine}" for engine in engines - {"torchrun"}} == set(named)


def test_the_accounts_of_airflow_are_those_of_the_chart():
    values = yaml.safe_load((PROJECT / "infra/airflow/values.yaml").read_text())
    (binding,) = [each for name, each in applied("RoleBinding").items() if name == "crane-airflow"]
    for subject in binding["subjects"]:
        component = subject["name"].removeprefix("airflow-")
        assert values[component]["serviceAccount"]["name"] == subject["name"]
    assert applied("Namespace").keys() == {kubernetes_job.NAMESPACE}


def test_the_chart_agrees_with_the_image_and_the_manifests():
    values = yaml.safe_load((PROJECT / "infra/airflow/values.yaml").read_text())
    environment = {each["name"]: each["value"] for each in values["env"]}
    configurations = [PROJECT / "infra/kubernetes/base/crane.yaml"]
    configurations += (PROJECT / "infra/kubernetes/overlays").glob("*/crane.yaml")
    registries = {yaml.safe_load(path.read_text())["runtime"]["registry"] for path in configurations}
    assert registries == {environment["AIRFLOW_VAR_CRANE_REGISTRY"]}
    (registry,) = registries
    service = applied("Service")["crane-mlflow"]
    assert registry == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    mounted = {mount["mountPath"] for mount in pod_spec("plan")["spec"]["containers"][0]["volumeMounts"]}
    assert environment["AIRFLOW_VAR_CRANE_CONFIG"].rpartition("/")[0] in mounted
    # The image is not the official one: it has neither its /entrypoint nor its /clean-logs.
    for component in ("scheduler", "triggerer", "dagProcessor"):
        assert values[component]["livenessProbe"]["command"][0] == "airflow"
        assert values[component]["logGroomerSidecar"]["enabled"] is False
    dockerfile = (PROJECT / "docker/airflow.Dockerfile").read_text()
    assert "/entrypoint" not in dockerfile and "AIRFLOW_HOME=/opt/airflow " in dockerfile
    assert values["securityContexts"]["containers"]["readOnlyRootFilesystem"] is True
    assert {mount["mountPath"] for mount in values["volumeMounts"]} == {"/opt/airflow", "/tmp"}
    # What starts a pod may do so in the namespace of the jobs alone.
    assert values["allowPodLaunching"] is False


def test_the_dags_name_only_templates_that_exist(monkeypatch):
    monkeypatch.setattr(deployment, "PROFILE", "kubernetes")
    bag = DagBag(dag_folder=str(DAGS))
    assert bag.import_errors == {}
    templates, runtimes = set(), set()
    for dag in bag.dags.values():
        for each in dag.tasks:
            options = each.partial_kwargs if isinstance(each, MappedOperator) else vars(each)
            templates |= {options["template"]} if "template" in options else set()
            runtimes |= {options["runtime"]} if "runtime" in options else set()
    assert templates == set(applied("PodTemplate"))
    assert runtimes == set(applied("TrainingRuntime"))


def test_a_pod_returns_what_its_job_printed(cluster, play):
    play.act({"ml.promote": {"lines": ["{not json", '{"a": 1}'], "answer": {"decision": "promoted", "n": {"a": 1}}}})
    assert task("plan", returns="ml.knn").execute(context()) == ["0", "1", "2"]
    assert task("ml.promote").execute(context()) == {"stage": "ml.promote", "decision": "promoted"}
    task("ml.knn", part="2").execute(context())
    assert play.calls()[-1]["argv"] == ["--part", "2"]


def test_a_task_waits_for_its_pod_in_the_triggerer(cluster):
    """Deferral is what the chart's `operators.default_deferrable` asks for: the provider's trigger watches the pod."""
    operator = task("plan", returns="ml.knn", deferrable=True)
    with pytest.raises(TaskDeferred) as deferred:
        operator.execute(context())
    assert cluster.deleted == []

    async def fire():
        return await anext(deferred.value.trigger.run())

    event = asyncio.run(fire())
    assert event.payload["status"] == "success"
    resumed = task("plan", returns="ml.knn", deferrable=True)
    assert getattr(resumed, deferred.value.method_name)(context(), event.payload) == ["0", "1", "2"]
    assert cluster.deleted == [event.payload["name"]]


@pytest.mark.parametrize(("name", "code"), [("etl.features", 2), ("ml.train", 3), ("ml.refine", 4)])
def test_errors_of_the_user_are_final(cluster, play, name, code):
    play.act({name: {"code": code, "error": BAD_ROW}})
    with pytest.raises(FinalJobError, match=rf"jobs\.{name} .* error: DataError: .*bad row\. Remedy: Deliver"):
        task(name).execute(context())
    assert cluster.deleted


@pytest.mark.parametrize("name", ["etl.features", "ml.train"])
def test_other_errors_are_retried(cluster, play, name):
    play.act({name: {"code": 137}})
    with pytest.raises(AirflowException, match="exit code 137: the last line is 'shutting down'") as caught:
        task(name).execute(context())
    assert not isinstance(caught.value, FinalJobError)
    play.act({})
    assert task(name).execute(context()) == {"stage": name}


def test_a_missing_template_says_what_to_apply(cluster):
    del cluster.templates["crane-gpu"]
    with pytest.raises(AirflowFailException, match="no PodTemplate 'crane-gpu': apply an overlay of infra/kubernetes"):
        task("ml.refine").execute(context())


def test_a_training_runs_on_every_node_and_returns_the_first_ones_result(cluster, play):
    cluster.runtimes["crane-torchrun"]["spec"]["mlPolicy"]["numNodes"] = 3
    operator = task("ml.train", flags='["--run", "r1"]')
    assert operator.execute(context()) == {"stage": "ml.train"}
    assert len(play.calls()) == 3
    assert all({"PET_NNODES", "PET_NODE_RANK"} <= set(call["environment"]) for call in play.calls())
    assert cluster.deleted == [operator.train_job]


SLOW = """
import time
for number in range(12):
    print(f"epoch {number}" + chr(10) + f"loss {number}", flush=True)
    time.sleep(0.4)
"""


def test_a_log_is_read_on_from_where_the_last_read_ended(cluster, play, monkeypatch, capsys):
    """Every line is shown once, and the first ones are not sent again and again."""
    monkeypatch.setattr(kubernetes_job, "OVERLAP_SECONDS", 0.5)
    play.act({"ml.train": {"child": SLOW}})
    assert task("ml.train").execute(context()) == {"stage": "ml.train"}
    told = capsys.readouterr()
    shown = re.findall(r"\b((?:epoch|loss) \d+)\b", told.out + told.err)
    assert shown == [line for number in range(12) for line in (f"epoch {number}", f"loss {number}")]
    assert len(cluster.num_sent) > 20 and max(cluster.num_sent) < 20


@pytest.mark.parametrize("name", ["ml.graph", "ml.train"])
def test_lineage_names_what_was_read_and_made(cluster, play, name):
    play.act({name: {"answer": {"fingerprint": "f3", "inputs": {"ml.refine": "f1"}, "content": "c"}}})
    made = task(name, flags='["--store", "s3://bucket/a"]')
    made.execute(context())
    told = made.get_openlineage_facets_on_complete(None)
    named = [[(each.namespace, each.name) for each in datasets] for datasets in (told.inputs, told.outputs)]
    assert named == [[("s3://bucket/a", "ml.refine/f1")], [("s3://bucket/a", f"{name}/f3")]]


def test_a_second_worker_finds_the_training_that_runs(cluster, play):
    first = task("ml.train")
    name = f"crane-ml-train-{kubernetes_job.hashlib.sha256(b'crane_retrain/r1/t').hexdigest()[:10]}"
    cluster.start_train_job(first.manifest(name))
    assert task("ml.train").execute(context()) == {"stage": "ml.train"}
    assert len(play.calls()) == 1
    task("ml.train").execute(context("r2"))
    assert len(play.calls()) == 2


def test_a_retry_joins_the_pod_that_still_runs(cluster, play):
    """The worker of the first try is gone, its pod is not."""
    play.act({"etl.features": {"child": "import time; time.sleep(3)"}})
    first = task("etl.features")
    pod = first.build_pod_request_obj(context())
    cluster.start_pod(first.client.api_client.sanitize_for_serialization(pod))
    assert task("etl.features").execute(context(try_number=2)) == {"stage": "etl.features"}
    assert len(play.calls()) == len(cluster.created) == 1


def test_a_killed_training_is_deleted(cluster):
    operator = task("ml.train")
    operator.on_kill()
    assert cluster.deleted == []
    operator.train_job = "crane-ml-train-x"
    operator.on_kill()
    assert cluster.deleted == ["crane-ml-train-x"]


def test_the_manifest_of_a_training():
    operator = TrainJobOperator(task_id="t", job="ml.train", runtime="crane-torchrun", flags='["--run", "r"]')
    assert operator.manifest("n") == {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": "n", "namespace": "crane"},
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "crane-torchrun"},
            "trainer": {"command": ["python"], "args": ["-m", "jobs.ml.train", "--run", "r"]},
        },
    }
