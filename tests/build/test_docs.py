"""Every command in the docs is run.

In README.md and docs/*.md a fenced block `sh` holds commands. They run in a folder where the files that the docs speak
of are the bundled demo's, and `hf:` names are answered by a server on this machine. A block that cannot run there is
marked, with the reason: ```sh no-run: needs a GPU. What RULES names is left out everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from entmtp.cli import COMMANDS
from entmtp.models.assets import assets
from entmtp.serve.cli import spelled
from helpers.hub_server import hub_environment, serve
from helpers.rpc import rpc_server
from helpers.settings import prompts

if sys.platform == "win32":
    pytest.skip("the commands of the docs are for a POSIX shell", allow_module_level=True)

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# commands that are run elsewhere, and where
RULES = {
    r"make\b": "builds, as tests/build/test_build.py does",
    r"(CMAKE_ARGS=\S+|CMAKE_ARGS=\"[^\"]*\") pip install\b": "builds, as tests/build/test_build.py does",
    r"SKBUILD_WHEEL_CMAKE=false pip install\b": "installs a wheel, as tests/wheel/install.py does",
    r"pip install\b": "fetches packages",
    r"python native/llama_cpp.py\b": "builds, as tests/build/test_build.py does",
    r"(python -m entmtp\.|entmtp )serve\b": "runs until it is stopped, as tests of the server do",
    r"entmtp rpc-server\b": "runs until it is stopped, as in tests/decode/test_rpc.py",
    r"(python -m entmtp\.|entmtp )demo\b": "compares 13 methods for a minute; its parts are tested one by one",
}

# commands that are run with less to do
LESS = {
    r"(python -m entmtp\.|entmtp )tune\b": "--rounds 1 --tokens 24 --contexts 64 --sizes 2 4 --threads 1",
    r"(python -m entmtp\.|entmtp )bench\b": "--limit 1 --tokens 24 --threads 1",
}

DOCS_SERVER = (
    "127.0.0.1:8000"  # where `python -m entmtp.serve` listens; here a server is started on a free port
)


DOCS_RPC = ("192.168.1.7:50052", "192.168.1.8:50052")  # machines that help; here servers on this one


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    info: str
    text: str

    @property
    def commands(self) -> list[str]:
        """One string per command, as the shell would read it."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text("utf-8").splitlines()
    start = None
    for i, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            if start is None:
                start = i
            else:
                info = lines[start].strip().removeprefix("```").strip()
                yield Block(page, start + 1, info, "\n".join(lines[start + 1 : i]))
                start = None
    assert start is None, f"{page.name}: a block is not closed"


def runnable(block: Block) -> list[str]:
    """The block's commands without those that RULES leaves out, with LESS to do."""
    commands = [c.strip() for c in block.commands if not any(re.match(rule, c.strip()) for rule in RULES)]
    return [
        " ".join([c.partition("  #")[0], *(more for rule, more in LESS.items() if re.match(rule, c))])
        for c in commands
    ]


SH = [b for page in PAGES for b in blocks(page) if b.info.split(" ")[0] == "sh"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_say_what_they_are(page: Path) -> None:
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.info.split(" ")[0] not in ("bash", "shell", "console"), (
            f"{where}: commands are marked sh"
        )
        if block.info.startswith("sh "):
            assert re.fullmatch(r"sh no-run: \S.{5,}", block.info), (
                f"{where}: say why, as in 'sh no-run: needs a GPU'"
            )


@pytest.fixture(scope="module")
def workspace(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]
) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with the files that the docs speak of, and an environment with a hub."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("model.gguf", "vicuna-7b.gguf", "vicuna-7b-v1.3-q4_k_m.gguf"):
        (folder / name).symlink_to(models["q8_0"])
    (folder / "heads.gguf").symlink_to(models["hydra"])
    for name, task in (("my", "gsm8k"), ("prompts", "gsm8k"), ("code", "humaneval"), ("chat", "literature")):
        lines = (ROOT / "tests/prompts" / f"{task}.jsonl").read_text("utf-8").splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(lines[:2]) + "\n", "utf-8")
    (folder / "prompt.txt").write_text(prompts("humaneval")[0], "utf-8")
    (folder / "my.txt").write_text("\n".join(prompts("gsm8k")), "utf-8")
    shutil.copytree(assets() / "hydra", folder / "hydra-vicuna-7b")
    shutil.copytree(assets() / "medusa", folder / "hub/FasterDecoding/medusa-vicuna-7b-v1.3/main")
    with serve(folder / "hub") as (url, _):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        yield (
            folder,
            {**hub_environment(url, folder / "hf"), "PATH": path, "ENTMTP_CACHE": str(folder / "cache")},
        )


