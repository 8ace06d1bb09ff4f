"""Security: what the registry forbids is not in the pack, files and routes get nowhere they should not, and a token
stays between this machine and the server it is for."""

from __future__ import annotations

import ast
import asyncio
import base64
import json
import logging
import os
import pickle
import re
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from shipped import ROOT, shipped, tree
from slipstream.engine.errors import SlipstreamError
from slipstream.host.canvas import strip
from slipstream.host.profiles import embedding as sharing
from slipstream.host.profiles import folder as profiles
from slipstream.host.quantise import load as quant_load
from slipstream.host.quantise import save as quant_files
from slipstream.host.remote import segment as remote
from slipstream.host.remote.graph import Part, RemoteModel
from slipstream.host.remote.http import HOSTS_VARIABLE, TOKEN_VARIABLE
from slipstream.host.remote.segment import Here, RemoteSegment, sample_latent
from slipstream.host.switch import pruned

SOURCES = [name for name in shipped() if name.endswith(".py")]

# Modules that start programs, load code out of data, or speak to others; who may use one, and what for.
FORBIDDEN = {
    "subprocess", "multiprocessing", "pty", "ctypes", "cffi", "pickle", "cPickle", "dill", "marshal", "shelve",
    "joblib", "cloudpickle", "code", "codeop", "runpy", "pip", "ensurepip", "venv", "socket", "socketserver",
    "requests", "httpx", "urllib", "http", "ssl", "ftplib", "smtplib", "telnetlib", "paramiko", "websocket",
    "websockets", "webbrowser", "base64", "codecs", "zlib", "zipimport", "binascii", "builtins", "winreg", "getpass",
    "keyring",
}  # fmt: skip
ALLOWED = {
    "host/remote/http.py": {"urllib", "http", "ssl"},  # the client of another ComfyUI server: allowed hosts only
    "host/profiles/embedding.py": {"base64"},  # a profile inside a workflow's JSON
}
CALLS = {
    "eval", "exec", "compile", "__import__", "execfile", "input", "breakpoint", "system", "popen", "Popen", "execv",
    "execve", "execvp", "spawnl", "spawnv", "posix_spawn", "startfile", "fork", "putenv", "unsetenv", "urlretrieve",
    "check_output", "check_call", "create_subprocess_exec", "create_subprocess_shell", "ClientSession", "load_module",
    "exec_module", "spec_from_file_location", "chmod", "rmtree", "setattr_static", "print",
}  # fmt: skip


def called(node: ast.Call) -> tuple[str, str]:
    """(name, what it is called on, "" for a bare name) of a call."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr, ast.unparse(node.func.value)
    return getattr(node.func, "id", ""), ""


def faults(name: str) -> list[str]:
    """What a scanner of the registry would point at in one file."""
    found: list[str] = []

    def fault(node, what: str) -> None:
        found.append(f"{name}:{node.lineno} {what}")

    for node in ast.walk(tree(ROOT / name)):
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for top in {n.split(".")[0] for n in names} & FORBIDDEN - ALLOWED.get(name, set()):
                fault(node, f"imports {top}")
        elif isinstance(node, ast.Call):
            what, on = called(node)
            model = what == "eval" and on and not node.args  # a network set to inference
            if what in CALLS and not model and (what, on) != ("compile", "re"):
                fault(node, f"calls {on}.{what}")
            if what == "load" and on in ("torch", "np", "numpy", "yaml", "joblib"):
                fault(node, f"calls {on}.load")
            if what == "load_torch_file" and not any(k.arg == "safe_load" for k in node.keywords):
                fault(node, "loads a file of tensors without safe_load")
            if what == "import_module" and not _known_module(node):
                fault(node, "imports a module by a name that is not written here")
            if what in ("getattr", "vars", "globals") and "__builtins__" in ast.unparse(node):
                fault(node, "reaches for builtins")
            if what in ("setdefault", "update", "pop", "clear") and on == "os.environ":
                fault(node, "changes the environment")
        elif isinstance(node, ast.Assign | ast.Delete | ast.AugAssign):
            targets = getattr(node, "targets", None) or [node.target]
            if any(ast.unparse(t).startswith(("os.environ[", "sys.modules[", "sys.path")) for t in targets):
                fault(node, "changes the environment or the modules")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            if re.search(r"(^|[\s'\"(=])(/(home|root|tmp|usr|etc|var|mnt|opt|Users)/|[A-Za-z]:\\)", text):
                fault(node, "has an absolute path")
            if re.search(r"[A-Za-z0-9+/=]{120,}|(\\x[0-9a-f]{2}){20,}", text):
                fault(node, "has a blob")
    longest = max(map(len, (ROOT / name).read_text(encoding="utf-8").splitlines()), default=0)
    if longest > 160:
        found.append(f"{name} has a line of {longest} characters")
    return found


def _known_module(node: ast.Call) -> bool:
    """`import_module("name")`, or a file of the pack's own folder by its number in a table."""
    first = node.args[0]
    return isinstance(first, ast.Constant) or (
        isinstance(first, ast.JoinedStr) and ast.unparse(first).startswith("f'.")
    )


