"""Servers under load: when requests come, what clients see, what it amounts to; and servers that go wrong."""

from __future__ import annotations

import json
import statistics
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from entmtp.bench import cli, serve
from entmtp.bench.clients import Load, Seen, arrivals, ask, figures, lengths, throughput, under
from entmtp.common.errors import EntmtpError
from entmtp.measure import baselines, child
from entmtp.measure.child import ChildServer
from entmtp.measure.turns import Prompt
from entmtp.report.plots import draw
from entmtp.serve import cli as cli_of_server
from entmtp.serve.settings import from_options

# answers /v1/completions with three pieces, or as `max_tokens` says: 1 status 503, 2 an error event, 3 ends too early
SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        n = body["max_tokens"]
        self.send_response(503 if n == 1 else 200); self.end_headers()
        say = lambda data: self.wfile.write(f"data: {data}\\n\\n".encode())
        if n == 1:
            return self.wfile.write(b"too many")
        for i, text in enumerate(("a", "", "b", "c")):
            say(json.dumps({"choices": [{"text": text + str(body["prompt"][0])}]} if text else {"choices": []}))
            if i == 0 and n == 2:
                return say('{"error": "lost"}')
            if i == 2 and n == 3:
                return
        say(json.dumps({"choices": [], "usage": {"completion_tokens": n}}))
        say("[DONE]")

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ChildServer]:
    with closing(ChildServer(lambda port: [sys.executable, "-c", SERVER, str(port)])) as found:
        yield found


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(20_000, rate=4.0, seed=3)
    gaps = np.diff(times)
    assert (gaps > 0).all() and times[0] > 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)  # of an exponential: its mean
    # counts per second: mean and variance of a Poisson distribution are equal
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.08)
    assert (arrivals(50, 4.0, 3) == times[:50]).all()
    assert (arrivals(50, 4.0, 4) != times[:50]).all()


def test_lengths_are_short_with_a_long_tail() -> None:
    drawn = lengths(5000, 240, seed=1)
    assert min(drawn) >= 4 and max(drawn) == 240
    assert statistics.median(drawn) == pytest.approx(80, rel=0.06)
    assert statistics.mean(drawn) > 1.1 * statistics.median(drawn)
    assert lengths(9, 240, 1) == drawn[:9] and lengths(3, 2, 1) == [2, 2, 2]


def test_clients_ask_again_when_they_are_answered() -> None:
    """Three at a time, never more, and every prompt once: a barrier lets nobody go on alone."""
    together = threading.Barrier(3)
    at_work: list[int] = []
    most = []

    def asking(prompt: Prompt, due: float | None) -> Seen:
        at_work.append(prompt.seed)
        together.wait(timeout=30)
        most.append(len(at_work))
        together.wait(timeout=30)
        at_work.remove(prompt.seed)
        return Seen(0.0, [1.0], str(prompt.seed), 1)

    prompts = [Prompt([1], 4, seed=i) for i in range(9)]
    seen = under(Load(clients=3), asking, prompts, seed=1)
    assert [s.text for s in seen] == [str(i) for i in range(9)]
    assert most == [3] * 9


def test_requests_come_when_they_are_due() -> None:
    prompts = [Prompt([1], 4, seed=i) for i in range(5)]
    seen = under(
        Load(rate=500.0), lambda prompt, due: Seen(due or 0.0, [], str(prompt.seed), 0), prompts, seed=2
    )
    assert [s.text for s in seen] == list("01234")
    assert np.diff([s.asked for s in seen]) == pytest.approx(np.diff(arrivals(5, 500.0, 2)), abs=1e-6)


def test_figures_against_statistics() -> None:
    rng = np.random.default_rng(5)
    rounds = []
    for k in range(3):
        answers = []
        for i in range(7):
            times = (10.0 * k + i + 0.5 + np.cumsum(rng.exponential(0.02, 30))).tolist()
            answers.append(Seen(10.0 * k + i, times, "x", 31))
        rounds.append([*answers, Seen(10.0 * k, [10.0 * k + 99.0], "y", 5, "lost")])
    found = figures(rounds)
    good = [s for answers in rounds for s in answers if s.error is None]
    gaps = [1e3 * (b - a) for s in good for a, b in zip(s.times, s.times[1:], strict=False)]
    for key, values in (("gap_ms", gaps), ("first_ms", [1e3 * (s.times[0] - s.asked) for s in good])):
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        assert found[key] == pytest.approx([cuts[49], cuts[94], cuts[98]], abs=2e-3)
    assert (found["requests"], found["errors"], found["error"]) == (24, 3, "lost")
    # 217 tokens of the seven that were answered, in the time of all eight
    assert found["tokens_per_second"] == pytest.approx(217 / 99.0)
    nothing = figures([[Seen(0.0, [], "", 0, "refused")]])
    assert nothing["tokens_per_second"] == 0.0 and nothing["gap_ms"] is None and nothing["errors"] == 1
    assert throughput([Seen(1.0, [2.0, 3.0], "ab", 4), Seen(2.0, [4.0, 5.0], "ab", 4)]) == pytest.approx(2.0)


