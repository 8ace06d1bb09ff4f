"""Every ComfyUI release under this checkout: the smoke set in each, and the table of what came out.

    python dev.py hosts --repo PATH [--from 0.3.75] [--only VERSION ...]

PATH is a clone of ComfyUI, with or without a work tree. A release is a tag vX.Y.Z or, where the clone lacks it, the
commit that sets the version. Writes bench/out/hosts.json and the table in docs/compatibility.md.

One environment serves them all, that of the newest release: thirty would take a hundred gigabytes. What a release asks
for otherwise (in practice the exact versions of comfy-kitchen and comfy-aimdo) lies in a folder of its own, which comes
first on the path.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kernels.files import write_whole

from .smoke import CHECKS

ROOT = Path(__file__).resolve().parents[2]
FLOOR = "0.3.75"
OUT, PAGE = ROOT / "bench" / "out" / "hosts.json", ROOT / "docs" / "compatibility.md"
OPEN, CLOSE = "<!-- hosts -->", "<!-- /hosts -->"
VERSION_FILE = "comfyui_version.py"
TIMEOUT = 1200  # seconds for one release; a quiet core needs about 20
# Only a server with a browser needs these, and the smoke set starts none.
NOT_NEEDED = {"comfyui-frontend-package", "comfyui-workflow-templates", "comfyui-embedded-docs", "comfyui-manager"}
NOT_NEEDED |= {"torch", "torchvision", "torchaudio", "comfy-angle", "kornia", "spandrel", "pyopengl"}
NOT_NEEDED |= {"pyopengl-accelerate", "glfw"}

# Prints those requirement lines, given as a JSON list, that the environment does not meet.
UNMET = """
import importlib.metadata as have, json, sys
from packaging.requirements import Requirement
def met(line):
    wanted = Requirement(line)
    if wanted.marker is not None and not wanted.marker.evaluate():
        return True
    try:
        return wanted.specifier.contains(have.version(wanted.name), prereleases=True)
    except have.PackageNotFoundError:
        return False
print(json.dumps([line for line in json.loads(sys.argv[1]) if not met(line)]))
"""


class HostsError(Exception):
    """What stands in the way, in one sentence."""


@dataclass(frozen=True)
class Release:
    """One release: its version, its commit, and the day of that commit (YYYY-MM-DD)."""

    version: str
    commit: str
    date: str


@dataclass(frozen=True)
class Clone:
    """A local clone of ComfyUI; nothing is fetched and nothing in it is changed."""

    path: Path

    def git(self, *arguments: str, data: bytes | None = None) -> bytes:
        # A clone may leave large files at its origin; without this git would ask there.
        variables = {**os.environ, "GIT_NO_LAZY_FETCH": "1"}
        done = subprocess.run(["git", "-C", self.path, *arguments], input=data, capture_output=True, env=variables)
        if done.returncode:
            raise HostsError(
                f"git {arguments[0]} in {self.path} failed: {done.stderr.decode(errors='replace').strip()}"
            )
        return done.stdout

    def text(self, *arguments: str) -> str:
        return self.git(*arguments).decode("utf-8", "replace")

    def releases(self, first: str = FLOOR) -> list[Release]:
        """All releases from `first` on, oldest first; the tag where there is one, else the commit of the version."""
        found: dict[str, Release] = {}
        line = r"__version__\s*=\s*[\"']([\d.]+)[\"']"
        for entry in reversed(self.text("log", "--format=%H %cs", "--", VERSION_FILE).split("\n")):
            commit, _, date = entry.partition(" ")
            version = re.search(line, self.text("show", f"{commit}:{VERSION_FILE}")) if commit else None
            if version:
                found.setdefault(version[1], Release(version[1], commit, date))
        for tag in self.text("tag", "--list", "v[0-9]*").split():
            if re.fullmatch(r"v\d+(\.\d+)+", tag):
                commit, date = self.text("log", "-1", "--format=%H %cs", tag).split()
                found[tag[1:]] = Release(tag[1:], commit, date)
        kept = [release for release in found.values() if key(release.version) >= key(first)]
        if not kept:
            raise HostsError(f"{self.path} holds no ComfyUI release from {first} on; is it a full clone of ComfyUI?")
        return sorted(kept, key=lambda release: key(release.version))

    def unpack(self, release: Release, folder: Path) -> Path:
        """The release's files below `folder`; files whose contents the clone lacks are left out."""
        stamp = folder / ".unpacked"
        if stamp.exists() and stamp.read_text() == release.commit:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        entries = [line.split("\t") for line in self.text("ls-tree", "-r", "--full-tree", release.commit).splitlines()]
        objects = "\n".join(head.split()[2] for head, _ in entries) + "\n"
        there = self.git("cat-file", "--batch-check", data=objects.encode()).decode().splitlines()
        lacking = [name for (_, name), line in zip(entries, there, strict=True) if line.endswith("missing")]
        with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
            chosen = [".", *(f":(exclude,top,literal){name}" for name in lacking)]
            archive.write(self.git("archive", "--format=tar", release.commit, "--", *chosen))
            archive.flush()
            with tarfile.open(archive.name) as files:
                files.extractall(folder, filter="data")
        stamp.write_text(release.commit)
        return folder


