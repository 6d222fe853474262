"""`hf:owner/repo`, against a small server on this machine that answers as the Hugging Face Hub does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from helpers.checkpoints import (
    hydra_config,
    hydra_state,
    medusa_config,
    medusa_state,
    read_heads,
    tiny_base,
    write_checkpoint,
)
from helpers.hub_server import SHA, hub_environment, serve


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with me/medusa (also at revision v2, another number of heads), me/hydra, and me/gated."""
    folder = tmp_path_factory.mktemp("hub")
    write_checkpoint(folder / "me/medusa/main", medusa_state(3), medusa_config(3))
    write_checkpoint(folder / "me/medusa/v2", medusa_state(2), medusa_config(2))
    write_checkpoint(folder / "me/hydra/main", hydra_state(2), hydra_config(2))
    write_checkpoint(folder / "me/hydra/main", medusa_state(2), None)
    (folder / "me/empty/main").mkdir(parents=True)
    with serve(folder) as (url, asked):
        yield url, asked


RUN = """
import json, sys
from entmtp.convert import main
for args in json.loads(sys.argv[1]):
    print(main(args))
    print("end", file=sys.stderr)
"""


@pytest.fixture
def run(hub, tmp_path):
    """Convert each of some [source, option...]; returns exit code and stderr of each. (The library reads the
    endpoint when it is imported, hence another process.)"""

    def call(*commands, endpoint=hub[0], **env):
        base = tiny_base(tmp_path / "base.gguf")
        outs = [tmp_path / f"h{i}.gguf" for i in range(len(commands))]
        args = [
            [*command, "--base", str(base), "--outfile", str(out)]
            for command, out in zip(commands, outs, strict=True)
        ]
        env = {**hub_environment(endpoint, tmp_path / "cache"), **env}
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps(args)],
            capture_output=True,
            text=True,
            env=env,
            timeout=120,
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        codes = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
        errors = [part.strip() for part in done.stderr.split("end\n")[:-1]]
        for command, out, code, error in zip(commands, outs, codes, errors, strict=True):
            assert out.exists() == (code == 0)
            assert code == 0 or error.splitlines()[-1].startswith(f"error: {command[0]}: "), error
        return list(zip(codes, errors, strict=True))

    return call


def test_download(run, hub, tmp_path):
    assert [code for code, _ in run(["hf:me/medusa"], ["hf:me/medusa", "--revision", "v2"],
                                    ["hf:me/hydra/hydra_lm_head.pt"])] == [0, 0, 0]  # fmt: skip
    main_keys, v2_keys, hydra_keys = (read_heads(tmp_path / f"h{i}.gguf").keys for i in range(3))
    assert main_keys["general.name"] == "me/medusa"
    assert main_keys["general.license"] == "mit"
    assert main_keys["general.source.url"] == "https://huggingface.co/me/medusa"
    assert main_keys["medusa.predict_heads"] == 3
    assert any(path.startswith(f"/me/medusa/resolve/{SHA}/") for path, _ in hub[1]), "files of one commit"
    assert v2_keys["medusa.predict_heads"] == 2
    assert v2_keys["general.source.url"] == "https://huggingface.co/me/medusa/tree/v2"
    assert hydra_keys["general.architecture"] == "hydra"


def test_refusals(run):
    cases = {
        "hf:me/hydra": ([], "both Medusa and Hydra"),
        "hf:me/hydra/other.pt": ([], "has no file other.pt"),
        "hf:me/empty": ([], "no medusa_lm_head"),
        "hf:me/medusa": (["--revision", "v9"], "no such repository, revision or file"),
        "hf:me/nobody": ([], "no such repository, revision or file"),
        "hf:me/gated": ([], "refuses access"),
        "hf:medusa": ([], "hf:owner/repo"),
        "hf:/x": ([], "hf:owner/repo"),
        "hf:a/b c": ([], "hf:owner/repo"),
    }
    results = run(*([source, *more] for source, (more, _) in cases.items()))
    for (code, error), (_, words) in zip(results, cases.values(), strict=True):
        assert code == 1 and words in error, error


def test_token_of_the_environment_is_sent(run, hub):
    ((code, error),) = run(["hf:me/gated"], HF_TOKEN="secret")
    assert code == 1 and "no such repository" in error  # the gate is passed; there is nothing behind it
    assert "Bearer secret" in {token for path, token in hub[1] if "gated" in path}


def test_no_network(run):
    ((code, error),) = run(["hf:me/medusa"], endpoint="http://127.0.0.1:9")  # nobody listens
    assert code == 1 and "cannot be reached" in error and "give the folder" in error
