"""Where logits are reduced changes what is copied, never the tokens. On the CPU backend, with the graphs of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_lossless import GRAMMAR, decode

from entmtp import Llama
from entmtp.measure.methods import CONFIDENCE, ENTROPY, Method, generic
from entmtp.native.backends import backends
from helpers.policies import apply
from helpers.rpc import rpc_server
from helpers.settings import F32, prompts

TREE = generic("hydra")[2]
MODES = ("host", "rows", "device")

# what decides the next token, and whether the whole row is needed for it
CHAINS: dict[str, tuple[dict[str, Any], bool]] = {
    "greedy": ({"temp": 0.0}, False),
    "top-k": ({"temp": 0.8}, False),
    "top-k 64": ({"temp": 1.5, "top_k": 64, "top_p": 1.0, "min_p": 0.0}, False),
    "top-k 65": ({"temp": 0.8, "top_k": 65}, True),
    "no top-k": ({"temp": 0.8, "top_k": 0}, True),
    "penalties": ({"temp": 0.0, "repeat_penalty": 1.3}, True),
    "mirostat": ({"temp": 0.8, "mirostat_mode": 2}, True),
}


def answer(llm: Llama, text: str, n: int = 48, **sampling: Any) -> list[int]:
    llm.set_seed(11)
    return decode(llm, llm.tokenize(text.encode(), special=True), n, **sampling)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("heads", ["medusa", "hydra"])
def test_tokens_are_the_same(heads: str, chain: str, load: Callable[..., Llama]) -> None:
    sampling, whole_rows = CHAINS[chain]
    plain = load()
    models = {mode: load(heads=heads, outputs=mode) for mode in MODES}
    for llm in models.values():
        TREE.apply(llm)
    text = prompts("gsm8k")[3]
    expected = answer(plain, text, **sampling)
    for mode, llm in models.items():
        answer(llm, text, n=6, **sampling)  # the sampler chain is known after its first token
        llm.reset_draft_stats()
        assert answer(llm, text, **sampling) == expected, mode
        stats = llm.draft_stats
        assert stats.outputs.mode == mode
        # the prompt's row, and of every step those that were visited
        if mode == "host":
            assert stats.traffic.n_rows == stats.traffic.n_outputs
        elif mode == "rows" or whole_rows:
            assert stats.n_steps <= stats.traffic.n_rows <= len(expected) + 1
        else:
            assert stats.traffic.n_rows == 0, "a row was read whole that the chain did not need"


@pytest.mark.parametrize("method", [ENTROPY, CONFIDENCE], ids=lambda m: m.label)
def test_policies_choose_alike(method: Method, load: Callable[..., Llama]) -> None:
    """The entropy of a graph is that of the host, so near that text and trees agree, step by step."""
    plain = load()
    host, device = (load(heads="hydra", outputs=mode, adapt=False) for mode in ("host", "device"))
    for llm in (host, device):
        apply(method, llm)
        llm.reset_draft_stats()
        for text in prompts("humaneval")[:2]:
            assert answer(llm, text, temp=0.0) == answer(plain, text, temp=0.0)
    expected, steps = host.draft_stats.steps, device.draft_stats.steps
    np.testing.assert_allclose(steps["entropy"], expected["entropy"], rtol=1e-4, atol=1e-4)
    assert steps["n_nodes"].tolist() == expected["n_nodes"].tolist()
    assert steps["n_accepted"].tolist() == expected["n_accepted"].tolist()
    assert len(set(steps["n_nodes"])) > 1 and sum(steps["n_accepted"]) > 20, "nothing was chosen"
    assert device.draft_stats.traffic.n_rows == 0 < host.draft_stats.traffic.n_rows


@pytest.mark.parametrize("sampling", [{"temp": 0.0}, {"temp": 0.8}], ids=["greedy", "top-k"])
@pytest.mark.parametrize("heads", ["medusa", "hydra"])
def test_bytes_and_graphs_of_a_step(heads: str, sampling: dict[str, Any], load: Callable[..., Llama]) -> None:
    """O(nodes) bytes, no graph after the first steps, a bounded number of waits."""
    k = 1 if sampling["temp"] == 0.0 else 65
    llm = load(heads=heads, outputs="device", n_ctx=1000 + k)  # one that no other sampler was used with
    per_node = 4 * (2 * k + (2 if k == 1 else 1)) + 4 * k
    assert per_node < 4 * llm.n_vocab() / 16
    text = prompts("literature")[0]
    for method in generic("hydra")[1:4]:
        method.apply(llm)
        answer(llm, text, n=12, **sampling)
        llm.reset()
        walk = llm.generate(llm.tokenize(text.encode(), special=True), **sampling)
        for _ in range(12):
            next(walk)
        llm.reset_draft_stats()
        for _ in range(24):
            next(walk)
        stats, t = llm.draft_stats, llm.draft_stats.traffic
        walk.close()
        n_nodes = stats.n_steps + stats.n_drafted
        assert t.n_passes == stats.n_steps > 0 and t.n_outputs == n_nodes
        # a guess is a token; a level may give more guesses than the tree uses
        assert t.to_host <= (per_node + 64) * (n_nodes + 1), method.label
        assert t.to_device <= 4 * stats.n_steps  # the root
        assert t.on_device == 4 * llm.n_embd() * stats.n_steps  # the hidden state never visits the host
        assert t.n_graphs == t.n_draft_graphs == 0, method.label
        assert t.n_syncs <= 6 * stats.n_steps + 1


def test_logits_for_those_who_ask(load: Callable[..., Llama]) -> None:
    host, llm = load(heads="hydra", outputs="host"), load(heads="hydra", outputs="device")
    TREE.apply(llm)
    TREE.apply(host)
    seen: dict[str, list[Any]] = {}
    for name, model in (("host", host), ("device", llm)):

        def processor(ids: Any, scores: Any, name: str = name) -> Any:
            seen.setdefault(name, []).append(np.array(scores))
            return scores

        model.reset()
        prompt = model.tokenize(b"def add(a, b):")
        decode(model, prompt, 12, temp=0.0, logits_processor=[processor])
        seen[name].append(model._decoder.logits(model.n_vocab()).copy())
        seen[name].append(model._decoder.hidden().copy())
    for a, b in zip(seen["host"], seen["device"], strict=True):
        np.testing.assert_array_equal(a, b)


def test_grammars_see_whole_rows(load: Callable[..., Llama]) -> None:
    from llama_cpp import LlamaGrammar

    texts = []
    for mode in MODES:
        llm = load(heads="hydra", outputs=mode)
        TREE.apply(llm)
        llm.reset()
        grammar = LlamaGrammar.from_string(GRAMMAR, verbose=False)
        out = llm("A person as JSON: ", grammar=grammar, max_tokens=48, temperature=0.8, seed=4)
        texts.append(out["choices"][0]["text"])
    assert texts[0] == texts[1] == texts[2]


def test_logprobs_and_scores(load: Callable[..., Llama]) -> None:
    """With logits_all every row is on the host, whatever was asked for."""
    models = [load(heads="hydra", outputs=mode, logits_all=True, n_ctx=256) for mode in ("host", "device")]
    found = []
    for llm in models:
        assert llm.draft_stats.outputs.mode == "host"
        TREE.apply(llm)
        llm.reset()
        found.append(llm("2 + 2 =", max_tokens=8, temperature=0.0, logprobs=3)["choices"][0]["logprobs"])
    assert found[0] == found[1] and len(found[0]["token_logprobs"]) == 8


def test_typical_acceptance(load: Callable[..., Llama]) -> None:
    answers = []
    for mode in MODES:
        llm = load(heads="hydra", outputs=mode, accept="typical")
        TREE.apply(llm)
        answers.append(answer(llm, prompts("gsm8k")[0], temp=0.7))
    assert answers[0] == answers[1] == answers[2]


def test_a_device_with_memory_of_its_own(models: dict[str, Path]) -> None:
    """An RPC server is one that needs no hardware: nothing on it can be read in place."""
    if "RPC" not in backends():
        pytest.skip("this build has no RPC backend (GGML_RPC=ON)")
    with rpc_server() as (address, _):
        answers, traffic = [], {}
        for mode in ("host", "rows", "auto"):
            llm = Llama(
                models["f32"], draft="entmtp", heads=models["hydra"],
                **{**F32, "n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}, outputs=mode, rpc_servers=address,
            )  # fmt: skip
            with closing(llm):
                TREE.apply(llm)
                answer(llm, prompts("gsm8k")[0], n=8, temp=0.0)
                llm.reset_draft_stats()
                answers.append(answer(llm, prompts("gsm8k")[0], n=24, temp=0.0))
                stats = llm.draft_stats
                traffic[mode] = stats.traffic
                # a whole row, and one number of another: fetched
                answers.append(answer(llm, prompts("gsm8k")[0], n=12, temp=0.8, top_k=0))
                n_embd, n_vocab, n_nodes = llm.n_embd(), llm.n_vocab(), stats.n_steps + stats.n_drafted
        assert answers[0] == answers[2] == answers[4] and answers[1] == answers[3] == answers[5]
        assert stats.outputs.mode == "device" and not stats.outputs.note
        assert traffic["host"].to_host >= 4 * (n_vocab + n_embd) * n_nodes
        assert traffic["rows"].to_host >= 4 * n_vocab * stats.n_steps
        t = traffic["auto"]
        assert t.n_rows == 0 and t.to_host <= (20 + 64) * (n_nodes + 1)
        assert t.to_device <= 4 * stats.n_steps and t.on_device == 4 * n_embd * stats.n_steps


def test_mode_by_environment(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTMTP_OUTPUTS", "device")
    llm = Llama(models["q8_0"], n_ctx=64, n_threads=1, verbose=False)
    assert str(llm.draft_stats.outputs) == "CPU: logits are reduced on the device"
    llm.close()
    llm = Llama(models["q8_0"], n_ctx=64, n_threads=1, verbose=False, outputs="auto")
    assert llm.draft_stats.outputs.mode == "host"  # rows are in host memory already
    llm.close()
    monkeypatch.setenv("ENTMTP_OUTPUTS", "moon")
    with pytest.raises(ValueError, match="outputs is 'moon', must be one of auto, host, rows, device"):
        Llama(models["q8_0"], verbose=False)


def test_doctor_tells(models: dict[str, Path]) -> None:
    from entmtp.doctor import probes

    found = probes.model(["--model", str(models["q8_0"]), "--draft", "off", "--ctx", "64"])
    assert (
        found["outputs"] == "CPU: every row of logits is copied to the host" and found["outputs_note"] == ""
    )