def test_no_file_has_what_the_registry_forbids():
    assert len(SOURCES) > 50 and not [fault for name in SOURCES for fault in faults(name)]


def test_who_may_do_what_others_may_not_is_there():
    assert not [name for name in ALLOWED if not (ROOT / name).is_file()]


def test_the_scan_finds_what_it_is_for(tmp_path, monkeypatch):
    wrong = [
        "eval('1')", "exec(x)", "compile(x, '', 'exec')", "__import__('os')", "import pickle",
        "from subprocess import run", "import os\nos.system('x')", "import torch\ntorch.load('x')", "import socket",
        "from urllib.request import urlopen", "import os\nos.environ['A'] = '1'",
        "import importlib\nimportlib.import_module(x)", "p = '/home/me/x'", "p = 'C:\\\\x'", f"b = '{'QUJD' * 40}'",
        "import base64", "getattr(__builtins__, 'ev' + 'al')", "import comfy.utils\ncomfy.utils.load_torch_file(p)",
        "import sys\nsys.path += ['x']", "import pip",
    ]  # fmt: skip
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for i, source in enumerate(wrong):
        (tmp_path / f"{i}.py").write_text(source + "\n")
        assert faults(f"{i}.py"), source
    (tmp_path / "good.py").write_text("import re\nre.compile('x')\nmodel.eval()\nimportlib.import_module('.a', 'b')\n")
    assert not faults("good.py")


def test_importing_a_file_computes_nothing():
    """Module bodies hold definitions and tables: no loop, no `with`, no bare call; the one that has to is named."""
    allowed = {("kernels/interpret.py", "If"), ("kernels/implementations.py", "If")}
    for name in SOURCES:
        for node in tree(ROOT / name).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            wrong = isinstance(node, ast.For | ast.While | ast.With) or (isinstance(node, ast.Expr) and not docstring)
            assert not wrong or (name, type(node).__name__) in allowed, f"{name}:{node.lineno} {ast.unparse(node)[:80]}"


def test_the_canvas_scripts_run_no_text_as_code_and_ask_only_this_server():
    for name in (n for n in shipped() if n.endswith(".js")):
        text = (ROOT / name).read_text(encoding="utf-8")
        forbidden = (
            r"\beval\s*\(|new Function|innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|importScripts"
        )
        assert not re.search(forbidden, text), name
        assert not re.search(r"\bfetch\s*\(|XMLHttpRequest|WebSocket|sendBeacon|localStorage|document\.cookie", text), (
            name
        )
        assert set(re.findall(r"https?://[^\"'`\s]+", text)) <= {"http://www.w3.org/2000/svg"}, name
        for source in re.findall(r"^import .* from [\"'](.+)[\"']", text, re.MULTILINE):
            assert source.startswith(("/scripts/", "../../scripts/", "./")), f"{name} imports {source}"


# Files

