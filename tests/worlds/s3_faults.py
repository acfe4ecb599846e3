"""An S3 endpoint that fails: a proxy that forwards to a server and spoils some of the requests on the way."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HANG_SECONDS = 4.0
Fault = str
"""`error`: answered with 500. `hang`: no answer in time. `drop`: the connection is lost in the middle of the body."""


class FaultyProxy:
    """Forwards every request to `endpoint` unless `choose` names a fault for it.

    Args:
        endpoint: URL of a sound server.
        choose: method, path with query, how many requests came before; the fault, or None.
    """

    def __init__(self, endpoint: str, choose: Callable[[str, str, int], Fault | None]) -> None:
        self.choose = choose
        self.injected: Counter[Fault] = Counter()
        self._count = 0
        self._lock = threading.Lock()
        proxy, target = self, urlsplit(endpoint).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def handle_any(self) -> None:
                fault = proxy.next_fault(self.command, self.path)
                length = int(self.headers.get("Content-Length") or 0)
                if fault == "drop":
                    self.rfile.read(length // 2)
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                body = self.rfile.read(length)
                if fault == "hang":
                    time.sleep(HANG_SECONDS)
                    self.close_connection = True
                    return
                if fault == "error":
                    answer = b"<Error><Code>InternalError</Code><Message>spoilt</Message></Error>"
                    self.reply(500, [("Content-Type", "application/xml")], answer)
                    return
                connection = http.client.HTTPConnection(target, timeout=30)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                payload = response.read()
                self.reply(response.status, response.getheaders(), payload, response.headers.get("Content-Length"))
                connection.close()

            def reply(
                self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None
            ) -> None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response_only(status)
                    for name, value in headers:
                        if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                            self.send_header(name, value)
                    told = length if self.command == "HEAD" and length else str(len(body))
                    self.send_header("Content-Length", told)
                    self.end_headers()
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            fault = self.choose(method, path, self._count)
            self._count += 1
            if fault:
                self.injected[fault] += 1
            return fault

    @contextlib.contextmanager
    def running(self) -> Iterator[FaultyProxy]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()
