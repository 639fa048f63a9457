"""Calls to two hosts, one of which fails: `python examples/web_outgoing.py`.

Both are served here, so that it needs no network.
"""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from seawall import CircuitOpenError, Deadline
from seawall.web.outgoing import host_policies
from seawall.web.outgoing.httpx import AsyncSeawallTransport


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None: ...


class Broken(Healthy):
    def do_GET(self) -> None:
        self.send_error(500)


async def ask(good: str, bad: str) -> None:
    policies = host_policies("partners", timeout=2.0, deadline=6.0, hedge_after=0.5)
    async with httpx.AsyncClient(transport=AsyncSeawallTransport(policies=policies)) as client:
        failed = 0
        while True:
            try:
                failed += (await client.get(bad)).is_error
            except CircuitOpenError as error:
                print(f"after {failed} failures nobody asks the broken host for {error.retry_after:.0f} s")
                break
        async with Deadline("page", 1.0).scope():  # the host is told, and no attempt outlives it
            response = await client.get(good)
        print(f"the other host answers {response.status_code}: {response.text}")


def main() -> None:
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (Healthy, Broken)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    good, bad = (f"http://127.0.0.1:{server.server_port}/" for server in servers)
    asyncio.run(ask(good, bad))
    for server in servers:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    main()