ESCAPES = [
    "../x", "..\\x", "a/../../x", "/x", "\\x", "C:x", "C:\\x", "//server/share", "~/x", "..", ".", "", " ", ".hidden",
    "x\0y", "x\n", "x:stream", "con", "NUL", "nul.safetensors", "Com1", "lpt9.x", "aux ", "COM\u00b9",
    "\uff43\uff4f\uff4e", "a\u2215b", "\uff0e\uff0e\uff0fx", "\u2025/x", "a\u202eb", "x" * 200, "x?y", "x*y", "x|y",
    "$HOME", "%TEMP%", "`id`", "x;y", "-x",
]  # fmt: skip


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The host's model folders inside tmp_path/models; a secret file beside them."""
    for name in (profiles.FOLDER, "diffusion_models"):
        (tmp_path / "models" / name).mkdir(parents=True)
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, name, ([str(tmp_path / "models" / name)], {".safetensors"})
        )
        folder_paths.filename_list_cache.pop(name, None)
    yield tmp_path
    for name in (profiles.FOLDER, "diffusion_models"):
        folder_paths.filename_list_cache.pop(name, None)


def test_h78_no_name_of_a_file_to_write_leads_out_of_its_folder(folders):
    before = sorted(folders.rglob("*"))
    for name in ESCAPES:
        assert profiles.file_name(name) is None, repr(name)
        with pytest.raises(SlipstreamError, match="no file name"):
            profiles.save(name, None)
        with pytest.raises(SlipstreamError, match="not restored"):
            sharing.restore(name, base64.b64encode(b"x").decode())
        with pytest.raises(SlipstreamError, match="no file name"):
            quant_files.target(name, "Save Quantized Model")
    assert sorted(folders.rglob("*")) == before
    for name in ("my profile", "Flux 20 Schritte", "\u65e5\u672c", "a.b", "console", "v1.0+cfg-3", "com10", "nullable"):
        assert profiles.file_name(name) == f"{name}.safetensors"
    base = (folders / "models" / "diffusion_models").resolve()
    assert quant_files.target("sub/x", "n")[1].resolve().is_relative_to(base)


def test_h78_no_name_of_a_file_to_read_leads_out_of_its_folder(folders):
    (folders / "secret.safetensors").write_bytes(b"secret")
    outside = [
        "../../secret.safetensors",
        "../secret.safetensors",
        str(folders / "secret.safetensors"),
        "..\\..\\secret",
    ]
    for name in [*outside, "x\0.safetensors", "CON"]:
        for load in (profiles.load, pruned.load, quant_load.load):
            try:
                load(name)
            except SlipstreamError as error:
                assert "secret\n" not in str(error)
            except ValueError as error:  # the host's own answer to a NUL
                assert "null" in str(error)
            else:
                pytest.fail(f"{load} read {name}")
        assert sharing.packed(name) is None


def test_a_link_in_the_place_of_a_profile_is_replaced_and_not_written_through(folders):
    from slipstream.kernels.files import write_whole

    target, link = folders / "precious", folders / "models" / profiles.FOLDER / "x.safetensors"
    target.write_text("precious")
    link.symlink_to(target)
    write_whole(link, b"new")
    assert target.read_text() == "precious" and link.read_bytes() == b"new" and not link.is_symlink()


class Bomb:
    """What a pickle can do: run code while it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_h78_a_pickle_under_a_models_name_runs_no_code(folders, tmp_path):
    marker = tmp_path / "it ran"
    import io

    whole = io.BytesIO()
    torch.save({"x": Bomb(marker)}, whole)
    for data in (pickle.dumps(Bomb(marker)), whole.getvalue()):
        for folder, load in (
            (profiles.FOLDER, profiles.load),
            ("diffusion_models", quant_load.load),
            ("diffusion_models", pruned.load),
        ):
            (folders / "models" / folder / "bomb.safetensors").write_bytes(data)
            folder_paths.filename_list_cache.pop(folder, None)
            with pytest.raises(SlipstreamError):
                load("bomb.safetensors")
        with pytest.raises(SlipstreamError):
            sharing.restore("bomb2", base64.b64encode(data).decode())
    assert not marker.exists()


# Routes


class Server:
    """As much of the host's server as routes need."""

    def __init__(self):
        self.routes, self.on_prompt_handlers = web.RouteTableDef(), []
        self.add_on_prompt_handler = self.on_prompt_handlers.append
        self.prompt_queue = SimpleNamespace(get_current_queue=lambda: ([], []))


