"""`hf:` names of models and heads, through the real huggingface-hub, against a server on this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from entmtp.convert import convert
from helpers.checkpoints import medusa_config, medusa_state, tiny_base, write_checkpoint
from helpers.hub_server import SHA, hub_environment, serve

RUN = """
import json, sys
from entmtp.common.errors import ModelError
from entmtp.models import resolve
for name, kind in json.loads(sys.argv[1]):
    said = []
    try:
        print(json.dumps({"path": str(resolve(name, kind, said.append)), "said": said}))
    except ModelError as e:
        print(json.dumps({"error": str(e)}))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "base.gguf")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Any]:
    """me/one: a model; me/many: three and a projector; me/split: three parts and a lost one; me/both: with heads."""
    folder = tmp_path_factory.mktemp("hub")

    def put(*names: str) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(base, folder / name)

    put("me/one/main/one-Q8_0.gguf", "me/one/v2/two-Q8_0.gguf", "me/gated/main/m.gguf")
    put("me/many/main/m-Q4_0.gguf", "me/many/main/m-Q8_0.gguf", "me/many/main/deep/m-f16.gguf")
    put("me/many/main/mmproj-f16.gguf", "me/broken/main/m-damaged.gguf")
    put(*(f"me/split/main/m-{i:05}-of-00003.gguf" for i in (1, 2, 3)), "me/split/main/n-00002-of-00002.gguf")
    put("me/both/main/m.gguf")
    put("me/none/main/README.md")
    heads = folder / "me/both/main/m-medusa-heads.gguf"
    convert(
        write_checkpoint(folder / "checkpoint", medusa_state(2), medusa_config(2)),
        base,
        heads,
        progress=False,
    )
    with serve(folder) as (url, asked):
        yield url, asked


