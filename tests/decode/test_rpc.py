"""Layers on other machines: two RPC servers on this one."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from test_architectures import BUSHY, SETTINGS, answers, heads_for
from test_lossless import TIE, decode, gap_at

from entmtp import Llama, ServerError
from entmtp.measure.methods import CONFIDENCE
from entmtp.native import rpc
from helpers.models import SPECS, model_path
from helpers.policies import apply
from helpers.rpc import rpc_server
from helpers.settings import F32, prompts

CODE = prompts("humaneval")
ONE = F32 | {"n_threads": 1, "n_threads_batch": 1, "n_ctx": 512}
TREE = {"trees": "generic-hydra:n8", "policy": "static"}


@pytest.fixture
def two() -> Iterator[list[tuple[str, subprocess.Popen[str]]]]:
    with rpc_server() as first, rpc_server() as second:
        yield [first, second]


@pytest.fixture
def load(
    two: list[tuple[str, subprocess.Popen[str]]], models: dict[str, Path]
) -> Iterator[Callable[..., Llama]]:
    """load(heads=None, **settings): the demo model, its layers on both servers."""
    loaded: list[Llama] = []

    def get(heads: str | None = None, **settings: object) -> Llama:
        draft = {"draft": "entmtp", "heads": models[heads]} if heads else {}
        over = {"rpc_servers": [address for address, _ in two], "tensor_split": [1, 1]}
        loaded.append(Llama(models["f32"], **{**ONE, **over, **draft, **settings}))
        return loaded[-1]

    yield get
    for llm in loaded:
        llm.close()


def assert_same(plain: Llama, prompt: list[int], expected: list[int], answer: list[int]) -> None:
    """The servers compute with ggml's kernels, whose order of summation depends on the size of a pass."""
    if answer != expected:
        at, gap = gap_at(plain, prompt, expected, answer)
        assert gap < TIE["f32"], f"token {at} differs and is no tie: logits {gap:.6f} apart"


def test_a_warning_says_where_texts_are_up_to_rounding(
    load: Callable[..., Llama], models: dict[str, Path]
) -> None:
    with pytest.warns(
        RuntimeWarning, match="up to rounding here, not bit for bit: layers are on other machines"
    ):
        assert load("hydra", **TREE).lossless == "rounding"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load()  # plain decoding is itself
        Llama(models["f32"], draft="entmtp", heads=models["hydra"], **(ONE | TREE)).close()


def test_a_drafting_model_over_rpc(load: Callable[..., Llama], models: dict[str, Path]) -> None:
    """Its projection lies on a server, where no token of the text could come into a draft vocabulary in time."""
    drafter = {"draft": "entmtp", "draft_model": models["f32"], "drafters": ["model"], "draft_vocab": 512}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that texts are up to rounding
        plain, llm = load(), load(**drafter)
    assert llm.draft_vocab == llm.n_vocab()
    prompt = plain.tokenize(CODE[0].encode(), special=True)
    expected, answer = (decode(model, prompt, 24, temp=0.0) for model in (plain, llm))
    assert_same(plain, prompt, expected, answer)


@pytest.mark.parametrize("heads", ["medusa", "hydra"])
def test_drafting_over_rpc_changes_no_token(heads: str, load: Callable[..., Llama]) -> None:
    plain, llm = load(), load(heads, **{**TREE, "trees": f"generic-{heads}:n8"})
    for i, text in enumerate(CODE[:2]):
        prompt = plain.tokenize(text.encode(), special=True)
        for temp in (0.0, 0.8):
            answers = []
            for model in (plain, llm):
                model.set_seed(i)
                answers.append(decode(model, prompt, 40, temp=temp))
            assert_same(plain, prompt, *answers)
    stats = llm.draft_stats
    assert stats.n_accepted > 20 and stats.n_drafted > stats.n_accepted, "hardly anything was drafted"


# heads beside the output layer of a server; tied embeddings, sliding windows, experts
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "qwen3moe"])
def test_architectures(name: str, two: list[tuple[str, subprocess.Popen[str]]], tmp_path: Path) -> None:
    model = model_path(name)
    over = {"rpc_servers": [address for address, _ in two], "tensor_split": [1, 1], **SETTINGS}
    with closing(Llama(model, **over)) as plain:
        expected = answers(plain)
    heads = heads_for(model, SPECS[name].n_embd, tmp_path)
    with closing(Llama(model, draft="entmtp", heads=heads, trees=BUSHY, policy="static", **over)) as llm:
        assert llm._heads is not None and llm._heads.info.device.decode() == f"RPC0[{two[1][0]}]"
        assert answers(llm) == expected
        assert llm.draft_stats.n_accepted > 20


