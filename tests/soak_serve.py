"""A server under sixteen clients for long: some read all, some slowly, some leave or break off; nobody else may notice.

    python tests/soak_serve.py --minutes 10      (make soak-serve MINUTES=10)

What a client gets must be what a plain `Llama` wrote alone beforehand, or its beginning where the client leaves.
Memory and open files of the server must not grow. At the end nobody may wait or be answered, every slot must answer,
and the server must end when it is told to, with nothing to say.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from entmtp import Llama
from entmtp.options.demo import demo_files
from helpers.growth import Growth, n_files
from helpers.hostile import Raw
from helpers.serving import PATIENCE, Server
from helpers.settings import prompts

N_CLIENTS, N_CTX = 16, 768
WARM = 0.2  # of the run
GRAMMAR = 'root ::= ("yes" | "no") " because " [a-z ]+ "."'


@dataclass(frozen=True)
class Question:
    """A request, and what its answer is when nobody else asks."""

    path: str
    body: dict[str, Any]
    text: str

    def wrong(self, text: str, is_whole: bool) -> str | None:
        """What is wrong with an answer, if anything is."""
        if text == self.text if is_whole else self.text.startswith(text):
            return None
        return f"{text!r} is not {'' if is_whole else 'the beginning of '}{self.text!r}: {self.body}"


def content(choice: dict[str, Any]) -> str:
    """The text of a choice, whole or a piece."""
    message = choice.get("message") or choice.get("delta") or {}
    return str(choice.get("text") or message.get("content") or "")


def questions(model: Path, n: int, seed: int) -> list[Question]:
    """Requests of all kinds, with the answers of a plain model."""
    from llama_cpp import LlamaGrammar  # after entmtp, which says where the library is

    draw = random.Random(seed)
    texts, asked = prompts(), []
    with closing(
        Llama(model, n_ctx=N_CTX, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False)
    ) as plain:
        for i in range(n):
            settings = {
                "max_tokens": draw.randrange(1, 120), "temperature": draw.choice((0.0, 0.8, 1.2)), "seed": i,
                "top_k": draw.choice((1, 40)), "top_p": 0.95, "min_p": 0.05, "repeat_penalty": draw.choice((1.0, 1.1)),
                "stop": draw.choice(([], [], ["."], ["\n"])),
            }  # fmt: skip
            text = draw.choice(texts)[: draw.randrange(1, 600)]
            plain.reset()
            if i % 4 == 3:
                chat = {"messages": [{"role": "user", "content": text}], **settings}
                answer = plain.create_chat_completion(**chat)
                path, body = "/v1/chat/completions", chat
            else:
                grammar = draw.random() < 0.15
                own = {"grammar": LlamaGrammar.from_string(GRAMMAR, verbose=False)} if grammar else {}
                answer = plain.create_completion(text, **settings, **own)
                body = {"prompt": text, **settings, **({"grammar": GRAMMAR} if grammar else {})}
                path = "/v1/completions"
            asked.append(Question(path, body, content(answer["choices"][0])))
    return asked


def pieces(lines: Iterable[str]) -> Iterator[str]:
    """The text of a streamed answer, event by event."""
    ended = False
    for line in lines:
        if line.startswith("data: ") and not (ended := line == "data: [DONE]"):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise AssertionError(f"an error event: {event['error']}")
            yield content(event["choices"][0])
    if not ended:
        raise AssertionError("the stream was cut")


@contextlib.contextmanager
def streamed(http: httpx.Client, q: Question) -> Iterator[Iterator[str]]:
    with http.stream("POST", q.path, json={**q.body, "stream": True}) as response:
        if response.status_code != 200:
            raise AssertionError(f"status {response.status_code}: {response.read()!r}")
        yield pieces(response.iter_lines())


def whole(q: Question, answer: httpx.Response) -> str | None:
    if answer.status_code != 200:
        return f"status {answer.status_code}: {answer.text}"
    return q.wrong(content(answer.json()["choices"][0]), True)


# What a client does with its question; returns what was wrong. Each has a connection that it may keep, or not.


def waits(server: Server, http: httpx.Client, q: Question, draw: random.Random) -> str | None:
    return whole(q, http.post(q.path, json=q.body))


def reads(server: Server, http: httpx.Client, q: Question, draw: random.Random) -> str | None:
    with streamed(http, q) as text:
        return q.wrong("".join(text), True)


def reads_slowly(server: Server, http: httpx.Client, q: Question, draw: random.Random) -> str | None:
    pause = draw.uniform(0.0, 0.06)  # seconds an event; the system keeps few of them for such a socket
    transport = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)])
    with httpx.Client(
        base_url=http.base_url, headers=http.headers, timeout=PATIENCE, transport=transport
    ) as slow:
        found = ""
        with streamed(slow, q) as text:
            for piece in text:
                found += piece
                time.sleep(pause)
    return q.wrong(found, True)


def leaves(server: Server, http: httpx.Client, q: Question, draw: random.Random) -> str | None:
    n, found = draw.randrange(1, 30), ""
    with streamed(http, q) as text:
        for piece, _ in zip(text, range(n), strict=False):
            found += piece
    return q.wrong(found, False)


def gives_up(server: Server, http: httpx.Client, q: Question, draw: random.Random) -> str | None:
    """It waits, or is being answered, when the client has had enough."""
    try:
        answer = http.post(q.path, json=q.body, timeout=draw.uniform(0.005, 1.0))
    except httpx.TimeoutException:
        return None
    return whole(q, answer)


def breaks_off(server: Server, http: httpx.Client, q: Question, draw: random.Random) -> str | None:
    """The connection is reset in the middle of the request, at once after it, or in the answer."""
    body = json.dumps({**q.body, "stream": True}).encode()
    sent = draw.choice((len(body) // 2, len(body), len(body)))
    with closing(Raw(server)) as raw:
        raw.socket.sendall(raw.head(len(body), q.path) + body[:sent])
        if sent == len(body) and draw.random() < 0.6:
            raw.socket.recv(draw.randrange(1, 2000))
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return None


Client = Callable[[Server, httpx.Client, Question, random.Random], "str | None"]
KINDS: list[tuple[int, Client]] = [
    (4, waits), (4, reads), (2, reads_slowly), (3, leaves), (2, gives_up), (2, breaks_off)
]  # fmt: skip


class Soak:
    """Clients until the time is over."""

    def __init__(self, server: Server, asked: list[Question], seconds: float, seed: int):
        self.server, self.asked, self.seconds, self.seed = server, asked, seconds, seed
        self.growth = Growth(server.process.pid)
        self.asks: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.health = 0.0  # seconds that it took at most
        self.lock = threading.Lock()
        self.begun = time.monotonic()

    @property
    def spent(self) -> float:
        """Of the run, 0 to 1."""
        return (time.monotonic() - self.begun) / self.seconds

    def client(self, number: int) -> None:
        draw = random.Random(f"{self.seed} {number}")
        with self.server.http() as http:
            while self.spent < 1 and len(self.wrong) < 20:
                kind = draw.choices([k for _, k in KINDS], [w for w, _ in KINDS])[0]
                try:
                    wrong = kind(self.server, http, draw.choice(self.asked), draw)
                except (AssertionError, OSError, httpx.HTTPError) as e:
                    wrong = f"{type(e).__name__}: {e}"
                with self.lock:
                    self.asks[kind.__name__] += 1
                    if wrong:
                        self.wrong.append(f"{kind.__name__}: {wrong}")

    def watch(self, say: Callable[[str], None]) -> None:
        said = 0.0
        with self.server.http() as http:
            while self.spent < 1:
                begun = time.monotonic()
                if http.get("/health").status_code != 200:
                    self.wrong.append("/health is not 200")
                self.health = max(self.health, time.monotonic() - begun)
                self.growth.look(self.spent)
                if self.spent >= said:
                    said += 0.05
                    say(
                        f"{self.spent:.0%}, {sum(self.asks.values())} requests, {self.growth.megabytes:.1f} MB"
                    )
                time.sleep(max(0.05, self.seconds / 1000))

    def run(self, say: Callable[[str], None]) -> None:
        with ThreadPoolExecutor(N_CLIENTS + 1) as pool:
            watching = pool.submit(self.watch, say)
            clients = [pool.submit(self.client, i) for i in range(N_CLIENTS)]
            for one in (*clients, watching):
                one.result()

    def every_slot(self, n: int) -> None:
        """As many clients as there are slots, at once, and a while."""

        def ask(i: int) -> str | None:
            with self.server.http() as http:
                return waits(self.server, http, self.asked[i % len(self.asked)], random.Random(i))

        with ThreadPoolExecutor(n) as pool:
            self.wrong += [w for w in pool.map(ask, range(4 * n)) if w]


def idle(metrics: dict[str, float]) -> bool:
    return metrics["entmtp_requests_running"] == 0 and metrics["entmtp_requests_waiting"] == 0


def soak(
    model: Path, *options: object, seconds: float, parallel: int, n_questions: int, seed: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Figures of a run; `wrong` has what was not as it should be.

    Args:
        options: of the server.
        parallel: answers at a time.
        n_questions: different ones.
    """
    asked = questions(model, n_questions, seed)
    say(f"{len(asked)} questions were answered alone")
    with Server(
        "--model", model, "--ctx", N_CTX, "--threads", 1, "--n-threads-batch", 1, "--flash-attn", "true",
        "--parallel", parallel, *options,
    ) as server:  # fmt: skip
        process = Growth(server.process.pid).process
        run = Soak(server, asked, seconds, seed)
        run.every_slot(parallel)
        server.until(idle)
        time.sleep(0.5)  # connections close
        before = n_files(process)
        run.begun = time.monotonic()
        run.run(say)
        run.every_slot(parallel)
        metrics = server.until(idle)
        end = time.monotonic() + PATIENCE
        while (after := n_files(process)) > before and time.monotonic() < end:
            time.sleep(0.1)
        code, stderr = server.stop(signal.SIGTERM)
    if after > before:
        run.wrong.append(f"{before} files were open before, and {after} after")
    if code or stderr.strip():
        run.wrong.append(f"the server ended with {code} and said {stderr!r}")
    statuses: Counter[str] = Counter()
    for name, n in metrics.items():
        if name.startswith("entmtp_requests_total{"):
            statuses[name.partition('status="')[2].removesuffix('"}')] += int(n)
    return {
        "requests": dict(run.asks), "statuses": dict(statuses),
        "tokens": int(sum(n for name, n in metrics.items() if name.startswith("entmtp_generated_tokens_total"))),
        "seconds": seconds, "slowest_health": round(run.health, 2), "files": [before, after],
        **{k: v for k, v in run.growth.figures(WARM).items() if k != "files"}, "wrong": run.wrong,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--parallel", type=int, default=4, help="answers at a time (default: 4)")
    parser.add_argument("--model", help="a model's path or name (default: the demo)")
    parser.add_argument("--questions", type=int, default=200, help="different ones (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="of the questions and clients (default: 1)")
    parser.add_argument(
        "--kv-tokens", type=int, help="room for all answers together (default: for the longest of each)"
    )
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if args.model:
        from entmtp.models.names import resolve

        model, options = resolve(args.model), []
    else:
        model, heads = demo_files()
        options = ["--heads", heads]
    if args.kv_tokens:
        options += ["--kv-tokens", args.kv_tokens]
    found = soak(
        Path(model), *options, seconds=60 * args.minutes, parallel=args.parallel, n_questions=args.questions,
        seed=args.seed, say=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if found["growth"] > 0.01:
        print("soak: memory grew", file=sys.stderr)
    return int(bool(found["wrong"]) or found["growth"] > 0.01)


if __name__ == "__main__":
    raise SystemExit(main())
