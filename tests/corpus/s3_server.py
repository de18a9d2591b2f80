"""A real S3 server on loopback (moto in server mode), and a proxy before it that throttles and hangs up."""

from __future__ import annotations

import http.client
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "corpora"
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server with one bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket=BUCKET)
    try:
        yield url
    finally:
        server.stop()


class UnreliableProxy(ThreadingHTTPServer):
    """Passes requests on, but for every `every`-th: it answers 503, or closes the connection, in turn."""

    daemon_threads = True

    def __init__(self, server: str, every: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server, self.every, self.requests = server, every, itertools.count(1)
        self.throttled = self.dropped = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def running(self) -> Iterator[UnreliableProxy]:
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: UnreliableProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        number = next(self.server.requests)
        if number % self.server.every == 0:
            if number // self.server.every % 2:
                self.server.throttled += 1
                self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
            else:
                self.server.dropped += 1
                self.close_connection = True
            return
        connection = http.client.HTTPConnection(self.server.server.removeprefix("http://"))
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        skipped = ("transfer-encoding", "content-length", "connection")
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in skipped}
        self._answer(answer.status, headers, answer.read())
        connection.close()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass_on

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