@pytest.mark.parametrize("n_gpu_layers", [1, 2])
def test_layers_here_and_there(
    n_gpu_layers: int, load: Callable[..., Llama], models: dict[str, Path]
) -> None:
    llm = load("hydra", n_gpu_layers=n_gpu_layers, adapt=False)
    apply(CONFIDENCE, llm)
    with closing(Llama(models["f32"], **ONE)) as here:
        prompt = here.tokenize(CODE[0].encode(), special=True)
        assert_same(here, prompt, decode(here, prompt, 48, temp=0.0), decode(llm, prompt, 48, temp=0.0))
    assert llm.draft_stats.n_accepted > 10, "hardly anything was drafted"


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("heads", [None, "hydra"])
def test_a_server_that_dies_ends_the_generation_only(
    which: int, heads: str | None, two: list[tuple[str, subprocess.Popen[str]]], load: Callable[..., Llama],
    models: dict[str, Path],
) -> None:  # fmt: skip
    address, process = two[which]
    llm = load(heads, **(TREE if heads else {}))
    with closing(Llama(models["f32"], **ONE)) as here:
        prompt = here.tokenize(CODE[0].encode(), special=True)
        expected = decode(here, prompt, 200, temp=0.0)

        killer = threading.Thread(
            target=process.kill
        )  # wherever the other thread is: in a pass, or between two
        tokens = []
        with pytest.raises(ServerError, match=f"RPC server {address} is lost: .*start it again"):
            for token in llm.generate(prompt, temp=0.0):
                tokens.append(token)
                if len(tokens) == 8:
                    killer.start()
                assert len(tokens) < 200, "nobody noticed"
        killer.join()
        if tokens != expected[: len(tokens)]:  # no token may come from what a lost server did not say
            assert_same(here, prompt, expected[: len(tokens)], tokens)

        with pytest.raises(ServerError, match="is lost"):
            llm.create_completion("def f(", max_tokens=2)
        llm.close()
        assert decode(here, prompt, 8, temp=0.0) == expected[:8], "other models go on"

    # once the server is back, a new model finds it in this process, too
    with rpc_server(int(address.rpartition(":")[2])):
        again = load(heads)
        assert_same(again, prompt, expected[:8], decode(again, prompt, 8, temp=0.0))


def test_embeddings_of_a_lost_server_are_an_error(
    two: list[tuple[str, subprocess.Popen[str]]], load: Callable[..., Llama]
) -> None:
    llm = load(embedding=True)
    assert len(llm.embed("one")) > 0
    two[0][1].kill()
    two[0][1].wait()
    with pytest.raises(RuntimeError, match=r"is lost|llama_decode returned -3"):
        llm.embed("two")


#
# addresses
#


@contextmanager
def listener(answer: bytes | None) -> Iterator[str]:
    """Something that listens, and answers with these bytes; None: never."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(64)
                if answer is None:
                    connection.recv(64)  # until the client leaves
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
    thread.join(10)


def hello(*version: int) -> bytes:
    return struct.pack("<Q4B", 28, *version, 0) + bytes(24)


@pytest.mark.parametrize(
    "answer, message",
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no RPC server of this version"),
        (b"", "is no RPC server of this version"),
        (hello(3, 6, 1), r"speaks version 3\.6\.1 of the RPC protocol, this llama\.cpp 7\.0; use the same"),
        (None, "does not answer; it may be serving another program"),
    ],
)
def test_what_listens_is_no_server_for_us(
    answer: bytes | None, message: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "ANSWER_WITHIN", 0.5)
    with listener(answer) as address, pytest.raises(ServerError, match=f"RPC server {address}: .*{message}"):
        Llama(models["f32"], rpc_servers=address, **ONE)


@contextmanager
def silence() -> Iterator[str]:
    """An address where nothing listens, kept from everybody else."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def test_no_server() -> None:
    told = "nothing listens there; start `entmtp rpc-server`"
    with silence() as address, pytest.raises(ServerError, match=told):
        rpc.check(address)
    with pytest.raises(ServerError, match=r"no machine named no-such-host\.invalid"):
        rpc.check("no-such-host.invalid:50052")


@pytest.mark.parametrize("text", ["here", "here:", ":1", "a:0", "a:70000", "[::1]:50052", "a:1,b"])
def test_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="give it as host:port"):
        rpc.parse(text)


def test_lists_of_addresses() -> None:
    assert rpc.parse("a:1, b:2,") == rpc.parse(["a:1", "b:2"]) == ["a:1", "b:2"]
    with pytest.raises(ValueError, match="a:1 is named twice"):
        rpc.parse("a:1,a:1")


#
# commands
#


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )


def test_generate_over_rpc(two: list[tuple[str, subprocess.Popen[str]]]) -> None:
    servers = ",".join(address for address, _ in two)
    texts = [
        run("entmtp.generate", "def add(a, b):", "-n", "16", "--temp", "0", "--threads", "1", *more)
        for more in ([], ["--rpc", servers, "--tensor-split", "1,1"])
    ]
    for done in texts:
        assert done.returncode == 0, done.stderr
    assert texts[0].stdout == texts[1].stdout


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rpc", "nonsense"], "give it as host:port"),
        (["--tensor-split", "1,x"], "is no list of shares"),
    ],
)
def test_a_wrong_option_is_wrong_usage(options: list[str], message: str) -> None:
    done = run("entmtp.generate", "hello", "-n", "1", *options)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_server_that_is_not_there_gets_one_sentence() -> None:
    with silence() as address:
        done = run("entmtp.generate", "hello", "-n", "1", "--rpc", address)
    assert done.returncode == 1 and "nothing listens there" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_the_server_says_what_is_wrong() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("entmtp.rpc_server", "--port", str(taken.getsockname()[1]))
        assert done.returncode == 1 and "choose another --port or --host" in done.stderr
    done = run("entmtp.rpc_server", "--port", "70000")
    assert done.returncode == 2 and "must be between 0 and 65535" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_stops_the_server() -> None:
    with rpc_server() as (_, process):
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT
