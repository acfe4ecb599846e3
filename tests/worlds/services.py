"""The services of a production deployment as child processes: PostgreSQL, MLflow, Airflow, and a proxy that fails.

Everything lies below one folder, listens on the loopback interface alone and ends by process id.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

from jobs.commands.airflow import LocalAirflow
from jobs.commands.paths import POOLS
from jobs.commands.steps import Steps

Found = TypeVar("Found")

PATIENCE = 900.0
"""Seconds until a drill gives up waiting; a machine that is busy with other things is slow, not broken."""


def until(what: str, look: Callable[[], Found | None], patience: float = PATIENCE, every: float = 1.0) -> Found:
    """Look again and again until something is there."""
    deadline = time.monotonic() + patience
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what} within {patience:.0f} s")
        time.sleep(every)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


class Service:
    """A child process in a session of its own, its output in a log.

    Args:
        name: what it is.
        argv: the command.
        folder: where its log goes.
        environment: its whole environment; this process's own when None.
        user: who runs it; this process's own when None.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> None:
        self.name = name
        self.argv = argv
        self.log = folder / f"{name}.log"
        self._environment = environment
        self._user = user
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv,
                env=self._environment,
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **({"user": self._user, "group": self._user, "extra_groups": []} if self._user else {}),
            )

    def stop(self, how: signal.Signals = signal.SIGTERM, patience: float = 60.0) -> None:
        """End the process, and whatever it leaves behind in its session."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def kill(self) -> None:
        """Kill the process and its forks, as a container dies; what they started in sessions of their own lives on.

        Killing the parent alone is no drill but a trap: its forks keep the sockets to the database open, and with them
        the row locks of its last transaction.
        """
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def tail(self, num_chars: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-num_chars:]


class Postgres:
    """A PostgreSQL server from the Debian package, run by an ordinary user.

    Args:
        folder: for its data, socket and log.
    """

    def __init__(self, folder: Path) -> None:
        versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        assert versions, "no PostgreSQL: apt-get install postgresql"
        programs = versions[-1].parent
        self.port = free_port()
        self.user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        folder.mkdir()
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        data = folder / "data"
        as_user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        subprocess.run(
            [str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "drill", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=folder,
            **as_user,
        )
        argv = [str(programs / "postgres"), "-D", str(data), "-p", str(self.port), "-k", str(folder)]
        settings = ("listen_addresses=127.0.0.1", "max_connections=200", "fsync=off")
        argv += [word for setting in settings for word in ("-c", setting)]
        self._ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port)]
        self._psql = [str(programs / "psql"), "-h", "127.0.0.1", "-p", str(self.port), "-U", "drill", "-tA"]
        self.service = Service("postgres", argv, folder, user="postgres" if os.geteuid() == 0 else None)

    def start(self) -> None:
        self.service.start()
        until("PostgreSQL", lambda: subprocess.run(self._ready, capture_output=True).returncode == 0, every=0.2)

    def stop(self) -> None:
        """Break off every session and shut down."""
        self.service.stop(signal.SIGINT)

    def create(self, database: str) -> None:
        self.ask("postgres", f"create database {database}")

    def ask(self, database: str, sql: str) -> list[str]:
        """The rows of a query."""
        ended = subprocess.run([*self._psql, "-d", database, "-c", sql], capture_output=True, text=True, check=True)
        return ended.stdout.splitlines()

    def uri(self, database: str, driver: str) -> str:
        return f"postgresql+{driver}://drill@127.0.0.1:{self.port}/{database}"


class Mlflow:
    """An MLflow server with PostgreSQL behind it.

    Args:
        folder: for artifacts and log.
        database: URI of its database.
    """

    def __init__(self, folder: Path, database: str) -> None:
        folder.mkdir()
        self.port = free_port()
        # One worker: on a busy machine a supervisor of several takes them for dead while they import.
        argv = [
            *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database),
            *("--artifacts-destination", (folder / "artifacts").as_uri(), "--serve-artifacts"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
        ]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet"}
        # A server is no client: neither an outside setting nor a proxy may lead it elsewhere.
        environment.pop("MLFLOW_TRACKING_URI", None)
        self.service = Service("mlflow", argv, folder, environment)

    def start(self) -> None:
        self.service.start()
        until("MLflow", lambda: answers(f"http://127.0.0.1:{self.port}/health"))


@dataclass(frozen=True)
class Request:
    """A request that went through the proxy.

    Attributes:
        method, path: as asked, without the query.
        body: JSON, empty where there was none.
        status: what was answered.
    """

    method: str
    path: str
    body: dict[str, Any]
    status: int


class Proxy:
    """Stands before MLflow, remembers what was asked and answers 500 where `fails` says so.

    Args:
        port: the server's port.
    """

    def __init__(self, port: int) -> None:
        self.requests: list[Request] = []
        self.fails: Callable[[str, str, list[Request]], bool] = lambda method, path, before: False
        self._port = port
        lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = urllib.parse.urlsplit(self.path).path
                with lock:
                    failing = proxy.fails(self.command, path, proxy.requests)
                if failing:
                    status, headers, answer = 500, {}, b'{"error_code": "INTERNAL_ERROR", "message": "drill"}'
                else:
                    status, headers, answer = proxy._ask(self.command, self.path, body, dict(self.headers))
                with lock:
                    content = json.loads(body) if body[:1] == b"{" else {}
                    proxy.requests.append(Request(self.command, path, content, status))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = forward

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.uri = f"http://127.0.0.1:{self._server.server_port}"

    def _ask(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
            kept = {name: value for name, value in headers.items() if name.lower() not in ("host", "connection")}
            connection.request(method, path, body or None, kept)
            response = connection.getresponse()
            answer = response.read()
        except OSError as error:
            return 502, {}, str(error).encode()
        dropped = ("content-length", "transfer-encoding", "connection")
        passed = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
        return response.status, passed, answer

    def alias_moves(self) -> list[str | None]:
        """Every successful move of the alias `champion`, in order; None where it was taken away."""
        return [
            request.body.get("version") if request.method == "POST" else None
            for request in self.requests
            if request.path.endswith("/registered-models/alias")
            and request.method in ("POST", "DELETE")
            and request.body.get("alias") == "champion"
            and request.status == 200
        ]

    def stop(self) -> None:
        self._server.shutdown()


class Airflow:
    """Scheduler, API server, DAG processor and triggerer.

    Args:
        folder: its home.
        database: URI of its database.
        settings: further environment variables.
    """

    COMPONENTS = ("api-server", "scheduler", "dag-processor", "triggerer")

    def __init__(self, folder: Path, database: str, settings: Mapping[str, str]) -> None:
        folder.mkdir()
        self.home = folder
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        local = LocalAirflow(folder, folder / "setup.log", Steps())
        self.program = str(local.program)
        self.environment = local.environment() | {
            "AIRFLOW__API__PORT": str(port),
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API__SECRET_KEY": secrets.token_hex(32),
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": database,
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC": database,
            "AIRFLOW__LOGGING__JSON_LOGS": "False",
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "30",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
            "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "15",
            "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "20",
            **settings,
        }
        self.services = {
            name: Service(name, [self.program, name], folder, self.environment) for name in self.COMPONENTS
        }
        self._token = ""

    def prepare(self) -> None:
        self.cli("db", "migrate")
        self.cli("pools", "import", str(POOLS))

    def start(self) -> None:
        for service in self.services.values():
            service.start()
        until("API server", lambda: answers(f"{self.url}/api/v2/monitor/health"))
        until("DAGs", lambda: len(self.get("/dags")["dags"]) == 4)

    def stop(self) -> None:
        for service in self.services.values():
            service.stop()

    def cli(self, *arguments: str) -> str:
        """Run `airflow ...` to its end."""
        ended = subprocess.run([self.program, *arguments], env=self.environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
        return ended.stdout

    def get(self, path: str) -> Any:
        return self.ask("GET", path)[1]

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One call of the REST API: status and JSON."""
        if not self._token:
            with urllib.request.urlopen(f"{self.url}/auth/token", timeout=60) as response:
                self._token = json.loads(response.read())["access_token"]
        request = urllib.request.Request(
            f"{self.url}/api/v2{path}",
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def trigger(self, dag_id: str, conf: Mapping[str, Any]) -> str:
        """Start a run; its id."""
        status, answer = self.ask("POST", f"/dags/{dag_id}/dagRuns", {"logical_date": None, "conf": conf})
        assert status == 200, answer
        return answer["dag_run_id"]

    def unpause(self, *dag_ids: str) -> None:
        for dag_id in dag_ids:
            assert self.ask("PATCH", f"/dags/{dag_id}", {"is_paused": False})[0] == 200

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """Every run, oldest first."""
        return self.get(f"/dags/{dag_id}/dagRuns?limit=100&order_by=run_after")["dag_runs"]

    def run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        return self.get(f"/dags/{dag_id}/dagRuns/{urllib.parse.quote(run_id)}")

    def tasks(self, dag_id: str, run_id: str) -> dict[str, list[dict[str, Any]]]:
        """Task to its instances."""
        path = f"/dags/{dag_id}/dagRuns/{urllib.parse.quote(run_id)}/taskInstances?limit=100"
        found: dict[str, list[dict[str, Any]]] = {}
        for instance in self.get(path)["task_instances"]:
            found.setdefault(instance["task_id"], []).append(instance)
        return found

    def states(self, dag_id: str, run_id: str) -> dict[str, list[str]]:
        return {task: [each["state"] for each in instances] for task, instances in self.tasks(dag_id, run_id).items()}

    def result(self, dag_id: str, run_id: str, task: str) -> Any:
        """What a task returned."""
        path = f"/dags/{dag_id}/dagRuns/{urllib.parse.quote(run_id)}/taskInstances/{task}/xcomEntries/return_value"
        return self.get(f"{path}?deserialize=true")["value"]

    def log(self, dag_id: str, run_id: str, task: str) -> str:
        """All that the attempts of a task have logged."""
        folders = (self.home / "logs" / f"dag_id={dag_id}" / f"run_id={run_id}").glob(f"task_id={task}/**/*.log")
        return "".join(path.read_text() for path in sorted(folders))

    def why(self, dag_id: str, run_id: str) -> str:
        """What went wrong in a run, for the message of an assertion."""
        failed = [
            task
            for task, states in self.states(dag_id, run_id).items()
            if {"failed", "up_for_retry"} & {str(state) for state in states}
        ]
        logs = "".join(f"\n-- {task}\n{self.log(dag_id, run_id, task)[-3000:]}" for task in failed)
        return f"{dag_id} {run_id}: {self.states(dag_id, run_id)}{logs}"

    def wait(self, dag_id: str, run_id: str, patience: float = PATIENCE) -> str:
        """The state a run ends in."""

        def ended() -> str | None:
            # The database, and with it the API, may be gone for a while.
            with contextlib.suppress(OSError, KeyError):
                state = self.run(dag_id, run_id)["state"]
                return state if state in ("success", "failed") else None
            return None

        return until(f"end of {dag_id} {run_id}", ended, patience)

    def wait_for_task(self, dag_id: str, run_id: str, task: str, states: Sequence[str]) -> dict[str, Any]:
        """The first instance of a task in one of the states."""

        def found() -> dict[str, Any] | None:
            for instance in self.tasks(dag_id, run_id).get(task, []):
                if instance["state"] in states:
                    return instance
            return None

        return until(f"{task} of {dag_id} {run_id} in {states}", found, every=0.5)

    def do(self, dag_id: str, conf: Mapping[str, Any]) -> tuple[str, str]:
        """Start a run and wait for its end: id and state."""
        run_id = self.trigger(dag_id, conf)
        return run_id, self.wait(dag_id, run_id)

    def clear(self, dag_id: str, run_id: str) -> None:
        """Let the failed tasks of a run, and what waits for them, run again."""
        body = {"dry_run": False, "dag_run_id": run_id, "only_failed": True, "reset_dag_runs": True}
        status, answer = self.ask("POST", f"/dags/{dag_id}/clearTaskInstances", body)
        assert status == 200, answer


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own that is soon full; needs the right to mount."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def children(pid: int) -> list[int]:
    """Process ids of all that descends from a process."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found, wanted = [], [pid]
    while wanted:
        parent = wanted.pop()
        below = [child for child, its in pairs if its == parent]
        found += below
        wanted += below
    return found