@pytest.fixture
def resolve(hub: Any, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Resolve some names, in a process of its own (the library reads its environment when it is imported)."""

    def call(*names: str | tuple[str, str], endpoint: str = hub[0], **env: str) -> list[dict[str, Any]]:
        pairs = [n if isinstance(n, tuple) else (n, "model") for n in names]
        environment = {
            **hub_environment(endpoint, tmp_path / "hf"), "ENTMTP_CACHE": str(tmp_path / "cache"), **env,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps(pairs)],
            capture_output=True, text=True, env=environment, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and not done.stderr, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return call


def test_a_model_by_name(resolve: Any, base: Path, hub: Any) -> None:
    names = [
        "hf:me/one",
        "hf:me/one/one-Q8_0.gguf",
        "hf:me/one/q8_0",
        "hf:me/one@v2",
        "hf:me/many/deep/m-f16.gguf",
    ]
    found = [Path(r["path"]) for r in resolve(*names)]
    assert [p.name for p in found] == ["one-Q8_0.gguf"] * 3 + ["two-Q8_0.gguf", "m-f16.gguf"]
    assert all(p.read_bytes() == base.read_bytes() for p in found)
    downloads = [p for p, _ in hub[1] if "/me/one/resolve" in p and "one-Q8" in p]
    assert downloads, "the server was asked"


def test_a_file_is_downloaded_and_compared_once(resolve: Any, tmp_path: Path) -> None:
    (first,) = resolve("hf:me/one")
    marks = list((tmp_path / "cache/checked").iterdir())
    assert len(marks) == 1
    blob = Path(first["path"]).resolve()
    before = blob.stat().st_mtime_ns
    assert resolve("hf:me/one") == [first]
    assert blob.stat().st_mtime_ns == before


def test_several_match(resolve: Any) -> None:
    (result,) = resolve("hf:me/many")
    lines = result["error"].splitlines()
    assert "3 GGUF files match" in lines[0] and "hf:me/many/deep/m-f16.gguf" in lines[0]
    assert [line.strip() for line in lines[1:]] == ["deep/m-f16.gguf", "m-Q4_0.gguf", "m-Q8_0.gguf"]


def test_split_files_count_as_one(resolve: Any) -> None:
    by_name, by_part, listed, lost = resolve(
        "hf:me/split/m-", "hf:me/split/m-00002-of-00003.gguf", "hf:me/split", "hf:me/split/n-"
    )
    for result in (by_name, by_part):
        first = Path(result["path"])
        assert first.name == "m-00001-of-00003.gguf"
        assert all((first.parent / f"m-0000{i}-of-00003.gguf").is_file() for i in (1, 2, 3))
    assert "m-00001-of-00003.gguf (3 parts)" in listed["error"]
    assert "n-00001-of-00002.gguf is missing, one of 2 parts" in lost["error"]


def test_heads_and_model_in_one_repository(resolve: Any) -> None:
    model, heads = resolve("hf:me/both", ("hf:me/both", "heads"))
    assert Path(model["path"]).name == "m.gguf"
    assert Path(heads["path"]).name == "m-medusa-heads.gguf"


def test_refusals(resolve: Any) -> None:
    cases = {
        "hf:me/nobody": "no such repository, revision or file",
        "hf:me/one@v9": "no such repository, revision or file",
        "hf:me/one/q4_k": "no GGUF file of me/one matches q4_k; there are",
        "hf:me/none": "has no GGUF file",
        "hf:me/gated": "refuses access",
        "hf:me": "hf:owner/repo[/file][@revision]",
        "hf:me/one@": "hf:owner/repo[/file][@revision]",
        "hf:a b/c": "hf:owner/repo",
        "no/such.gguf": "there is no such model file",
    }
    for (name, words), result in zip(cases.items(), resolve(*cases), strict=True):
        assert result["error"].startswith(f"{name}: ") and words in result["error"], result


def test_token_of_the_environment(resolve: Any) -> None:
    (result,) = resolve("hf:me/gated", HF_TOKEN="secret")
    assert Path(result["path"]).name == "m.gguf"


def test_damaged_on_the_way(resolve: Any) -> None:
    (result,) = resolve("hf:me/broken")
    assert "does not have the checksum" in result["error"] and "; delete " in result["error"]


def test_damaged_on_disk(resolve: Any, base: Path) -> None:
    (first,) = resolve("hf:me/one")
    blob = Path(first["path"]).resolve()
    blob.write_bytes(base.read_bytes()[:-1] + b"x")
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        (result,) = resolve("hf:me/one", **env)
        assert "does not have the checksum" in result["error"]
    mend = result["error"].split("; delete ")[1].split(" and run again")[0]
    Path(mend).unlink()
    assert resolve("hf:me/one") == [first]
    assert blob.read_bytes() == base.read_bytes()


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no network"])
def test_offline(resolve: Any, how: str) -> None:
    first = resolve("hf:me/one", "hf:me/one@v2", "hf:me/split/m-")
    away = {"HF_HUB_OFFLINE": "1"} if how == "HF_HUB_OFFLINE" else {"endpoint": "http://127.0.0.1:9"}
    names = ["hf:me/one", "hf:me/one@v2", "hf:me/split/m-", f"hf:me/one@{SHA}"]
    *again, by_commit = resolve(*names, **away)
    assert [r["path"] for r in again] == [r["path"] for r in first]
    assert by_commit["path"] == first[0]["path"]
    reason = "HF_HUB_OFFLINE is set" if how == "HF_HUB_OFFLINE" else "cannot be reached"
    assert all(len(r["said"]) == 1 and reason in r["said"][0] for r in again)
    missing, unknown = resolve("hf:me/many", "hf:me/one/other", **away)
    assert reason in missing["error"] and "not downloaded before" in missing["error"]
    assert "matches other" in unknown["error"] and "only files downloaded before" in unknown["error"]


def test_the_converter_takes_a_base_by_name(hub: Any, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", medusa_state(2), medusa_config(2))
    env = {**hub_environment(hub[0], tmp_path / "hf"), "ENTMTP_CACHE": str(tmp_path / "cache")}
    for base, code, words in (
        ("hf:me/one", 0, ""),
        ("hf:me/many", 1, "error: hf:me/many: 3 GGUF files match"),
    ):
        out = tmp_path / f"{code}.gguf"
        command = [
            sys.executable, "-m", "entmtp", "convert", str(checkpoint), "--base", base, "--outfile", str(out),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
        assert done.returncode == code and done.stderr.startswith(words), done.stderr
        assert out.exists() == (code == 0)


LLAMA = """
import sys
from entmtp import Llama
llm = Llama(sys.argv[1], draft="entmtp", heads=sys.argv[2] or None, verbose=False, calibrate=False, n_ctx=64)
print(llm.model_path)
print(llm.heads_path)
"""


@pytest.mark.parametrize("heads", ["hf:me/demo/medusa-heads.gguf", ""])
def test_llama_by_name(models: dict[str, Path], tmp_path: Path, heads: str) -> None:
    """Heads named, and heads found beside the model in the cache."""
    repo = tmp_path / "hub/me/demo/main"
    repo.mkdir(parents=True)
    shutil.copy(models["q8_0"], repo / "demo.gguf")
    shutil.copy(models["medusa"], repo / "medusa-heads.gguf")
    with serve(tmp_path / "hub") as (url, _):
        env = {**hub_environment(url, tmp_path / "hf"), "ENTMTP_CACHE": str(tmp_path / "cache")}
        if not heads:
            fetch = "from entmtp.models import resolve; resolve('hf:me/demo/medusa-heads.gguf', 'heads')"
            subprocess.run([sys.executable, "-c", fetch], env=env, check=True, timeout=120)
        done = subprocess.run(
            [sys.executable, "-c", LLAMA, "hf:me/demo/demo.gguf", heads],
            capture_output=True, text=True, env=env, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model_path, heads_path = done.stdout.splitlines()[-2:]
    assert Path(model_path).name == "demo.gguf"
    assert Path(heads_path).name == "medusa-heads.gguf"
    assert Path(heads_path).is_relative_to(tmp_path / "hf")
