"""llama.cpp's own programs as methods: names and options; and, once `make baselines` built them, their answers."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

import entmtp
from entmtp.bench import cli
from entmtp.common.errors import EntmtpError, UsageError
from entmtp.measure import baselines
from entmtp.measure.baselines import KINDS, baseline, find
from entmtp.measure.compare import Comparison
from entmtp.measure.foreign import Driver, Server
from entmtp.measure.turns import Answer, Prompt, decode
from entmtp.native import kernels
from helpers.eagle3 import write_eagle3
from helpers.models import model_path
from helpers.nextn import with_nextn
from helpers.settings import N_THREADS, has_amx, prompts

built = pytest.mark.skipif(baselines.missing() is not None, reason=str(baselines.missing()))


def test_names() -> None:
    assert baseline("EntMTP") is None and baseline("llama-cpp-python") is None
    found = [
        baseline(f"llama.cpp {name}") for name in ("server", "plain", "server, ngram-mod 8", "ngram-simple")
    ]
    assert [b and b[1:] for b in found] == [
        (True, None, None), (False, None, None), (True, "ngram-mod", 8), (False, "ngram-simple", None)
    ]  # fmt: skip
    for wrong in (
        "llama.cpp",
        "llama.cpp server, plain",
        "llama.cpp plain 3",
        "llama.cpp ngram",
        "llama.cpp ngram-mod 0",
    ):
        with pytest.raises(UsageError, match="there is no method llama"):
            baseline(wrong)


def options(label: str, draft_model: str | None = None) -> list[str]:
    found = baseline(label)
    assert found is not None
    return found.options(draft_model)


def test_options() -> None:
    assert options("llama.cpp server") == options("llama.cpp plain") == []
    assert options("llama.cpp ngram-simple") == ["--spec-type", "ngram-simple"]
    assert options("llama.cpp ngram-mod 8")[2:] == [
        "--spec-ngram-mod-n-max",
        "8",
        "--spec-ngram-mod-n-min",
        "1",
    ]
    for n, key in ((4, "4"), (30, "12")):
        assert options(f"llama.cpp ngram-simple {n}")[3::2] == [str(n), key]
    assert options("llama.cpp draft-simple 3", "small.gguf")[2:] == [
        "--spec-draft-model", "small.gguf", "--spec-draft-n-max", "3"
    ]  # fmt: skip
    with pytest.raises(UsageError, match="give --draft-model"):
        options("llama.cpp server, draft-eagle3")
    with pytest.raises(UsageError, match="leave the number out"):
        options("llama.cpp ngram-cache 4")


def test_what_was_not_built_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTMTP_CACHE", str(tmp_path))
    with pytest.raises(EntmtpError, match="build it with `make baselines`"):
        find(baselines.SERVER)


def test_what_was_built_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the key of the llama.cpp that runs here."""
    monkeypatch.setattr(baselines, "cache_folder", lambda: tmp_path)
    folder = tmp_path / "baselines" / str(baselines.build_info()["key"])
    folder.mkdir(parents=True)
    (folder / "llama-server").touch()
    assert find("llama-server") == folder / "llama-server"
    assert "entmtp-speculative, which" in str(baselines.missing())
    (folder / "entmtp-speculative.exe").touch()
    assert find("entmtp-speculative").name == "entmtp-speculative.exe" and baselines.missing() is None


def test_tokens_per_pass_of_programs_without_statistics() -> None:
    foreign = Answer(list(range(21)), 2.0, None, [], 10)
    ours = Answer(list(range(21)), 1.0)
    found = Comparison([{"a": foreign, "b": ours}])
    assert found.row("a", "b")["tokens_per_step"] == pytest.approx(2.0)
    assert "tokens_per_step" not in found.row("b", "a")


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> Iterator[entmtp.Llama]:
    threads = {"n_threads": N_THREADS, "n_threads_batch": N_THREADS}
    with closing(entmtp.Llama(models["q8_0"], n_ctx=1024, **threads, verbose=False)) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(plain: entmtp.Llama) -> list[tuple[Prompt, list[int]]]:
    """Prompts that say everything twice, so that there is something to draft from, and our plain loop's answers."""
    asked = [
        Prompt(plain.tokenize((text + text[:-40]).encode(), special=True), 48, temp, seed=3)
        for text in prompts("humaneval")[:2] for temp in (0.0, 0.8)
    ]  # fmt: skip
    return [(prompt, decode(plain, prompt).tokens) for prompt in asked]


