"""What a job needs of a server, in two dialects: ComfyUI's own routes, and Comfy API v2 (comfy-api-proxy).

Both: `upload`, `submit`, `state`, `cancel`, `download`, `choices`. Jobs are found again by an id that the client chose,
so a lost answer never leads to a second execution.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from ...engine.errors import SlipstreamError
from ..canvas.events import server_of_host
from .http import NODE, Connection, NoAnswer, RemoteUnavailable, path_of, with_query

# Seconds for a request that makes the server look at its model folders.
SUBMIT_REPLY = 30.0
# A busy queue is many graphs long, so it is asked for less often than the history.
QUEUE_EVERY = 2.0


@dataclass(frozen=True, slots=True)
class State:
    """kind: queued, running, done, failed, cancelled or absent; ahead: jobs before this one.

    outputs: node id -> the host's output dict; message: what went wrong, in the server's words.
    """

    kind: str
    ahead: int = 0
    message: str = ""
    outputs: dict = field(default_factory=dict)


def connect(connection: Connection) -> Native | Gateway:
    """The dialect of the server. Raises NoAnswer while it is not there, SlipstreamError when it is no ComfyUI."""
    for prefix in ("/api", ""):
        answer = connection.request("GET", f"{prefix}/system_stats")
        if answer.status == 200 and "comfyui_version" in str(_quiet(answer).get("system")):
            return Native(connection, prefix)
        if not prefix:
            break
        answer = connection.request("GET", "/api/v2/health")
        if answer.status == 200 and "status" in _quiet(answer):
            return Gateway(connection)
    raise SlipstreamError(
        f"{NODE}: what answers at {connection.address.place} is not a ComfyUI server; check its address and port."
    )


def _quiet(answer) -> dict:
    with contextlib.suppress(NoAnswer):
        return answer.json()
    return {}


class Native:
    """ComfyUI's own routes, bare or below /api."""

    def __init__(self, connection: Connection, prefix: str):
        self.connection = connection
        self.prefix = prefix
        self._queued: dict[str, tuple[float, State]] = {}
        # The running job there has the id of the one running here: the job would wait for itself.
        here = getattr(server_of_host(), "last_prompt_id", None)
        if here is not None and any(item[1] == here for item in self._queue()["queue_running"]):
            raise SlipstreamError(
                f"{NODE}: {connection.address.place} is this very ComfyUI, and a job there would wait for this one; "
                "enter the address of another server."
            )

    def choices(self, node: str, name: str) -> list[str] | None:
        """What the server offers for an input of a node; None where it has no such node or input."""
        answer = self.connection.request("GET", f"{self.prefix}/object_info/{node}", timeout=SUBMIT_REPLY)
        inputs = answer.json().get(node, {}).get("input", {}) if answer.status == 200 else {}
        for group in ("required", "optional"):
            spec = inputs.get(group, {}).get(name)
            if spec:
                # Newer nodes write ["COMBO", {"options": [...]}], older ones [[...]]; anything else is not a choice.
                options = spec[0] if isinstance(spec[0], list) else (spec[1:] or [{}])[0].get("options")
                return options if isinstance(options, list) else []
        return None

    def upload(self, name: str, data: bytes) -> str:
        """Store a latent in the server's temporary folder, which it empties itself; what LoadLatent takes for it."""
        form = {"type": "temp", "overwrite": "true"}
        body, content_type = multipart(form, "image", name, data)
        answer = self.connection.request("POST", f"{self.prefix}/upload/image", body, content_type)
        if answer.status == 413:
            raise SlipstreamError(
                f"{NODE}: a latent of {len(data)} bytes is more than {self.connection.address.place} accepts; start it "
                "with a larger --max-upload-size."
            )
        stored = answer.json() if answer.status == 200 else {}
        if stored.get("name") != name:
            raise RemoteUnavailable(
                f"{NODE}: {self.connection.address.place} did not take the latent (answer {answer.status})."
            )
        return f"{name} [{stored.get('type', 'temp')}]"

    def submit(self, graph: dict, job: str) -> None:
        """Queue the graph under the id `job`, a UUID. Raises SlipstreamError when the server rejects it."""
        answer = self.connection.post(f"{self.prefix}/prompt", {"prompt": graph, "prompt_id": job}, SUBMIT_REPLY)
        if answer.status != 200:
            data = answer.json()
            raise SlipstreamError(rejected(self.connection, data.get("error"), data.get("node_errors")))

    def state(self, job: str) -> State:
        # A job moves from the queue to the history at one stroke, so history, queue, history cannot miss it.
        found = self._history(job)
        if found is not None:
            return found
        asked, known = self._queued.get(job, (0.0, None))
        if known is not None and time.monotonic() - asked < QUEUE_EVERY:
            return known
        queue = self._queue()
        if any(item[1] == job for item in queue["queue_running"]):
            known = State("running")
        elif any(item[1] == job for item in queue["queue_pending"]):
            number = next(item[0] for item in queue["queue_pending"] if item[1] == job)
            ahead = sum(item[0] < number for item in queue["queue_pending"]) + len(queue["queue_running"])
            known = State("queued", ahead)
        else:
            return self._history(job) or State("absent")
        self._queued[job] = time.monotonic(), known
        return known

    def _history(self, job: str) -> State | None:
        answer = self.connection.request("GET", f"{self.prefix}/history/{job}")
        entry = answer.json().get(job) if answer.status == 200 else None
        if entry is None:
            return None
        status = entry.get("status") or {}
        messages = [m for m in status.get("messages", []) if isinstance(m, list) and len(m) == 2]
        if any(kind == "execution_interrupted" for kind, _ in messages):
            return State("cancelled")
        for kind, data in messages:
            if kind == "execution_error":
                words = f"{data.get('node_type')}: {data.get('exception_message')}"
                return State("failed", message=self.connection.clean(words))
        if status.get("status_str", "success") != "success":
            return State("failed", message="it gave no reason")
        return State("done", outputs=entry.get("outputs") or {})

    def _queue(self) -> dict:
        data = self.connection.request("GET", f"{self.prefix}/queue").json()
        return {name: data.get(name) or [] for name in ("queue_running", "queue_pending")}

    def cancel(self, job: str) -> None:
        """Take the job out of the queue or stop it; never anybody else's."""
        answer = self.connection.post(f"{self.prefix}/jobs/{job}/cancel", {})
        if answer.status == 200:
            return
        for _ in range(5):  # older hosts: it may start to run between the two requests
            self.connection.post(f"{self.prefix}/queue", {"delete": [job]})
            queue = self._queue()
            if not any(item[1] == job for item in queue["queue_running"] + queue["queue_pending"]):
                return
            if any(item[1] == job for item in queue["queue_running"]):
                self.connection.post(f"{self.prefix}/interrupt", {"prompt_id": job})
                return

    def download(self, outputs: dict, node: str, name: str, limit: int) -> bytes:
        """The latent that `node` saved. name: folder/prefix; used where a repeated job left its outputs empty."""
        folder, prefix = name.split("/")
        usual = {"filename": f"{prefix}_00001_.latent", "subfolder": folder, "type": "output"}
        file = (outputs.get(node, {}).get("latents") or [usual])[0]
        values = {k: str(file.get(k, "")) for k in usual}
        answer = self.connection.request("GET", with_query(f"{self.prefix}/view", values), limit=limit)
        if answer.status != 200:
            raise RemoteUnavailable(f"{NODE}: {self.connection.address.place} no longer has the result of its job.")
        return answer.body


