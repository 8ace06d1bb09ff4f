"""A small HTTP proxy in front of a real server that does to requests what networks and servers do (hazard H77)."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PASSED = ("Content-Type", "Content-Length", "Authorization", "Idempotency-Key")


@dataclass
class Seen:
    """One request as it came."""

    method: str
    path: str
    token: str | None
    size: int


class Faulty:
    """`with Faulty(url) as proxy`: proxy.url forwards, unless proxy.fault(seen, forward) has answered.

    forward() -> (status, headers, body). fault returns such a triple, None to forward, or raises Drop.
    """

    def __init__(self, target: str):
        self.target = target
        self.fault: Callable | None = None
        self.seen: list[Seen] = []

    def __enter__(self) -> Faulty:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """From here on nobody listens at this address."""
        self.server.shutdown()
        self.server.server_close()

    def count(self, method: str, part: str) -> int:
        return sum(s.method == method and part in s.path for s in self.seen)

    def _handler(self):
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def handle_request(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                seen = Seen(self.command, self.path, self.headers.get("Authorization"), len(body))
                proxy.seen.append(seen)
                try:
                    answer = proxy.fault(seen, lambda: self.forward(body)) if proxy.fault else None
                    status, headers, content = answer or self.forward(body)
                except Drop:
                    return
                self.send_response(status)
                for name in ("Content-Type", "Content-Length", "Location"):
                    if name in headers:
                        self.send_header(name, headers[name])
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = handle_request

            def forward(self, body):
                headers = {k: v for k, v in self.headers.items() if k in PASSED}
                request = urllib.request.Request(proxy.target + self.path, body or None, headers, method=self.command)
                try:
                    with urllib.request.urlopen(request, timeout=20) as response:
                        return response.status, response.headers, response.read()
                except urllib.error.HTTPError as error:
                    return error.code, error.headers, error.read()
                except urllib.error.URLError:
                    raise Drop from None

            def log_message(self, *arguments):
                pass

        return Handler


class Drop(Exception):
    """The connection ends without an answer."""


def answer(status: int, data=None, **headers) -> tuple[int, dict, bytes]:
    body = json.dumps(data).encode()
    return status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}, body


def once(method: str, part: str, act: Callable) -> Callable:
    """A fault that acts on the first such request only. act(forward) -> answer."""
    left = [1]

    def fault(seen, forward):
        if left[0] and seen.method == method and part in seen.path:
            left[0] -= 1
            return act(forward)
        return None

    return fault


def drop_answer(forward):
    forward()
    raise Drop


def drop_request(forward):
    raise Drop


def swallow(forward):
    return answer(200, {"prompt_id": "x", "number": 1, "node_errors": {}})


def repeat(forward):
    forward()
    return forward()


def cut(forward):
    status, headers, body = forward()
    return status, headers, body[: len(body) // 2]


def damage(forward):
    status, headers, body = forward()
    return status, headers, b"\xff" * len(body)


def slow(seconds: float) -> Callable:
    def fault(seen, forward):
        time.sleep(seconds)

    return fault
