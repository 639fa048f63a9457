"""A real HTTP server that fails on purpose: each request does the next thing of a script."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer(ThreadingHTTPServer):
    """What its requests do is in `script`, in the order they come; "ok" when that is over.

    `go_on` lets requests that wait go on, `seen` holds (method, path, headers, body) of each that came.
    """

    daemon_threads = True

    def __init__(self, *script):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = list(script)
        self.seen = []
        self.connections = 0
        self.go_on = threading.Event()
        self.waiting = threading.Semaphore(0)  # released by each request that begins to wait
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def host(self):
        return self.url

    def process_request(self, request, client_address):
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        pass  # clients that leave are what it is for


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        with self.server.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.server.seen.append((self.command, self.path, headers, body))
            what = self.server.script.pop(0) if self.server.script else "ok"
        name, _, argument = what.partition(" ")
        getattr(self, f"do_{name}")(argument)

    do_POST = do_PUT = do_GET  # noqa: N815 - names of the standard library

    def do_ok(self, _):
        self.answer(200, b"ok")

    def do_status(self, argument):
        status, _, retry_after = argument.partition(" ")
        headers = {"retry-after": retry_after} if retry_after else {}
        self.answer(int(status), b"not now", **headers)

    def do_redirect(self, url):
        self.answer(302, b"", location=url)

    def do_reset(self, _):
        """Cut the connection (RST) before any answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def do_wait(self, _):
        """Answer when told."""
        self.server.waiting.release()
        self.server.go_on.wait(20)
        self.answer(200, b"late")

    def do_half(self, _):
        """Promise more than comes."""
        self.send_response(200)
        self.send_header("content-length", "100")
        self.end_headers()
        self.wfile.write(b"half")
        self.close_connection = True

    def do_stream(self, argument):
        """A first piece, and the second when told."""
        self.send_response(int(argument or 200))
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nfirst\r\n")
        self.server.waiting.release()
        self.server.go_on.wait(20)
        self.wfile.write(b"6\r\nsecond\r\n0\r\n\r\n")

    def answer(self, status, body, **headers):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(*script):
    """A running server."""
    with FaultyServer(*script) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()
            thread.join(10)
