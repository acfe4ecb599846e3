"""A Kubernetes API on the loopback interface that holds what infra/kubernetes/base applies and runs what it is told.

It knows just enough of the API for the operators: pod templates, pods (their commands run here as child processes),
logs, events and TrainJobs. The real client speaks to it over HTTP.
"""

import copy
import functools
import json
import os
import subprocess
import sys
import threading
import uuid
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import yaml
from conftest import PROJECT

BASE = PROJECT / "infra" / "kubernetes" / "base"


def applied(kind: str) -> dict[str, dict]:
    """Manifests of a kind in the base, by name."""
    return {each["metadata"]["name"]: copy.deepcopy(each) for each in _documents() if each.get("kind") == kind}


@functools.cache
def _documents() -> list[dict]:
    files = [path for path in sorted(BASE.glob("*.yaml")) if path.name != "kustomization.yaml"]
    return [document for path in files for document in yaml.safe_load_all(path.read_text())]


class Cluster:
    """Serve the API until closed.

    Args:
        workdir: where the commands of pods run, in place of the image's code.
    """

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.templates = applied("PodTemplate")
        self.runtimes = applied("TrainingRuntime")
        self.created: list[dict] = []
        self.pods: dict[str, dict] = {}
        self.logs: dict[str, list[tuple[datetime, str]]] = {}
        self.num_sent: list[int] = []
        self.train_jobs: dict[str, dict] = {}
        self.deleted: list[str] = []
        handler = type("Handler", (_Handler,), {"cluster": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(self, path: Path) -> Path:
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                    "clusters": [{"name": "test", "cluster": {"server": self.url}}],
                    "users": [{"name": "test", "user": {}}],
                }
            )
        )
        return path

    def start_pod(self, pod: dict, environment: dict | None = None) -> dict:
        """Run the first container's command; `python` is this interpreter."""
        self.created.append(json.loads(json.dumps(pod)))
        name = pod["metadata"]["name"]
        pod["metadata"] |= {"creationTimestamp": datetime.now(UTC).isoformat(), "uid": uuid.uuid4().hex}
        pod["status"] = {"phase": "Running", "containerStatuses": [self._status(pod, {"running": {}})]}
        self.pods[name] = pod
        container = pod["spec"]["containers"][0]
        argv = [*container["command"], *container["args"]]
        assert argv[0] == "python"
        process = subprocess.Popen(
            [sys.executable, *argv[1:]],
            cwd=self.workdir,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

        def finish() -> None:
            self.logs[name] = []
            for line in process.stdout:
                self.logs[name].append((datetime.now(UTC), line))
            code = process.wait()
            pod["status"] = {
                "phase": "Failed" if code else "Succeeded",
                "containerStatuses": [self._status(pod, {"terminated": {"exitCode": code, "reason": "Completed"}})],
            }

        threading.Thread(target=finish).start()
        return pod

    def start_train_job(self, job: dict) -> None:
        """The pods that Kubeflow Trainer makes of a TrainJob and its TrainingRuntime."""
        runtime = self.runtimes[job["spec"]["runtimeRef"]["name"]]["spec"]
        template = runtime["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
        nodes = runtime["mlPolicy"]["numNodes"]
        name = job["metadata"]["name"]
        self.train_jobs[name] = job
        for rank in range(nodes):
            pod = json.loads(json.dumps({"metadata": template["metadata"], "spec": template["spec"]}))
            pod["metadata"] |= {"name": f"{name}-node-0-{rank}"}
            pod["metadata"]["labels"] |= {
                "jobset.sigs.k8s.io/jobset-name": name,
                "batch.kubernetes.io/job-completion-index": str(rank),
            }
            pod["spec"]["containers"][0] |= {key: job["spec"]["trainer"][key] for key in ("command", "args")}
            self.start_pod(pod, {"PET_NNODES": str(nodes), "PET_NODE_RANK": str(rank)})

    def train_job(self, name: str) -> dict | None:
        job = self.train_jobs.get(name)
        if job is None:
            return None
        phases = {
            pod["status"]["phase"] for pod in self.pods.values() if pod["metadata"]["name"].startswith(f"{name}-node-")
        }
        ended = {"Failed": "Failed"} if "Failed" in phases else {} if "Running" in phases else {"Succeeded": "Complete"}
        conditions = [{"type": kind, "status": "True", "message": "of the operator"} for kind in ended.values()]
        return {**job, "status": {"conditions": conditions}}

    @staticmethod
    def _status(pod: dict, state: dict) -> dict:
        name = pod["spec"]["containers"][0]["name"]
        return {
            "name": name,
            "state": state,
            "ready": True,
            "restartCount": 0,
            "image": "",
            "imageID": "",
            "started": "running" in state,
        }


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        kind, name, sub = self._route(url.path)
        cluster = self.cluster
        if kind == "podtemplates" and name in cluster.templates:
            self._answer(cluster.templates[name])
        elif kind == "pods" and sub == "log" and name in cluster.pods:
            self._answer(self._log(name, parse_qs(url.query)))
        elif kind == "pods" and name in cluster.pods:
            self._answer(cluster.pods[name])
        elif kind == "pods" and not name:
            selector = parse_qs(url.query).get("labelSelector", [""])[0]
            found = [pod for pod in cluster.pods.values() if _matches(pod["metadata"]["labels"], selector)]
            self._answer({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": found})
        elif kind == "events":
            self._answer({"kind": "EventList", "apiVersion": "v1", "metadata": {}, "items": []})
        elif kind == "trainjobs" and (job := cluster.train_job(name)):
            self._answer(job)
        else:
            self._answer({"kind": "Status", "reason": "NotFound", "message": self.path}, 404)

    def do_POST(self) -> None:
        kind, _, _ = self._route(urlsplit(self.path).path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if kind == "trainjobs":
            if body["metadata"]["name"] in self.cluster.train_jobs:
                self._answer({"kind": "Status", "reason": "AlreadyExists"}, 409)
                return
            self.cluster.start_train_job(body)
            self._answer(body)
        else:
            self._answer(self.cluster.start_pod(body))

    def do_PATCH(self) -> None:
        _, name, _ = self._route(urlsplit(self.path).path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.cluster.pods[name]["metadata"]["labels"] |= body["metadata"]["labels"]
        self._answer(self.cluster.pods[name])

    def do_DELETE(self) -> None:
        kind, name, _ = self._route(urlsplit(self.path).path)
        self.cluster.deleted.append(name)
        if kind == "trainjobs":
            self.cluster.train_jobs.pop(name, None)
        else:
            self.cluster.pods.pop(name, None)
        self._answer({"kind": "Status", "status": "Success"})

    def _log(self, name: str, query: dict[str, list[str]]) -> str:
        lines = list(self.cluster.logs.get(name, []))
        if "sinceSeconds" in query:
            since = datetime.now(UTC) - timedelta(seconds=int(query["sinceSeconds"][0]))
            lines = [(at, line) for at, line in lines if at >= since]
        if "tailLines" in query:
            lines = lines[-int(query["tailLines"][0]) :]
        self.cluster.num_sent.append(len(lines))
        # As containerd writes them, without zeros at the end.
        stamps = [at.strftime("%Y-%m-%dT%H:%M:%S.%f").rstrip("0").rstrip(".") + "Z" for at, _ in lines]
        is_stamped = query.get("timestamps") == ["True"] or query.get("timestamps") == ["true"]
        return "".join(
            f"{stamp} {line}" if is_stamped else line for stamp, (_, line) in zip(stamps, lines, strict=True)
        )

    @staticmethod
    def _route(path: str) -> tuple[str, str, str]:
        """Kind, name and subresource below the namespace."""
        parts = path.partition("/namespaces/crane/")[2].split("/")
        kind, name, sub = (*parts, "", "")[:3]
        return kind, name, sub

    def _answer(self, body: dict | str, code: int = 200) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _matches(labels: dict[str, str], selector: str) -> bool:
    for term in filter(None, selector.split(",")):
        if term.startswith("!"):
            met = term[1:] not in labels
        elif "!=" in term:
            key, _, value = term.partition("!=")
            met = labels.get(key) != value
        else:
            key, _, value = term.partition("=")
            met = labels.get(key) == value
        if not met:
            return False
    return True
