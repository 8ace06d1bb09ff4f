"""`python dev.py hosts`: releases are found in any clone, run in turn, and the table says what happened."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench.survival import hosts
from bench.survival.smoke import CHECKS

# Stands in the place of the smoke set: passes or fails by what lies in the release's checkout.
SMOKE = """
import json, os, sys
from pathlib import Path
host = Path(os.environ["COMFYUI_PATH"])
if (host / "broken_start").exists():
    sys.exit("ImportError: no module of that name")
checks = {name: {"passed": name != (host / "fails").read_text(), "seconds": 1.0, "says": "so"} for name in NAMES}
Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps(checks))
"""


def git(folder, *arguments):
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


def commit(folder, version, fails="", **files):
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    (folder / "requirements.txt").write_text("pytest>=1\ncomfyui-frontend-package==0.0.1\n# comment\n")
    for name, text in {"fails": fails, **files}.items():
        (folder / name).write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-m", version)


@pytest.fixture
def clone(tmp_path):
    """A repository with a release before the floor, two untagged ones, and a tagged patch beside the main line."""
    folder = tmp_path / "clone"
    folder.mkdir()
    git(folder, "init", "-b", "main")
    commit(folder, "0.3.9")
    commit(folder, "0.3.75")
    git(folder, "checkout", "-b", "patch")
    commit(folder, "0.3.77", fails="LoRA")
    git(folder, "tag", "v0.3.77")
    git(folder, "checkout", "main")
    commit(folder, "0.10.0")
    (folder / "later.py").write_text("after the release\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-m", "work goes on")
    return folder


class Environment:
    """What dev.py makes for a checkout; here the Python of this test, with a module in the smoke set's place."""

    def __init__(self, checkout):
        self.checkout, self.executable = checkout, sys.executable

    def prepare(self):
        assert (self.checkout / "comfyui_version.py").exists()


@pytest.fixture
def command(clone, tmp_path, monkeypatch):
    """Runs the command and returns (exit code, rows, page)."""
    fake = tmp_path / "root" / "bench" / "survival"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake.parent / "__init__.py").touch()
    (fake / "smoke.py").write_text(f"NAMES = {['start', *CHECKS]}\n{SMOKE}")
    monkeypatch.setattr(hosts, "ROOT", fake.parent.parent)
    out, page = tmp_path / "out" / "hosts.json", tmp_path / "page.md"

    def run(*arguments, text=None):
        if text is not None:
            page.write_text(text)
        code = hosts.run(["--repo", str(clone), *arguments], Environment, tmp_path / "hosts", out, page)
        return code, {row["version"]: row for row in json.loads(out.read_text())}, page.read_text()

    return run


def test_every_release_is_run_in_its_own_checkout_and_told_in_the_table(command, tmp_path):
    code, rows, page = command(text="# Compatibility\n\nabove\n\n<!-- hosts -->\nformer\n<!-- /hosts -->\n\nbelow\n")
    assert list(rows) == ["0.3.75", "0.3.77", "0.10.0"] and code == 1  # by number, from the floor on; a tag counts
    assert [n for n, c in rows["0.3.77"]["checks"].items() if not c["passed"]] == ["LoRA"]
    assert not (tmp_path / "hosts" / "0.10.0" / "later.py").exists()
    assert "2 of 3 releases" in page and "- 0.3.77: LoRA: so" in page and page.count("**no**") == 1
    assert page.startswith("# Compatibility\n\nabove\n") and page.endswith("\nbelow\n") and "former" not in page


def test_one_release_again_keeps_the_others_and_what_does_not_start_is_a_row(command, clone):
    command()
    commit(clone, "0.11.0", broken_start="")
    code, rows, page = command("--only", "0.11.0")
    assert list(rows) == ["0.3.75", "0.3.77", "0.10.0", "0.11.0"] and code == 1
    assert rows["0.11.0"]["checks"]["start"]["says"] == "ImportError: no module of that name"
    assert "not run" in page and page.count("<!-- hosts -->") == 1


def test_what_the_clone_lacks_is_left_out_and_what_is_not_there_is_said(command, clone, tmp_path):
    """A partial clone leaves large files at its origin; none of them is fetched."""
    (clone / "large").write_text("large file")
    commit(clone, "0.12.0")
    name = subprocess.run(
        ["git", "-C", clone, "rev-parse", "HEAD:large"], capture_output=True, text=True
    ).stdout.strip()
    (clone / ".git" / "objects" / name[:2] / name[2:]).unlink()
    _, rows, _ = command("--only", "0.12.0")
    assert rows["0.12.0"]["checks"]["start"]["passed"]
    assert not (tmp_path / "hosts" / "0.12.0" / "large").exists()
    with pytest.raises(hosts.HostsError, match=r"there is no release 9\.9 .* it has 0\.3\.75"):
        command("--only", "9.9")
    with pytest.raises(hosts.HostsError, match="holds no ComfyUI release from 99"):
        command("--from", "99")


def test_packages_that_the_shared_environment_lacks_get_a_folder(tmp_path, monkeypatch):
    """Exact versions of a release come before the shared ones; lines that only a browser needs are passed over."""
    checkout = tmp_path / "1.0"
    checkout.mkdir()
    lines = "pytest>=1\npytest==0.0.1  # other\nno-such-package-of-ours\ntorch==0.1\nx; python_version < '3'\n"
    (checkout / "requirements.txt").write_text(lines)
    asked = []
    true_run = subprocess.run

    def run(command, **options):
        if "pip" not in command:
            return true_run(command, **options)
        asked.extend(command[command.index("--target") + 2 :])
        (tmp_path / f"{next(c for c in command if c.endswith('.part'))}").mkdir()

    monkeypatch.setattr(hosts.subprocess, "run", run)
    folder = hosts.overlay(checkout, Environment(checkout))
    assert asked == ["pytest==0.0.1", "no-such-package-of-ours"] and folder.parent == tmp_path
    assert hosts.overlay(checkout, Environment(checkout)) == folder and len(asked) == 2  # made once
