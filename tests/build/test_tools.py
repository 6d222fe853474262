"""native/tools.txt pins the tools of the build, and the Makefile installs nothing else to build with."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pip
import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "native" / "tools.txt"

needs_make = pytest.mark.skipif(
    not shutil.which("make") or sys.platform == "win32", reason="make is not installed"
)


def pinned() -> dict[str, tuple[Requirement, list[str]]]:
    """What tools.txt names: requirements and their SHA-256."""
    text = TOOLS.read_text("utf-8").replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        requirement, *hashes = re.split(r"\s--hash=sha256:", line.partition("#")[0].strip())
        if requirement:
            found[Requirement(requirement).name] = (Requirement(requirement), [h.strip() for h in hashes])
    return found


def test_tools_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    tools = {r.name: r for r in map(Requirement, project["dependency-groups"]["tools"])}
    # make's build and pip's own take the same backend
    assert {str(Requirement(r)) for r in project["build-system"]["requires"]} <= {*map(str, tools.values())}
    found = pinned()
    assert set(tools) <= set(found)
    for name, (requirement, hashes) in found.items():
        (exact,) = requirement.specifier
        assert exact.operator == "=="
        assert hashes and all(re.fullmatch("[0-9a-f]{64}", h) for h in hashes), name
        assert name not in tools or tools[name].specifier.contains(exact.version), name


def test_tools_name_no_place_to_fetch_from():
    text = TOOLS.read_text("utf-8")
    assert "/" not in text
    assert not re.search(r"^\s*--(?!hash=sha256:)", text, re.MULTILINE)


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """The wheel of a tool."""
    wheel = tmp_path / "wheels" / "hammer-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "hammer-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("hammer.py", "")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hammer\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(
            f"{info}/RECORD", f"hammer.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )
    return wheel


@pytest.fixture
def make(tmp_path: Path, tool: Path):
    """make(*arguments) of the repository's Makefile, in an environment of its own, without a network."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(venv)}))
    (site / "pip.pth").write_text(f"{Path(pip.__file__).parents[1]}\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE"))}
        env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tool.parent)}
        command = ["make", "-C", str(ROOT), f"VENV={venv}", f"TOOLS={tmp_path / 'tools.txt'}", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    run.stamp, run.installed = venv / ".tools", site / "hammer.py"  # type: ignore[attr-defined]
    return run


@needs_make
def test_make_installs_what_the_file_names(make, tool, tmp_path):
    digest = hashlib.sha256(tool.read_bytes()).hexdigest()
    (tmp_path / "tools.txt").write_text(f"hammer==1.0 --hash=sha256:{digest}\n")
    done = make(str(make.stamp))
    assert done.returncode == 0, done.stderr
    assert make.installed.exists()
    assert make.stamp.exists()


@needs_make
@pytest.mark.parametrize("line", ["hammer==1.0 --hash=sha256:" + 64 * "0", "hammer==1.0"])
def test_make_refuses_other_files(make, tmp_path, line):
    """Another SHA-256, and none."""
    (tmp_path / "tools.txt").write_text(line + "\n")
    done = make(str(make.stamp))
    assert done.returncode != 0
    assert "the tools of the build were not installed" in done.stdout
    assert "make bump-tools" in done.stdout
    assert "do not match the hashes" in done.stderr.lower() or "Hashes are required" in done.stderr
    assert not make.installed.exists()
    assert not make.stamp.exists()


@needs_make
def test_a_wheel_is_built_with_nothing_else(make, tmp_path):
    (tmp_path / "tools.txt").write_text("")
    done = make("--dry-run", "wheel")
    assert done.returncode == 0, done.stderr
    installs = [line for line in done.stdout.splitlines() if "pip" in line and " install " in line]
    assert len(installs) == 1
    assert f"--require-hashes -r {tmp_path / 'tools.txt'}" in installs[0]
    (wheel,) = (line for line in done.stdout.splitlines() if " wheel " in line)
    assert "--no-build-isolation --no-deps" in wheel


def test_the_makefile_takes_the_file_of_the_repository():
    assert re.search(r"^TOOLS\s*\?= native/tools\.txt$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