def key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def run(arguments: list[str], environment: Callable, folder: Path, out: Path = OUT, page: Path = PAGE) -> int:
    """The command. environment: makes what dev.py's `Environment` is for a checkout; folder: where releases lie."""
    parser = argparse.ArgumentParser(prog="python dev.py hosts", description=__doc__.split("\n")[0])
    parser.add_argument("--repo", type=Path, required=True, help="a local clone of ComfyUI")
    parser.add_argument("--from", dest="first", default=FLOOR, help=f"the first release ({FLOOR})")
    parser.add_argument("--only", nargs="+", metavar="VERSION", help="these releases alone; the table keeps the others")
    options = parser.parse_args(arguments)
    clone = Clone(options.repo.expanduser().resolve())
    releases = clone.releases(options.first)
    chosen = [release for release in releases if not options.only or release.version in options.only]
    unknown = set(options.only or ()) - {release.version for release in chosen}
    if unknown:
        known = ", ".join(release.version for release in releases)
        raise HostsError(f"there is no release {', '.join(sorted(unknown))} in {clone.path}; it has {known}.")
    shared = environment(clone.unpack(releases[-1], folder / releases[-1].version))
    shared.prepare()
    rows = {row["version"]: row for row in (json.loads(out.read_text()) if out.exists() else ())}
    for release in reversed(chosen):
        row = rows[release.version] = measure(release, clone.unpack(release, folder / release.version), shared)
        failed = [name for name, check in row["checks"].items() if not check["passed"]]
        print(
            f"{release.version:8} {release.date}  {', '.join(failed) or 'passed'}  {row['seconds']:.0f} s", flush=True
        )
        kept = sorted(rows.values(), key=lambda row: key(row["version"]))
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, (json.dumps(kept, indent=1) + "\n").encode())
        write_section(page, section(kept))
    return int(any(not c["passed"] for release in chosen for c in rows[release.version]["checks"].values()))