class Gateway:
    """Comfy API v2: the server gives the ids, so a label and an Idempotency-Key, both ours, find a job again."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self._ids: dict[str, str] = {}  # our id -> the server's

    def choices(self, node: str, name: str) -> None:
        """Not told by this dialect; the graph is checked when it is submitted."""

    def upload(self, name: str, data: bytes) -> dict:
        body, content_type = multipart({"file_path": f"input/{name}"}, "file", name, data)
        answer = self.connection.request("POST", "/api/v2/assets", body, content_type, timeout=SUBMIT_REPLY)
        stored = answer.json()
        if answer.status not in (200, 201) or "id" not in stored:
            raise SlipstreamError(rejected(self.connection, stored.get("error"), None))
        return {"__type": "core/ASSET", "info": {"id": stored["id"]}}

    def submit(self, graph: dict, job: str) -> None:
        body = {"workflow": graph, "metadata": job}
        answer = self.connection.post("/api/v2/jobs", body, SUBMIT_REPLY, {"Idempotency-Key": job})
        data = answer.json()
        if answer.status == 201:
            self._ids[job] = str(data["id"])
            return
        error = data.get("error") or {}
        if error.get("code") == "idempotency_key_reuse":
            raise NoAnswer("has the job already")
        raise SlipstreamError(rejected(self.connection, error, (error.get("details") or {}).get("node_errors")))

    def state(self, job: str) -> State:
        data = {}
        if self._find(job):
            answer = self.connection.request("GET", f"/api/v2/jobs/{self._ids[job]}")
            data = answer.json() if answer.status == 200 else {}
        kinds = {"succeeded": "done", "canceled": "cancelled", "canceling": "running", "failed": "failed"}
        kind = kinds.get(data.get("status"), data.get("status"))
        if kind not in ("queued", "running", "done", "failed", "cancelled"):
            return State("absent")
        error = data.get("error") or {}
        words = self.connection.clean(f"{error.get('class_type')}: {error.get('message')}") if error else ""
        outputs = {}
        for item in data.get("outputs") or []:
            outputs.setdefault(str(item.get("node_id")), []).append(item)
        return State(kind, max(0, int(data.get("queue_position") or 0)), words, outputs)

    def _find(self, job: str) -> bool:
        """Whether the server's id is known, by its answer to `submit` or, where that was lost, by the label."""
        if job not in self._ids:
            data = self.connection.request("GET", "/api/v2/jobs?limit=100").json()
            self._ids |= {j["metadata"]: str(j["id"]) for j in data.get("jobs") or [] if j.get("metadata") == job}
        return job in self._ids

    def cancel(self, job: str) -> None:
        if self._find(job):
            self.connection.post(f"/api/v2/jobs/{self._ids[job]}/cancel", {})

    def download(self, outputs: dict, node: str, name: str, limit: int) -> bytes:
        files = outputs.get(node) or []
        if not files:
            raise RemoteUnavailable(f"{NODE}: {self.connection.address.place} no longer has the result of its job.")
        # The link's own host is not trusted: only its path is used, on the server that was chosen.
        answer = self.connection.request("GET", path_of(str(files[0].get("url", ""))), limit=limit)
        if answer.status != 200:
            raise RemoteUnavailable(f"{NODE}: {self.connection.address.place} no longer has the result of its job.")
        return answer.body