@pytest.fixture(scope="module")
def server(workspace: tuple[Path, dict[str, str]]) -> Iterator[Callable[[], str]]:
    """server(): address of the demo model behind entmtp.serve, started when it is first asked for."""
    folder, env = workspace
    running: list[subprocess.Popen[bytes]] = []
    address = ""

    def start() -> str:
        nonlocal address
        if not running:
            with socket.create_server(("127.0.0.1", 0)) as free:
                address = f"127.0.0.1:{free.getsockname()[1]}"
            port = address.rpartition(":")[2]
            command = [sys.executable, "-m", "entmtp.serve", "--port", port]
            log = folder / "serve.log"
            with log.open("wb") as file:
                running.append(subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=file))
            deadline = time.monotonic() + 120
            while True:
                assert time.monotonic() < deadline and running[0].poll() is None, log.read_text(
                    "utf-8", "replace"
                )
                try:
                    socket.create_connection(("127.0.0.1", int(port)), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.1)
        return address

    yield start
    for process in running:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize(
    "block", [b for b in SH if b.info == "sh" and runnable(b)], ids=lambda b: f"{b.page.name}:{b.line}"
)
def test_commands_run(
    block: Block, workspace: tuple[Path, dict[str, str]], server: Callable[[], str]
) -> None:
    folder, env = workspace
    script = "\n".join(runnable(block))
    with contextlib.ExitStack() as stack:
        for address in DOCS_RPC:
            if address in script:
                script = script.replace(address, stack.enter_context(rpc_server())[0])
        run_script(block, script, folder, env, server)


def run_script(
    block: Block, script: str, folder: Path, env: dict[str, str], server: Callable[[], str]
) -> None:
    if DOCS_SERVER in script:
        script = script.replace(DOCS_SERVER, server()).replace("curl ", "curl --fail-with-body ")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"


def commands_named(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Every `entmtp COMMAND` of a page, in blocks and in running text: where it stands, and its words."""
    found = [
        (f"{page.name}:{b.line}", c) for b in blocks(page) if b.info.split(" ")[0] == "sh" for c in b.commands
    ]
    prose = re.sub(r"```.*?```", lambda m: "\n" * m[0].count("\n"), page.read_text("utf-8"), flags=re.DOTALL)
    for span in re.finditer(r"`([^`]+)`", prose):
        found.append((f"{page.name}:{prose.count(chr(10), 0, span.start()) + 1}", " ".join(span[1].split())))
    for where, command in found:
        for part in re.split(r"\|\||&&|[|;]|\$\(", command):
            words = part.partition("  #")[0].split()
            if "entmtp" in words[:2]:  # behind VARIABLE=value
                yield where, words[words.index("entmtp") + 1 :]


def options_of(words: list[str]) -> set[str]:
    """The options of a command, as `entmtp COMMAND --help` has them; for bench, of its subcommand."""
    parser = import_module(f"entmtp.{COMMANDS[words[0]].module}").setup_arg_parser()
    if words[0] == "bench":
        (sub,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        if words[1:] and not words[1].startswith("-"):
            assert words[1] in sub.choices, f"there is no entmtp bench {words[1]}"
            parser = sub.choices[words[1]]
    return set(parser._option_string_actions)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_options_are_those_of_today(page: Path) -> None:
    """Also where a block is not run. Old spellings go on working, but no page teaches them."""
    for where, words in commands_named(page):
        if not words or words[0] in ("COMMAND", "-h", "--help", "--version"):
            continue
        assert words[0] in COMMANDS, f"{where}: there is no entmtp {words[0]}"
        if words[1:2] == ["…"]:
            continue
        given = [w.partition("=")[0] for w in words[1:] if re.match(r"--?[a-zA-Z]", w)]
        given = spelled(given) if words[0] == "serve" else given
        unknown = set(given) - options_of(words)
        assert not unknown, f"{where}: entmtp {words[0]} has no {unknown}"
    for block in blocks(page):
        assert "python -m entmtp." not in block.text, f"{page.name}:{block.line}: say entmtp COMMAND"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_layout_page_has_every_room() -> None:
    """Rooms in the table, and in the picture those that hold code, but for doors that only lead to another name."""
    text = (ROOT / "docs" / "layout.md").read_text("utf-8")
    picture = " ".join(re.findall(r'\["(.*?)"\]', text))
    rooms = {p.name for p in (ROOT / "python" / "entmtp").iterdir() if not p.name.startswith(("_", "."))}
    for room in rooms | {"convert", "trees"}:
        name = room.removesuffix(".py")
        assert f"`{room}" in text or f"entmtp.{name}`" in text, f"docs/layout.md does not say what {room} is"
        if name not in ("assets", "trees", "py.typed", "cache", "heads_study", "kernels"):
            assert re.search(rf"\b{name}\b", picture), f"the picture in docs/layout.md has no {name}"


def test_the_api_page_is_current() -> None:
    command = [sys.executable, "docs/make_api.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
