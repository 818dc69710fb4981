"""A scripted OpenAI-compatible endpoint over real HTTP, with one knob for each oddity of real servers.

    endpoint.finish_reason = "content_filter"
    endpoint.config(max_retries=1)           the settings of an engine that asks it

By default it streams `the Nile <seed>`, word by word, as OpenAI's server of 2024 does. The fixture is in conftest.py.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch

from aft_ray.config import OpenAIEngineConfig

KEY_ENV, KEY = "AFT_RAY_TEST_ENDPOINT_KEY", "sesame"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
Body = dict[str, Any]


class ScriptedEndpoint(ThreadingHTTPServer):
    """The server, its knobs, and what it was asked."""

    daemon_threads = True
    request_queue_size = 128  # several prompts at once send all their calls

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.asked: list[Body] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        """When each call came, on the monotonic clock."""
        self.hung_up = threading.Event()
        self.num_running = self.most_running = 0

        # what it answers
        self.words: tuple[str, ...] = ("the", " Nile", " {seed}")
        self.reply: Callable[[Body], str | None] | None = None
        """Writes the answer in place of `words`; None refuses the call with 400."""
        self.finish_reason: str | None = "stop"
        self.usage: dict[str, Any] | None = USAGE
        self.reasoning: tuple[str, ...] = ()
        self.reasoning_field = "reasoning_content"
        self.refusal: str | None = None
        """Text in the field `refusal`, in place of content."""

        self.models: tuple[str, ...] = ("teacher",)

        # in which form
        self.ends_with_done = True
        self.sends_one_object = False
        """Whether it ignores `stream: true`."""
        self.sends_objects_per_line = False
        """Whether its stream has no `data:` before the objects."""
        self.sends_parts = False
        """Whether content is a list of typed parts, the reasoning among them, as Magistral's is."""
        self.annotates = False
        """Whether a choice without a delta follows the answer, as from Azure's asynchronous filter."""
        self.keeps_alive = False
        """Whether comments, pings and empty lines stand between the events."""
        self.line_end = "\n"
        self.escapes = True
        """Whether JSON escapes what is not ASCII."""
        self.page: str | None = None
        """An HTML page with status 200 in place of any answer."""
        self.error: Any = None
        """An error object with status 200 in place of any answer."""
        self.error_at_end: Any = None
        """An error event behind the answer's last word, before any finish reason."""

        # how it fails
        self.refuse_first: list[tuple[int, dict[str, str]]] = []
        """(status, headers) of the first replies, which come before any answer."""
        self.refusal_body: Callable[[int], Any] = lambda status: {"error": {"message": f"scripted {status}"}}
        self.refuse_fields: dict[str, str] = {}
        """Fields that it does not take, with the reason: 422 with a `detail`."""
        self.fail_seeds: set[int] = set()
        self.break_off = 0
        """Number of answers that end after their first word."""
        self.hangs_up_after: str | None = None
        """`answer`: the connection breaks behind the finish reason. `word`: behind the first word, always."""
        self.seconds = 0.0
        """Seconds before each word."""
        self.capacity: int | None = None
        """Most concurrent calls. Others are refused with 429."""
        self.key_header = "Authorization"
        self.key: str | None = f"Bearer {KEY}"
        """Value of that header; None where the server takes no key."""

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    def settings(self, **others: Any) -> dict[str, Any]:
        return {"type": "openai", "base_url": self.url, "model": "teacher", "api_key_env": KEY_ENV, **others}

    def config(self, **others: Any) -> OpenAIEngineConfig:
        return OpenAIEngineConfig.model_validate(self.settings(**others))