def multipart(fields: dict[str, str], name: str, filename: str, data: bytes) -> tuple[bytes, str]:
    """(body, content type) of a form with one file."""
    mark = uuid.uuid4().hex
    head = [f'--{mark}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    head.append(
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return "".join(head).encode() + data + f"\r\n--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


def rejected(connection: Connection, error, node_errors) -> str:
    """One sentence from what the server says about a graph that it does not take."""
    words = []
    for node in (node_errors or {}).values():
        words += [
            f"{node.get('class_type')}: {e.get('message')} {e.get('details', '')}" for e in node.get("errors", [])
        ]
    if not words:
        words = [str(error.get("message") or error) if isinstance(error, dict) else str(error)]
    return f"{NODE}: {connection.address.place} does not take the job: {connection.clean('; '.join(words[:2]))}"


def understood(ask: Callable, place: str):
    """ask(); RemoteUnavailable where the answer is JSON of a shape that no ComfyUI sends."""
    try:
        return ask()
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise RemoteUnavailable(f"{NODE}: {place} answered in a form that no ComfyUI uses.") from error


def patiently(ask: Callable, seconds: float, pulse: Callable[[], None], place: str, wait: float = 0.3):
    """ask() until it answers; RemoteUnavailable when nothing came for so many seconds. For what may be asked twice."""
    since = time.monotonic()
    while True:
        try:
            return understood(ask, place)
        except NoAnswer as error:
            if time.monotonic() - since >= seconds:
                raise RemoteUnavailable(f"{NODE}: {place} does not answer ({error}).") from None
        pause(wait, pulse)
        wait = min(2 * wait, 2.0)


def pause(seconds: float, pulse: Callable[[], None]) -> None:
    """Sleep, but let pulse() raise meanwhile."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        pulse()
        time.sleep(min(left, 0.1))
    pulse()
