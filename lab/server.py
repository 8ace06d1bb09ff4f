"""The real ComfyUI server with this pack and the demo nodes, in a folder of its own.

python -m lab.server [--port 8188] [--base-directory DIR] [ComfyUI arguments]     COMFYUI_PATH names the checkout
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / ".dev" / "base"


def prepare_base(base: Path = BASE) -> Path:
    """A ComfyUI base directory whose custom nodes are links to this checkout and to `demo/`."""
    packs = base / "custom_nodes"
    packs.mkdir(parents=True, exist_ok=True)
    for name, target in (("ComfyUI-Slipstream", ROOT), ("slipstream_demo", ROOT / "demo")):
        link = packs / name
        if link.is_symlink() and link.resolve() != target:
            link.unlink()
        if not link.exists():
            link.symlink_to(target, target_is_directory=True)
    return base


def host_path() -> Path:
    return Path(os.environ["COMFYUI_PATH"]).resolve()


def arguments(base: Path, port: int) -> list[str]:
    """What the host's main.py is given: no network, no database file, everything below `base`."""
    import torch

    options = ["--base-directory", str(base), "--port", str(port), "--disable-api-nodes"]
    options += ["--database-url", "sqlite:///:memory:", "--preview-method", "none"]
    return options if torch.cuda.is_available() else ["--cpu", *options]


def serve(extra: list[str]) -> None:
    """Become the server: runs the host's main.py in this process."""
    from lab.boot import register_torchvision_schemas

    register_torchvision_schemas()
    port = int(extra.pop(extra.index("--port") + 1)) if "--port" in extra else 8188
    base = Path(extra.pop(extra.index("--base-directory") + 1)) if "--base-directory" in extra else BASE
    extra = [e for e in extra if e not in ("--port", "--base-directory")]
    host = host_path()
    sys.argv = [str(host / "main.py"), *arguments(prepare_base(base), port), *extra]
    sys.path[:] = [str(host), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    os.chdir(host)
    runpy.run_path(sys.argv[0], run_name="__main__")


class Server:
    """The same server as a child process: `with Server(log) as url`, ready when entered, gone when left."""

    def __init__(self, log: Path, timeout: float = 240.0, base: Path | None = None):
        # A folder of its own: servers that share one write over each other's numbered outputs.
        self.scratch = None if base else tempfile.TemporaryDirectory(prefix="slipstream-", ignore_cleanup_errors=True)
        self.base = base or Path(self.scratch.name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.timeout = timeout

    def __enter__(self) -> str:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "lab.server", "--port", str(self.port)]
            command += ["--base-directory", str(self.base)]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(self.url + "/system_stats", timeout=5).close()
                return self.url
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        self.__exit__()
        raise RuntimeError(f"ComfyUI did not start; the last lines of {self.log}:\n{self.tail()}")

    def __exit__(self, *exception) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.scratch:
            self.scratch.cleanup()

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


if __name__ == "__main__":
    serve(sys.argv[1:])