class Handler(BaseHTTPRequestHandler):
    server: ScriptedEndpoint

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body)
            server.paths.append(self.path)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.times.append(time.monotonic())
            refusal = server.refuse_first.pop(0) if server.refuse_first else None
            server.num_running += 1
            if server.capacity and server.num_running > server.capacity:
                refusal = (429, {"Retry-After": "0.1"})
            server.most_running = max(server.most_running, server.num_running)
        try:
            self.respond(body, refusal)
        except (BrokenPipeError, ConnectionResetError):
            server.hung_up.set()
        finally:
            with server.lock:
                server.num_running -= 1

    def do_GET(self) -> None:
        if self.headers.get(self.server.key_header) != self.server.key:
            self.send(401, {"error": {"message": "no such key"}})
        else:
            self.send(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def respond(self, body: Body, refusal: tuple[int, dict[str, str]] | None) -> None:
        server = self.server
        odd = [name for name in server.refuse_fields if name in body]
        if self.headers.get(server.key_header) != server.key:
            self.send(401, {"error": {"message": "no such key"}})
        elif refusal:
            self.send(refusal[0], server.refusal_body(refusal[0]), refusal[1])
        elif odd:
            self.send(422, {"detail": [{"loc": ["body", name], "msg": server.refuse_fields[name]} for name in odd]})
        elif body.get("seed") in server.fail_seeds:
            self.send(400, server.refusal_body(400))
        elif server.page is not None:
            self.send(200, server.page)
        elif server.error is not None:
            self.send(200, {"error": server.error})
        else:
            self.answer(body)

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        is_page = isinstance(content, str)
        raw = (content if is_page else json.dumps(content)).encode()
        self.send_response(status)
        kind = "text/html" if is_page else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def answer(self, body: Body) -> None:
        server = self.server
        words = [word.format(seed=body.get("seed")) for word in server.words]
        if server.reply is not None:
            reply = server.reply(body)
            if reply is None:
                self.send(400, server.refusal_body(400))
                return
            words = [reply]
        if server.sends_one_object or not body.get("stream"):
            time.sleep(server.seconds * len(words))
            self.send(200, self.whole("".join(words)))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for thought in server.reasoning:
            self.choice(self.reasoned(thought))
        for number, word in enumerate(words if server.refusal is None else []):
            time.sleep(server.seconds)
            if number and (server.break_off > 0 or server.hangs_up_after == "word"):
                server.break_off -= 1
                return
            self.choice({"content": [{"type": "text", "text": word}] if server.sends_parts else word})
        self.end_answer()

    def end_answer(self) -> None:
        server = self.server
        if server.refusal is not None:
            self.choice({"refusal": server.refusal})
        if server.error_at_end is not None:
            self.event({"error": server.error_at_end})
            return
        if server.finish_reason is not None:
            self.choice({}, server.finish_reason)
        if server.annotates:
            self.event({"choices": [{"index": 0, "finish_reason": None, "content_filter_offsets": {"end_offset": 3}}]})
        if server.hangs_up_after == "answer":
            self.connection.close()
            return
        if server.usage is not None:
            self.event({"choices": [], "usage": server.usage})
        if server.ends_with_done:
            self.wfile.write(b"data: [DONE]\n\n")

    def reasoned(self, thought: str) -> dict[str, Any]:
        if self.server.sends_parts:
            return {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": thought}]}]}
        return {"content": None, self.server.reasoning_field: thought}

    def whole(self, text: str) -> dict[str, Any]:
        server = self.server
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if server.reasoning:
            message[server.reasoning_field] = "".join(server.reasoning)
        if server.refusal is not None:
            message |= {"content": None, "refusal": server.refusal}
        choice = {"index": 0, "message": message, "finish_reason": server.finish_reason}
        return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": server.usage}

    def choice(self, delta: dict[str, Any], finish_reason: str | None = None) -> None:
        self.event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})

    def event(self, chunk: dict[str, Any]) -> None:
        server = self.server
        whole = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "scripted", **chunk}
        lines = ["", ": keep-alive", "event: ping", 'data: {"type": "ping"}', "", "event: message"]
        for line in lines if server.keeps_alive else []:
            self.wfile.write((line + server.line_end).encode())
        prefix = "" if server.sends_objects_per_line else "data: "
        text = json.dumps(whole, ensure_ascii=server.escapes)
        self.wfile.write((prefix + text + server.line_end * 2).encode())

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def scripted_endpoint() -> Iterator[ScriptedEndpoint]:
    """Run an endpoint, with its key in the environment of this process."""
    server = ScriptedEndpoint()
    with patch.dict("os.environ", {KEY_ENV: KEY}):
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()
        server.server_close()