def routed(monkeypatch) -> web.Application:
    server = Server()
    monkeypatch.setattr(sharing, "server_of_host", lambda: server)
    sharing.register()
    application = web.Application(client_max_size=1 << 26)
    application.add_routes(server.routes)
    return application


DEEP = "[" * 100_000
SENT = [
    b"", b"\xff\xfe", b"null", b"[]", b"5", b'"x"', b"{", b"{}", DEEP.encode(), b'{"a":' * 50_000, b'{"client": 5}',
    b"NaN", b'{"client": {"a": 1}, "workflow": [1]}', b'{"workflow": "__proto__"}', b'{"name": null, "data": null}',
    b'{"name": "../x", "data": "AA=="}', b'{"name": "CON", "data": "AA=="}', b'{"name": 1, "data": 2}',
    json.dumps({"client": "x" * (1 << 20)}).encode(), json.dumps({"name": "x", "data": "A" * (9 << 20)}).encode(),
]  # fmt: skip


def test_routes_answer_anything_with_json_and_keep_nothing_of_it(monkeypatch, folders):
    """Types, sizes, nesting: 200, 400 or 404, always JSON, no headers that let other origins read it."""
    kept = strip.Strips()
    monkeypatch.setattr(strip, "STRIPS", kept)

    async def talk():
        statuses = set()
        async with TestClient(TestServer(routed(monkeypatch))) as client:
            for body in SENT:
                for route in (strip.ROUTE, sharing.ROUTE):
                    for kind in ("application/json", "text/plain"):
                        answer = await client.post(route, data=body, headers={"Content-Type": kind, "Origin": "null"})
                        assert answer.content_type == "application/json", (body[:40], await answer.text())
                        await answer.json()
                        statuses.add(answer.status)
                        assert not [h for h in answer.headers if h.lower().startswith("access-control")]
            for name in ("..%2f..%2fsecret", "%00", "con", "%E2%80%AE", "a" * 500, "..%5c..%5cx", "%2e%2e"):
                answer = await client.get(f"{sharing.ROUTE}/{name}")
                assert answer.status in (400, 404), name
            for method in ("put", "delete", "patch"):
                assert (await getattr(client, method)(strip.ROUTE)).status == 405
        return statuses

    assert asyncio.run(talk()) == {200, 400}
    assert not list((folders / "models").rglob("*.safetensors"))
    assert sum(map(len, kept._pages)) < 64 * 200 + 1


# The remote client

SECRET = "tok/en+4711=sesame"
FORMS = (SECRET, "tok%2Fen%2B4711%3Dsesame", "tok/en%2B4711%3Dsesame", base64.b64encode(SECRET.encode()).decode())


