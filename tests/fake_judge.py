"""A judge on this machine: an HTTP server for chat completions whose answers, and faults, a function decides."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Say(NamedTuple):
    """A reply of status 200, after `delay` seconds; `drip` seconds between its bytes, if above 0."""

    text: str | None
    delay: float = 0.0
    finish: str = "stop"
    refusal: str | None = None
    drip: float = 0.0
    usage: tuple[int, int] | None = (100, 20)


class Fail(NamedTuple):
    """An error, or a body that is none; `hang_up` closes the connection without a word."""

    status: int
    headers: dict = {}
    body: str = '{"error": {"message": "no"}}'
    hang_up: bool = False


class Raw(NamedTuple):
    """A reply as it is: bytes, or pieces of a body that are sent until they end or nobody listens any more."""

    body: bytes | Iterable[bytes]
    headers: dict = {}
    status: int = 200


class FakeJudge:
    """`script(messages, number)` says what becomes of a request: `number` counts those of the same messages from 1.

    `asked`: messages (as JSON) -> how often; `answered`: the same, for replies of status 200 that were sent to their end.
    """

    def __init__(self, script):
        self.script, self.asked, self.answered, self.headers, self.bodies = script, {}, {}, [], []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def do_POST(self):
                judge.serve(self)

            def log_message(self, *words):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, client_address):  # a client that went away is part of the play
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def serve(self, request):
        request.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        key = json.dumps(body["messages"])
        with self.lock:
            number = self.asked[key] = self.asked.get(key, 0) + 1
            self.headers.append(dict(request.headers))
            self.bodies.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            act = self.script(body["messages"], number)
            if isinstance(act, Fail):
                self._fail(request, act)
            elif isinstance(act, Raw) and isinstance(act.body, bytes):
                self._send(request, act.status, act.body, act.headers)
            elif isinstance(act, Raw):
                self._pour(request, act)
            else:
                self._say(request, act, body["model"])
                with self.lock:
                    self.answered[key] = self.answered.get(key, 0) + 1
        finally:
            with self.lock:
                self.at_once -= 1

    def _fail(self, request, act):
        if act.hang_up:
            request.close_connection = True
            return
        self._send(request, act.status, act.body.encode(), act.headers)

    def _say(self, request, act, model):
        time.sleep(act.delay)
        message = {"role": "assistant", "content": act.text, "refusal": act.refusal}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": f"{model}-0314"}
        reply["choices"] = [{"index": 0, "message": message, "finish_reason": act.finish, "logprobs": None}]
        if act.usage:
            reply["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), act.usage, strict=True))
        self._send(request, 200, json.dumps(reply).encode(), {}, drip=act.drip)

    def _pour(self, request, act):
        request.send_response(act.status)
        for name, value in {"Content-Type": "application/json", "Connection": "close", **act.headers}.items():
            request.send_header(name, value)
        request.end_headers()
        with contextlib.suppress(OSError):
            for piece in act.body:
                request.wfile.write(piece)
        request.close_connection = True

    def _send(self, request, status, body, headers, *, drip=0.0):
        request.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        for piece in [body[i : i + 1] for i in range(len(body))] if drip else [body]:
            request.wfile.write(piece)
            request.wfile.flush()
            time.sleep(drip)


@contextlib.contextmanager
def fake_judge(script):
    judge = FakeJudge(script)
    thread = threading.Thread(target=judge.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.server.shutdown()
        judge.server.server_close()
        thread.join()