@built
@pytest.mark.parametrize(
    "kind",
    ["plain", *(k for k in KINDS if "draft" not in k), "ngram-simple 4", "ngram-mod 4", "ngram-map-k 20"],
)
def test_drafting_of_llama_cpp_on_our_kernels_is_lossless(
    kind: str, plain: entmtp.Llama, expected: list[tuple[Prompt, list[int]]]
) -> None:
    """The same tokens as our plain loop, greedily and drawn: one sampler, one seed, one set of kernels."""
    method = baseline(f"llama.cpp {kind}")
    assert method is not None
    saved = 0
    with closing(Driver(method, plain)) as driver:
        assert driver.kernels == kernels.current()
        for prompt, tokens in expected:
            theirs = driver.answer(prompt)
            assert theirs.tokens == tokens
            assert len(theirs.times) == len(tokens) and theirs.times[0] == 0.0
            assert sorted(theirs.times) == theirs.times and theirs.times[-1] == pytest.approx(theirs.seconds)
            assert theirs.n_passes is not None
            saved += len(tokens) - 1 - theirs.n_passes
    # the others wait for a dozen tokens of before
    assert saved == 0 if kind == "plain" else saved >= (kind in ("ngram-mod", "ngram-mod 4", "ngram-cache"))


@built
def test_a_model_that_drafts_in_llama_cpp(
    plain: entmtp.Llama, expected: list[tuple[Prompt, list[int]]]
) -> None:
    """The model itself drafts: all is accepted, so that a pass brings four tokens."""
    method = baseline("llama.cpp draft-simple 3")
    assert method is not None
    with closing(Driver(method, plain, draft_model=plain.model_path)) as driver:
        prompt, tokens = expected[0]
        theirs = driver.answer(prompt)
        assert theirs.tokens == tokens
        assert theirs.n_passes is not None and (len(theirs.tokens) - 1) / theirs.n_passes > 3.5


@built
@pytest.mark.parametrize("kind", ["mtp", "eagle3"])
def test_layers_that_predict_in_llama_cpp(kind: str, tmp_path: Path) -> None:
    """Random layers, whose guesses are as good as wrong: the text is plain decoding's."""
    method = baseline(f"llama.cpp draft-{kind} 2")
    assert method is not None
    path, layer = model_path("llama"), None
    if kind == "mtp":
        path = with_nextn(path, tmp_path / "nextn.gguf")
    else:
        layer = str(write_eagle3(path, tmp_path / "eagle3.gguf")[0])
    settings = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with (
        closing(entmtp.Llama(path, **settings)) as llm,
        closing(Driver(method, llm, draft_model=layer)) as driver,
    ):
        for temp in (0.0, 0.8):
            prompt = Prompt(list(range(5, 30)), 40, temp, seed=9)
            theirs = driver.answer(prompt)
            assert theirs.tokens == decode(llm, prompt).tokens
            assert theirs.n_passes is not None and theirs.n_passes <= len(theirs.tokens) - 1


@built
def test_a_request_that_cannot_be_is_said_and_the_next_is_answered(plain: entmtp.Llama) -> None:
    method = baseline("llama.cpp plain")
    assert method is not None
    with closing(Driver(method, plain)) as driver:
        with pytest.raises(EntmtpError, match=r"llama\.cpp plain: prompt and answer do not fit"):
            driver.answer(Prompt([1] * 2000, 8))
        assert len(driver.answer(Prompt([1, 2, 3], 8)).tokens) == 8


@pytest.fixture(scope="module")
def unpatched(plain: entmtp.Llama) -> None:
    """llama.cpp as it is runs here at all."""
    method = baseline("llama.cpp server")
    assert method is not None
    try:
        Server(method, plain).close()
    except EntmtpError as e:
        if f"status {-signal.SIGILL}" in str(e) and has_amx():
            pytest.skip(
                "built by gcc 12, llama.cpp's AMX kernels end its process (native/patches/README.md, 0013)"
            )
        raise


@built
@pytest.mark.usefixtures("unpatched")
def test_the_server_without_patches(plain: entmtp.Llama, expected: list[tuple[Prompt, list[int]]]) -> None:
    method = baseline("llama.cpp server, ngram-simple 4")
    assert method is not None
    with closing(Server(method, plain)) as server:
        prompt = expected[0][0]
        first, again = server.answer(prompt), server.answer(prompt)
        assert first.tokens == again.tokens and 0 < len(first.tokens) <= 48
        assert first.seconds > 0 and len(first.times) == len(first.tokens)
        assert first.n_passes is not None and first.n_passes < len(first.tokens)


@built
@pytest.mark.usefixtures("unpatched")
@pytest.mark.slow
def test_bench_run_compares_them(
    tmp_path: Path, models: dict[str, Path], load: Callable[..., entmtp.Llama]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": prompts("humaneval")[0]}) + "\n")
    labels = ["EntMTP", "llama.cpp server", "llama.cpp ngram-mod 8"]
    out = tmp_path / "bench.json"
    assert cli.main([
        "run", "-m", str(models["q8_0"]), "--prompts", str(path), "--raw", "--tokens", "32", "--temp", "0", "--ctx",
        "1024", "--threads", str(N_THREADS), "--methods", *labels, "-o", str(out),
    ]) == 0  # fmt: skip
    rows = {r["method"]: r for r in json.loads(out.read_text())["tasks"][0]["rows"]}
    assert set(labels) < set(rows)
    assert rows["llama.cpp ngram-mod 8"]["identical"] == rows["EntMTP"]["identical"] == 1
    assert "rounds in ggml's ways" in out.with_suffix(".md").read_text()