class Parrot:
    """A server that repeats the token wherever an answer has a place for it, `way` by `way`."""

    def __init__(self):
        parrot = self
        self.way, self.hosts = "", []

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                parrot.hosts.append((self.headers.get("Host"), self.headers.get("Authorization")))
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, reason, headers, body = parrot.answer(self.path)
                self.send_response(status, reason)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = answer

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str) -> tuple[int, str, dict, bytes]:
        good = {
            "system_stats": {"system": {"comfyui_version": "1"}}, "queue": {"queue_running": [], "queue_pending": []},
            "object_info": {}, "history": {}, "upload": {"name": SECRET, "type": SECRET},
        }  # fmt: skip
        kind = next((k for k in good if k in path), "")
        body = good.get(kind, {"error": SECRET, "node_errors": {SECRET: {"class_type": SECRET}}})
        wrong = {
            "reason": (401, f"no {SECRET}", {}, b"{}"),
            "body 400": (400, "Bad", {}, json.dumps({"error": {"message": SECRET}}).encode()),
            "body 500": (500, SECRET, {}, SECRET.encode()),
            "redirect": (302, SECRET, {"Location": f"https://evil.example/{SECRET}?token={SECRET}"}, b""),
            "redirect host": (307, "x", {"Location": f"https://{SECRET}@{SECRET.replace('/', '.')}.example"}, b""),
            "redirect quoted": (308, "x", {"Location": f"https://{FORMS[1]}/x"}, b""),
            "no json": (200, "OK", {}, SECRET.encode()),
            "list": (200, "OK", {}, json.dumps([SECRET]).encode()),
            "deep": (200, "OK", {}, DEEP.encode()),
            "length": (200, "OK", {"Content-Length": "5", "X": SECRET}, b"{}"),
            "no length": (200, "OK", {"Content-Length": "x" + SECRET}, b"{}"),
            "shape": (200, "OK", {}, json.dumps({"system": SECRET, "queue_running": [[SECRET]], "status": 5}).encode()),
        }
        if self.way in wrong:
            return wrong[self.way]
        if self.way == "choices" and "object_info" in path:
            node = path.rpartition("/")[2]
            inputs = {name: [[SECRET, SECRET + "x"]] for name in ("unet_name", "ckpt_name", "clip_name")}
            return 200, "OK", {}, json.dumps({node: {"input": {"required": inputs}}}).encode()
        if self.way == "odd choices" and "object_info" in path:
            return 200, "OK", {}, json.dumps({path.rpartition("/")[2]: {"input": [SECRET]}}).encode()
        return 200, "OK", {}, json.dumps(body).encode()


WAYS = ["reason", "body 400", "body 500", "redirect", "redirect host", "redirect quoted", "no json", "list", "deep",
        "length", "no length", "shape", "choices", "odd choices", "upload"]  # fmt: skip


@pytest.fixture(scope="module")
def parrot():
    server = Parrot()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "ABSENT", 0.0)
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    monkeypatch.setattr(remote, "GRACE", 0.0)
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    monkeypatch.setenv(HOSTS_VARIABLE, "127.0.0.1")


@pytest.mark.parametrize("way", WAYS)
def test_h78_a_server_that_repeats_the_token_gets_it_shown_nowhere(parrot, quick, caplog, capsys, way):
    """Not in the sentence, its repr, its traceback, the log, what the node says meanwhile, or a workflow's settings."""
    caplog.set_level(logging.DEBUG)
    parrot.way = way
    parrot.hosts.clear()
    part = Part("a", "b", 1.0, "euler", (1.0, 0.5, 0.0), 1, True)
    segment, said = RemoteSegment(parrot.url, RemoteModel("x.safetensors")), []
    try:
        sample_latent(
            segment, {"samples": torch.zeros(1, 4, 8, 8)}, part, Here(), lambda text, share: said.append(text)
        )
    except SlipstreamError as error:
        said += [str(error), repr(error), "".join(traceback.format_exception(error)), json.dumps(error.args)]
    else:
        pytest.fail("a parrot is no ComfyUI")
    said += [caplog.text, *capsys.readouterr(), repr(segment), json.dumps(said)]
    shown = [(form, text) for text in said for form in FORMS if form in text]
    assert not shown
    # and it went to nobody else
    assert {host for host, _ in parrot.hosts} == {parrot.url.removeprefix("http://")}
    assert {token for _, token in parrot.hosts} == {f"Bearer {SECRET}"}


def test_an_endless_answer_ends_at_the_limit(quick):
    from slipstream.host.remote.http import Connection, RemoteUnavailable, locate

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                pass

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        connection = Connection(locate(f"http://127.0.0.1:{server.server_port}"))
        with pytest.raises(RemoteUnavailable, match="more than 1000000 bytes"):
            connection.request("GET", "/", limit=1_000_000)
    finally:
        server.shutdown()
        server.server_close()