def test_what_a_client_sees(server: ChildServer) -> None:
    seen = ask(server, Prompt([7], 12))
    assert (seen.text, seen.n_tokens, seen.error) == ("a7b7c7", 12, None)
    assert len(seen.times) == 3 and seen.asked < seen.times[0]
    status, event, early = (ask(server, Prompt([7], n)) for n in (1, 2, 3))
    assert status.error and "status 503: too many" in status.error and status.text == ""
    assert event.error and "lost" in event.error and event.text == "a7"
    assert early.error and "before its end" in early.error and early.text == "a7b7"
    load = under(
        Load(clients=4), lambda prompt, due: ask(server, prompt, due), [Prompt([i], 5) for i in range(12)], 1
    )
    assert [s.text for s in load] == [f"a{i}b{i}c{i}" for i in range(12)]


def test_a_server_that_ends_or_never_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EntmtpError, match="ended with status 3: no such model"):
        ChildServer(
            lambda port: [sys.executable, "-c", "print('no such model', flush=True); raise SystemExit(3)"]
        )
    monkeypatch.setattr(child, "STARTS_WITHIN", 0.3)
    started: list[list[str]] = []
    with pytest.raises(EntmtpError, match="was not ready in 0 s: it wrote nothing"):
        ChildServer(lambda port: started.append([]) or [sys.executable, "-c", "import time; time.sleep(600)"])
    found = ChildServer.__new__(ChildServer)
    found.port = child.free_port()
    gone = ask(found, Prompt([1], 4))
    assert gone.error and gone.error.startswith("ConnectionRefusedError")


def test_table_and_picture(tmp_path: Path) -> None:
    rows = [
        {"server": name, "load": load, "tokens_per_second": 100.4, "first_ms": first, "gap_ms": gap, "errors": errors,
         "requests": 6, "identical": 5}
        for name in (serve.DRAFTS, serve.PLAIN)
        for load, first, gap, errors in (
            ("1 client", [20.2, 40.0, 50.0], [3.0, 7.25, 9.0], 0), ("2 requests/s", None, None, 6)
        )
    ]  # fmt: skip
    lines = serve.markdown(rows).splitlines()
    assert lines[2] == "| 1 client | EntMTP serve | 100 | 20 | 40 | 3.0 | 7.2 | 9.0 | 0 | 5/6 |"
    assert lines[3] == "| 2 requests/s | EntMTP serve | 100 | – | – | – | – | – | 6 | 5/6 |"
    del rows[0]["identical"]
    assert serve.markdown(rows).splitlines()[2].endswith("| 0 |  |")
    report = {"machine": "here", "threads": 2, "serve": rows}
    drawn = draw(json.loads(json.dumps(report)), tmp_path / "load.png")
    assert drawn is not None and drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--clients"], "give --clients, --rate"),
        (["--stall", "0"], "give --clients, --rate"),
        (["--servers", "llama-server"], "make baselines"),
    ],
)
def test_mistakes(
    options: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ENTMTP_CACHE", str(tmp_path))
    assert baselines.missing()
    prompts = Path(__file__).parents[1] / "prompts" / "gsm8k.jsonl"
    assert cli.main(["serve", "-m", "demo", "--prompts", str(prompts), *options]) != 0
    error = capsys.readouterr().err.strip()
    assert says in error and len(error.splitlines()) == 1


def test_what_our_servers_are_told() -> None:
    """Every option that this command shares with the server, and how long prompts may take."""
    words = ["-m", "m.gguf", "--heads", "h.gguf", "--stall", "0.05", "--threads", "2", "--flash-attn"]
    args = cli.setup_arg_parser().parse_args(["serve", *words])
    said = {}
    for label in (serve.DRAFTS, serve.PLAIN):
        options = cli_of_server.spelled(serve.command(label, 8123, args, 3)[3:])
        server, (model,) = from_options(vars(cli_of_server.setup_arg_parser().parse_args(options)))
        assert (server.host, server.port, server.parallel, server.stall) == ("127.0.0.1", 8123, 3, 0.05)
        assert (model.model, model.flash_attn) == ("m.gguf", True)
        assert (model.n_threads, model.n_threads_batch) == (2, 2)
        said[label] = model.heads, model.draft
    assert said == {serve.DRAFTS: ("h.gguf", None), serve.PLAIN: (None, "off")}


@pytest.mark.slow
def test_our_servers_give_the_same_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = Path(__file__).parents[1] / "prompts" / "gsm8k.jsonl"
    out = tmp_path / "load.json"
    status = cli.main([
        "serve", "-m", "demo", "--prompts", str(prompts), "--raw", "--limit", "3", "--tokens", "24", "--requests", "4",
        "--clients", "2", "--temp", "0", "0.8", "--rounds", "1", "--ctx", "512", "--threads", "1",
        "--servers", "drafts", "plain", "-o", str(out),
    ])  # fmt: skip
    assert status == 0, capsys.readouterr().err
    rows = json.loads(out.read_text("utf-8"))["serve"]
    assert [(r["server"], r["load"]) for r in rows] == [
        (serve.DRAFTS, "2 clients"),
        (serve.PLAIN, "2 clients"),
    ]
    assert all(r["identical"] == r["requests"] == 4 and r["errors"] == 0 for r in rows)
    assert all(r["tokens_per_second"] > 0 and r["gap_ms"][0] <= r["gap_ms"][2] for r in rows)
    assert out.with_suffix(".png").exists() and "EntMTP serve" in out.with_suffix(".md").read_text("utf-8")