def measure(release: Release, checkout: Path, shared) -> dict:
    """Run the smoke set in one release; a row of the table."""
    extra = overlay(checkout, shared)
    path = os.pathsep.join(filter(None, [str(extra) if extra else "", os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "smoke.json"
        command = [shared.executable, "-m", "bench.survival.smoke", "--out", str(results)]
        variables = {**os.environ, "COMFYUI_PATH": str(checkout), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=TIMEOUT)
            said = (done.stdout + done.stderr).strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        except subprocess.TimeoutExpired:
            said = [f"not done after {TIMEOUT} s"]
        if results.exists():
            checks = json.loads(results.read_text(encoding="utf-8"))
        else:
            checks = {"start": {"passed": False, "seconds": 0.0, "says": said[0]}}
    return {
        "version": release.version,
        "date": release.date,
        "commit": release.commit,
        "packages": sorted(path.name for path in extra.glob("*.dist-info")) if extra else [],
        "checks": checks,
        "seconds": round(sum(check["seconds"] for check in checks.values()), 1),
    }


def overlay(checkout: Path, shared) -> Path | None:
    """A folder with what this release asks for and the shared environment has not; None where nothing is missing."""
    lines = [line.split("#")[0].strip() for line in (checkout / "requirements.txt").read_text().splitlines()]
    lines = [line for line in lines if line and re.split(r"[\s<>=!~;\[]", line)[0].lower() not in NOT_NEEDED]
    found = subprocess.run(
        [shared.executable, "-c", UNMET, json.dumps(lines)], capture_output=True, text=True, check=True
    )
    missing = json.loads(found.stdout)
    if not missing:
        return None
    name = hashlib.sha256("\n".join(sorted(missing)).encode()).hexdigest()[:8]
    folder = checkout.parent / f"packages-{name}"
    if not folder.exists():
        partial = folder.with_name(folder.name + ".part")
        shutil.rmtree(partial, ignore_errors=True)
        options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--target", str(partial)]
        subprocess.run([shared.executable, "-m", "pip", "install", *options, *missing], check=True)
        partial.rename(folder)
    return folder


def section(rows: list[dict]) -> str:
    """The table, from the rows alone."""
    names = ["start", *CHECKS]
    failing = [row for row in rows if not all(check["passed"] for check in row["checks"].values())]
    passed = len(rows) - len(failing)
    lines = [
        "## ComfyUI releases",
        "",
        f"{passed} of {len(rows)} releases from {rows[0]['version']} ({rows[0]['date']}) to {rows[-1]['version']} "
        f"({rows[-1]['date']}) pass all {len(names)} checks. Written by `python dev.py hosts --repo PATH`, which takes "
        "every release out of a local clone of ComfyUI and runs the smoke set (`bench/survival/smoke.py`) in it: the "
        "pack goes through that release's own loader, the nodes get their defaults, the small trained models are "
        "sampled by its KSampler. The packages are those of the newest release, but comfy-kitchen and comfy-aimdo in "
        "the versions a release names. A clone without tags lacks the patch releases made on branches of their own; "
        "they are left "
        "out. Dates are those of the release's commit; seconds are one core's, the start of the host included.",
        "",
        "| check | what has to hold |",
        "| --- | --- |",
        "| start | the host and the pack come up |",
        *(f"| {name} | {check.__doc__.split(chr(10))[0]} |" for name, check in CHECKS.items()),
        "",
        "| release | date | " + " | ".join(names) + " | seconds |",
        "| --- | --- |" + " --- |" * (len(names) + 1),
    ]
    for row in reversed(rows):
        marks = [mark(row["checks"].get(name)) for name in names]
        lines.append(f"| {row['version']} | {row['date']} | {' | '.join(marks)} | {row['seconds']:.0f} |")
    if failing:
        lines += ["", "What failed:", ""]
    for row in reversed(failing):
        said = [f"{name}: {check['says']}" for name, check in row["checks"].items() if not check["passed"]]
        lines.append(f"- {row['version']}: {'; '.join(said)}")
    return "\n".join(lines)


def mark(check: dict | None) -> str:
    return "not run" if check is None else "yes" if check["passed"] else "**no**"


def write_section(page: Path, text: str) -> None:
    """Replace what stands between our two marks in the page, and nothing else; the marks are added where missing."""
    old = page.read_text(encoding="utf-8") if page.exists() else "# Compatibility\n"
    if OPEN not in old or CLOSE not in old:
        old = f"{old.rstrip()}\n\n{OPEN}\n{CLOSE}\n"
    before, rest = old.split(OPEN, 1)
    after = rest.split(CLOSE, 1)[1]
    write_whole(page, f"{before}{OPEN}\n{text}\n{CLOSE}{after}".encode())


if __name__ == "__main__":
    sys.exit("Use `python dev.py hosts --repo PATH`.")
