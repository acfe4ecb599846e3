"""The operators of the `kubernetes` profile: they run a job as a pod and a training as a TrainJob on one or more nodes.

Only infra/kubernetes says what a pod looks like (image, account, secrets, limits, nodes). It has one PodTemplate per
engine and one TrainingRuntime. The operators fetch the template when a task starts and add the command.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from job_output import failure, last_object, returned
from kubernetes.client import V1Pod
from kubernetes.client.exceptions import ApiException
from local_job import command, lineage_event
from other_runs import wait_for_turn

NAMESPACE = "crane"
TRAINER = {"group": "trainer.kubeflow.org", "version": "v1alpha1", "plural": "trainjobs"}
TAIL_LINES = 500
POLL_SECONDS = 15.0
OVERLAP_SECONDS = 30.0
"""More than an answer of the API takes, and than clocks of nodes are changed by at a time."""


class PodJobOperator(KubernetesPodOperator):
    """Run `python -m jobs.<job> <flags>` in a pod and return the plain values of the job's result.

    Where Airflow's setting `operators.default_deferrable` is on, the task waits in the triggerer.

    Args:
        job: `<group>.<stage>`.
        template: name of the PodTemplate in the namespace.
        flags: JSON list of the flags, a template.
        part: part of a mapped stage, None for a whole stage.
        returns: name of the one value of the job's JSON object to return instead, of any type.

    Raises:
        FinalJobError: exit code 2, 3 or 4, with which Airflow does not try again.
        AirflowFailException: no such template.
        AirflowException: any other failure.
    """

    BASE_CONTAINER_NAME = "job"
    template_fields = (*KubernetesPodOperator.template_fields, "flags", "part")

    def __init__(
        self,
        *,
        job: str,
        template: str,
        flags: str,
        part: str | None = None,
        returns: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            namespace=NAMESPACE,
            name=_name(job),
            # A GPU node may have to be started first.
            schedule_timeout_seconds=1800,
            startup_timeout_seconds=1800,
            log_pod_spec_on_failure=False,
            log_events_on_failure=True,
            container_name_log_prefix_enabled=False,
            **kwargs,
        )
        self.job = job
        self.template = template
        self.flags = flags
        self.part = part
        self.returns = returns
        self.result: dict[str, Any] = {}
        self._lines: list[str] = []

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        return lineage_event(self.flags, self.result)

    def build_pod_request_obj(self, context: Context | None = None, *, dry_run: bool = False) -> V1Pod:
        try:
            template = self.client.read_namespaced_pod_template(self.template, NAMESPACE).template
        except ApiException as error:
            if error.status != 404:
                raise
            raise AirflowFailException(
                f"Namespace {NAMESPACE} has no PodTemplate {self.template!r}: apply an overlay of infra/kubernetes."
            ) from error
        self.full_pod_spec = V1Pod(metadata=template.metadata, spec=template.spec)
        self.cmds = ["python"]
        self.arguments = command(self.job, self.flags, self.part)
        return super().build_pod_request_obj(context, dry_run=dry_run)

    def execute(self, context: Context) -> Any:
        wait_for_turn(context)
        super().execute(context)
        return self._returned()

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> Any:
        super().trigger_reentry(context, event)
        return self._returned()

    def cleanup(
        self, pod: V1Pod, remote_pod: V1Pod, xcom_result: dict | None = None, context: Context | None = None
    ) -> None:
        # `super().cleanup` deletes the pod, and its log with it.
        code = _exit_code(remote_pod, self.base_container_name) if remote_pod and not self._killed else None
        if code is not None:
            self._lines = _log(self.client, remote_pod.metadata.name, self.base_container_name, tail_lines=TAIL_LINES)
        try:
            super().cleanup(pod, remote_pod, xcom_result, context)
        except AirflowException as error:
            if code:
                raise failure(self.job, code, self._lines) from error
            raise

    def _returned(self) -> Any:
        self.result = _result(self.job, self._lines)
        return returned(self.result, self.returns)


class TrainJobOperator(BaseOperator):
    """Run `python -m jobs.<job> <flags>` on every node of a TrainJob (Kubeflow Trainer) and return node 0's result.

    The name of the TrainJob follows from the task instance, so a worker that takes over finds the running training.
    The task does not wait in the triggerer: no provider has a trigger for TrainJobs, and with any other trigger the
    training would go on after a person has ended the task.

    Args:
        job: `ml.<stage>`.
        runtime: name of the TrainingRuntime in the namespace; it says how many nodes there are and what they look like.
        flags: JSON list of the flags, a template.
        returns: name of the one value of the job's JSON object to return instead, of any type.

    Raises:
        FinalJobError: exit code 2, 3 or 4, with which Airflow does not try again.
        AirflowException: any other failure.
    """

    template_fields = ("flags",)

    def __init__(self, *, job: str, runtime: str, flags: str, returns: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.job = job
        self.runtime = runtime
        self.flags = flags
        self.returns = returns
        self.train_job: str | None = None
        self.result: dict[str, Any] = {}

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        return lineage_event(self.flags, self.result)

    @cached_property
    def hook(self) -> KubernetesHook:
        return KubernetesHook()

    def manifest(self, name: str) -> dict[str, Any]:
        """Return the TrainJob: a reference to the runtime, and the command."""
        return {
            "apiVersion": f"{TRAINER['group']}/{TRAINER['version']}",
            "kind": "TrainJob",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {
                "runtimeRef": {"apiGroup": TRAINER["group"], "kind": "TrainingRuntime", "name": self.runtime},
                "trainer": {"command": ["python"], "args": command(self.job, self.flags)},
            },
        }

    def execute(self, context: Context) -> Any:
        wait_for_turn(context)
        instance = context["ti"]
        identity = f"{instance.dag_id}/{instance.run_id}/{instance.task_id}"
        name = f"{_name(self.job)}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"
        self.train_job = name
        custom, core = self.hook.custom_object_client, self.hook.core_v1_client
        try:
            custom.create_namespaced_custom_object(namespace=NAMESPACE, body=self.manifest(name), **TRAINER)
            self.log.info("created train_job=%s runtime=%s", name, self.runtime)
        except ApiException as error:
            if error.status != 409:
                raise
            self.log.info("found train_job=%s", name)
        log: PodLog | None = None
        lines: deque[str] = deque(maxlen=TAIL_LINES)
        while True:
            ended = _ended(custom.get_namespaced_custom_object(namespace=NAMESPACE, name=name, **TRAINER))
            pod = self._first_node(core, name)
            if pod and (log is None or log.pod != pod.metadata.name):
                # A restarted training has another pod.
                log = PodLog(core, pod.metadata.name, "node")
                lines.clear()
            for line in log.read_on() if log else []:
                self.log.info("%s", line)
                lines.append(line)
            if ended:
                break
            time.sleep(POLL_SECONDS)
        self.on_kill()
        if ended["type"] == "Failed":
            code = _exit_code(pod, "node") if pod else None
            raise failure(self.job, code or 1, list(lines) or [ended.get("message", "")])
        self.result = _result(self.job, lines)
        return returned(self.result, self.returns)

    def on_kill(self) -> None:
        """Delete the TrainJob and its pods."""
        if self.train_job:
            try:
                self.hook.custom_object_client.delete_namespaced_custom_object(
                    namespace=NAMESPACE, name=self.train_job, propagation_policy="Foreground", **TRAINER
                )
            except ApiException as error:
                if error.status != 404:
                    raise

    @staticmethod
    def _first_node(core: Any, name: str) -> V1Pod | None:
        """Return the newest pod of node 0, the node that publishes and prints the result."""
        selector = f"jobset.sigs.k8s.io/jobset-name={name},batch.kubernetes.io/job-completion-index=0"
        pods = core.list_namespaced_pod(NAMESPACE, label_selector=selector).items
        return max(pods, key=lambda pod: pod.metadata.creation_timestamp, default=None)


def _name(job: str) -> str:
    return f"crane-{job.replace('.', '-')}"


def _ended(train_job: dict[str, Any]) -> dict[str, Any] | None:
    """Return the condition `Complete` or `Failed` of a TrainJob, None while it runs."""
    for condition in train_job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return condition
    return None


def _exit_code(pod: V1Pod, container: str) -> int | None:
    """Return the exit code of a container, None while it runs."""
    for status in (pod.status and pod.status.container_statuses) or []:
        if status.name == container and status.state and status.state.terminated:
            return status.state.terminated.exit_code
    return None


class PodLog:
    """The log of a container, of which every read goes on where the last one ended.

    The client of the API can only ask for the last seconds. So a read asks for `OVERLAP_SECONDS` more than have passed,
    and what it has returned before is told by the timestamps of the lines.

    Args:
        core: client of the API.
        pod, container: whose log.
    """

    def __init__(self, core: Any, pod: str, container: str) -> None:
        self.pod = pod
        self._core, self._container = core, container
        self._read_at: float | None = None
        self._last = ""
        # Lines with the last timestamp that were returned: several can have the same.
        self._num_last = 0

    def read_on(self) -> list[str]:
        """Return the lines since the last read."""
        now, since = time.monotonic(), {}
        if self._read_at is not None:
            since = {"since_seconds": math.ceil(now - self._read_at + OVERLAP_SECONDS)}
        found = _log(self._core, self.pod, self._container, timestamps=True, **since)
        if found:
            self._read_at = now
        lines, skipped = [], 0
        for line in found:
            stamp, _, text = line.partition(" ")
            stamp = _comparable(stamp)
            if stamp < self._last:
                continue
            if stamp == self._last and skipped < self._num_last:
                skipped += 1
                continue
            lines.append((stamp, text))
        if lines:
            last = lines[-1][0]
            self._num_last = sum(stamp == last for stamp, _ in lines) + (skipped if last == self._last else 0)
            self._last = last
        return [text for _, text in lines]


def _comparable(stamp: str) -> str:
    """Return an instant `2026-01-31T12:00:00.5Z` with nine digits of its second, so that text compares as time."""
    whole, _, fraction = stamp.removesuffix("Z").partition(".")
    return f"{whole}.{fraction:0<9}"


def _log(core: Any, pod: str, container: str, **wanted: Any) -> list[str]:
    """Return the lines a container has written: none before it starts, and none once its log is gone.

    Args:
        wanted: options of `read_namespaced_pod_log`.
    """
    try:
        # The client would return `str(bytes)`, so this decodes the response itself.
        response = core.read_namespaced_pod_log(pod, NAMESPACE, container=container, _preload_content=False, **wanted)
    except ApiException as error:
        if error.status in (400, 404):
            return []
        raise
    return response.data.decode(errors="backslashreplace").splitlines()


def _result(job: str, lines: Iterable[str]) -> dict[str, Any]:
    """Return the JSON object that a job prints last, among log lines.

    Raises:
        AirflowException: there is none. The next try finds the artifact and prints it.
    """
    result = last_object(list(lines), "stage")
    if result is None:
        raise AirflowException(f"jobs.{job} succeeded, but its log does not hold its result.")
    return result
