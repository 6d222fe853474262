"""The server's command line, its config file, and what it says when something is wrong."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from entmtp.serve.cli import setup_arg_parser, spelled
from entmtp.serve.metrics import Metrics
from entmtp.serve.model import Models
from entmtp.serve.settings import ModelSettings, from_options, read_config
from helpers.serving import Server, one_sentence, run

PROMPT = "It was a cold and windy night when"


def text_of(server: Server, model: str) -> tuple[str, str]:
    answer = server.client().completions.create(model=model, prompt=PROMPT, max_tokens=16, temperature=0)
    return answer.model, answer.choices[0].text


def plain(model: Path, **settings: Any) -> str:
    llm = llama_cpp.Llama(str(model), n_threads=1, n_threads_batch=1, verbose=False, **settings)
    text = llm(PROMPT, max_tokens=16, temperature=0, repeat_penalty=1.1)["choices"][0]["text"]
    llm.close()
    return str(text)


def test_no_arguments_serve_the_demo() -> None:
    with Server(key=None) as server:
        assert [m.id for m in server.client().models.list()] == ["demo"]
        assert text_of(server, "demo")[1]
        assert server.metrics()['entmtp_generated_tokens_total{model="demo"}'] == 16
        host = server.url.removeprefix("http://").partition(":")[0]
        assert host == "127.0.0.1"


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_config_file_with_two_models(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    exact = {"type_k": 0, "type_v": 0}
    one_thread = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}
    config = {
        "host": "127.0.0.1",
        "port": 0,
        "api_key": "sk-test",
        "models": [
            {"model": str(models["f32"]), "model_alias": "drafting", "heads": str(models["medusa"]),
             "draft": "static", "trees": "generic-medusa:n4", **exact, **one_thread},
            {"model": str(models["q8_0"]), "model_alias": "plain", "draft": "off", **one_thread},
        ],
    }  # fmt: skip
    path = tmp_path / f"models.{kind}"
    path.write_text(json.dumps(config))  # which is YAML, too
    with Server("--config-file", path, key=None) as server:
        server.key = "sk-test"
        assert [m.id for m in server.client().models.list()] == ["drafting", "plain"]
        first = text_of(server, "drafting")
        assert first == ("drafting", plain(models["f32"], n_ctx=256, **exact))
        assert text_of(server, "plain") == ("plain", plain(models["q8_0"], n_ctx=256))
        assert text_of(server, "drafting") == first
        metrics = server.metrics()
        assert metrics['entmtp_accepted_tokens_total{model="drafting"}'] > 0
        assert metrics['entmtp_drafted_tokens_total{model="plain"}'] == 0
        assert metrics['entmtp_generated_tokens_total{model="plain"}'] == 16


DRAFTING = {
    "draft": "static", "trees": "generic-hydra:n2", "score": "top1", "accept": "typical", "typical_epsilon": 0.0,
    "typical_alpha": 0.7, "adapt": False, "calibrate": False, "outputs": "rows", "kernels": "off",
}  # fmt: skip


def test_options_of_drafting(models: dict[str, Path], tmp_path: Path) -> None:
    """From the command line, in either spelling, and from a config file: the same settings, and a model with them."""
    own = {"model": str(models["q8_0"]), "heads": str(models["hydra"]), "n_ctx": 256, "n_threads": 1}
    path = tmp_path / "models.json"
    path.write_text(json.dumps({"models": [{**own, **DRAFTING, "logits_all": False}]}))
    _, [wanted] = read_config(str(path))
    assert {name: getattr(wanted, name) for name in DRAFTING} == DRAFTING
    words = ["--policy", "static", "--no-adapt", "--calibrate", "false", "--ctx=256", "--threads", "1"]
    words += [
        "--model",
        own["model"],
        "--heads",
        own["heads"],
        "--typical_alpha=0.7",
        "--logits-all",
        "false",
    ]
    for name in ("trees", "score", "accept", "typical_epsilon", "outputs", "kernels"):
        words += [f"--{name.replace('_', '-')}", str(DRAFTING[name])]
    _, [found] = from_options(vars(setup_arg_parser().parse_args(spelled(words))))
    assert found == wanted

    served = Models([found], Metrics())
    llm: Any = served()
    assert (llm.policy, llm.tree, llm.decoder.outputs.mode) == ("static", "n2", "rows")
    served.free()

    with Server(*words) as server:
        more = {"repeat_penalty": 1.0}
        server.client().completions.create(
            model="m", prompt=PROMPT, max_tokens=40, temperature=0.8, extra_body=more
        )
        label = f'{{model="{Path(own["model"]).stem}"}}'  # a path would tell of the machine
        metrics = server.until(lambda m: m[f"entmtp_generated_tokens_total{label}"] == 40)
    accepted, drafted = (metrics[f"entmtp_{kind}_tokens_total{label}"] for kind in ("accepted", "drafted"))
    # nothing is asked of a guess: every one is taken, but that of the last step, after the end
    assert accepted > 10 and drafted - accepted <= 1


def test_who_drafts_and_from_what(models: dict[str, Path], tmp_path: Path) -> None:
    """Options that make a value of a word themselves: as the other commands read them, or as a config file has them."""
    notes = tmp_path / "notes.md"
    notes.write_text(3 * PROMPT)
    words = ["--model", str(models["q8_0"]), "--drafters", "text,recycling", "--lookup", f"{notes},{notes}"]
    _, [found] = from_options(vars(setup_arg_parser().parse_args(spelled([*words, "--draft-vocab", "1024"]))))
    assert (found.drafters, found.lookup) == ("text,recycling", [str(notes), str(notes)])
    assert found.draft_vocab == 1024
    assert ModelSettings(model="m", drafters=["text"], draft_vocab=512).draft_vocab == 512
    served = Models([found], Metrics())
    llm: Any = served()
    assert llm.drafters == ("text", "recycling")
    assert llm.n_lookup > 10
    served.free()


def test_interrupting_is_still_there(models: dict[str, Path]) -> None:
    with Server(
        "--model", models["q8_0"], "--draft", "off", "--interrupt-requests", "true", "--threads", 1
    ) as server:
        asked = {"model": "m", "prompt": PROMPT, "temperature": 1.5}
        stream = server.client().completions.create(
            stream=True, max_tokens=900, extra_body={"min_tokens": 900}, **asked
        )
        next(stream)
        assert server.client().completions.create(max_tokens=4, **asked).choices[0].text
        assert len(list(stream)) < 899  # it ended early, as llama-cpp-python's server would have it


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "no-such.gguf"], "no-such.gguf: there is no such model file"),
        (["--draft-model", "prompt-lookup-decoding"], "draft_model: this server drafts from the text anyway"),
        (["--clip-model-path", "x.gguf"], "clip_model_path: this server reads no images yet"),
        (
            ["--draft", "sometimes"],
            "draft: input should be 'off', 'static', 'entropy', 'confidence', 'ladder'",
        ),
        (["--drafters", "nobody"], "drafters: 'nobody' is none of auto, text, recycling, heads, model"),
        (
            ["--draft-vocab", "5"],
            'draft_vocab is 5, must be "auto" or "all" or a number of tokens, 16 or more',
        ),
        (["--accept", "most"], "accept: input should be 'lossless' or 'typical'"),
        (["--typical-epsilon=-1"], "typical_epsilon: input should be greater than or equal to 0"),
        (["--draft", "off", "--no-adapt"], "--adapt: for drafting, but --draft is off"),
        (["--port", "99999"], "port: input should be less than or equal to 65535"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1 port 8000"),
        (["--trees", "no-such-bank"], "no-such-bank"),
        (["--config-file", "no-such.json"], "no-such.json: cannot read the config file"),
    ],
)
def test_mistakes_get_a_sentence(options: list[str], sentence: str) -> None:
    assert sentence in one_sentence(run(*options))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", "{", "JSON: EOF while parsing"),
        ("a.json", "{}", "names no models"),
        (
            "a.json",
            '{"models": [{"model": "m.gguf", "head": "h.gguf"}]}',
            "models.0.head: extra inputs are not",
        ),
        ("a.yaml", "models: [", "not YAML"),
    ],
)
def test_broken_config_files(name: str, content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    said = one_sentence(run("--config-file", path))
    assert sentence in said
    assert str(path) in said


def test_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}: address already in use" in one_sentence(
            run("--port", port)
        )


def test_missing_packages() -> None:
    code = "import sys; sys.modules['fastapi'] = None; from entmtp.serve import main; sys.exit(main([]))"
    said = one_sentence(run(code=code))
    assert "fastapi" in said
    assert "pip install 'entmtp[serve]'" in said


def test_help_teaches() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "example:\n  entmtp serve --model model.gguf --heads heads.gguf" in result.stdout
    assert "--n_gpu_layers" in result.stdout


def test_idle_server_ends_at_once(models: dict[str, Path]) -> None:
    with Server("--model", models["q8_0"], "--draft", "off") as server:
        assert server.stop(signal.SIGINT)[0] == 130
