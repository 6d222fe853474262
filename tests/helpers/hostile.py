"""What a client may send that no honest one would: requests by name, and sockets that dawdle."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import psutil

from .serving import Server

BRANCHES = "\n".join(f'a{i} ::= a{i + 1} "x" | a{i + 1} "y"' for i in range(26)) + '\na26 ::= "a"'

# GBNF that is short, and leads to more than a machine has
GRAMMARS = {
    "brackets within brackets": "root ::= " + "(" * 200_000,
    "a rule of a rule of a rule": "\n".join(
        [f"{'root' if i == 0 else f'r{i}'} ::= r{i + 1}" for i in range(15_000)] + ['r15000 ::= "a"']
    ),
    "two ways, each with two ways": f"root ::= a0\n{BRANCHES}",
    "the same behind a letter": f"root ::= [a-z ] a0\n{BRANCHES}",
    "twice as many ways with every letter": 'root ::= s\ns ::= [a-z ] s "y" | [a-z ] s "z" | ""',
    "letters times two thousand": 'root ::= "' + "a" * 100_000 + '"{2000}',
    "a loop through nothing": 'root ::= b root "x" | "a"\nb ::= c\nc ::= ""',
    "what no token says": 'root ::= "\\x00"',
    "a megabyte": 'root ::= "' + "a" * (1 << 20) + '"',
}

# as short, and harmless, but for one who tries every way
EQUAL_WAYS = "root ::= a0\n" + "\n".join(f"a{i} ::= a{i + 1} | a{i + 1}" for i in range(40)) + '\na40 ::= "a"'

BIG = 1_000_000_000


def of_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


# JSON schemas of the same kind
SCHEMAS = {
    "a list of a billion": of_object(a={"type": "array", "items": {"type": "integer"}, "minItems": BIG}),
    "a list of at most a billion": of_object(a={"type": "array", "items": {"type": "null"}, "maxItems": BIG}),
    "a text of a billion": of_object(a={"type": "string", "minLength": BIG, "maxLength": BIG}),
    "a pattern of a billion": of_object(a={"type": "string", "pattern": "^[a-z]{1000000000}$"}),
    "a pattern of brackets": of_object(a={"type": "string", "pattern": "^" + "(" * 100_000 + "$"}),
    "choices by the hundred thousand": of_object(a={"enum": [f"choice {i}" for i in range(100_000)]}),
    "names by the thousand": {
        "type": "object",
        "properties": {f"n{i}": {"type": "null"} for i in range(2000)},
    },
    "more than it has levels": json.loads('{"items":' * 90 + "{}" + "}" * 90),
    "another server's": of_object(a={"$ref": "https://127.0.0.1:9/schema.json"}),
    "a list less than nothing": of_object(a={"type": "array", "items": {"type": "null"}, "minItems": -5}),
    "no number": of_object(a={"type": "array", "items": {"type": "null"}, "minItems": "many"}),
}

# fields of a completion, as bytes: json.dumps would not write all of them
FIELDS = {
    "n": b"1000000000",
    "n ": b"1e9",
    "max_tokens": b"1e400",
    "temperature": b"NaN",
    "temperature ": b"Infinity",
    "temperature  ": b"1e400",
    "repeat_penalty": b"1e400",
    "top_k": b"1" + b"0" * 30,
    "seed": b"1" + b"0" * 5000,
    "min_tokens": b"-1",
    "logprobs": b"1000000",
    "logit_bias": b'{"1": NaN}',
    "logit_bias ": b'{"1": 1e400}',
    "logit_bias  ": json.dumps({str(i): 1 for i in range(100_000)}).encode(),
    "stop": json.dumps([f"stop {i}" for i in range(100_000)]).encode(),
    "stop ": json.dumps("s" * 1_000_000).encode(),
    "stop  ": b'["\\ud800"]',
    "prompt": b'"half a pair \\udc00"',
    "prompt ": b'"\xff\xfe no UTF-8"',
    "prompt  ": b"[" + b"[1]," * 200_000 + b"[1]]",
    "model": b"17",
    "stream": b'"perhaps"',
}


class Raw:
    """A connection that is written to by hand."""

    def __init__(self, server: Server):
        host, _, port = server.url.removeprefix("http://").partition(":")
        self.server = server
        self.socket = socket.create_connection((host, int(port)), timeout=60)

    def head(self, length: int, path: str = "/v1/completions", more: str = "") -> bytes:
        return (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.server.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n{more}\r\n"
        ).encode()

    def post(self, body: bytes, **how: Any) -> None:
        self.socket.sendall(self.head(len(body), **how) + body)

    def drip(self, data: bytes, pause: float) -> float:
        """Send byte by byte until the server has had enough; seconds that this took."""
        begun = time.monotonic()
        self.socket.setblocking(False)
        for i in range(len(data)):
            try:
                self.socket.send(data[i : i + 1])
            except BlockingIOError:
                pass
            except OSError:
                break
            if self.is_over():
                break
            time.sleep(pause)
        self.socket.setblocking(True)
        return time.monotonic() - begun

    def is_over(self) -> bool:
        try:
            return len(self.socket.recv(1, socket.MSG_PEEK)) >= 0  # an answer, or the end
        except BlockingIOError:
            return False
        except OSError:
            return True

    def read(self) -> bytes:
        """All that comes until the server closes."""
        parts = []
        try:
            while part := self.socket.recv(1 << 16):
                parts.append(part)
        except ConnectionError:
            pass
        return b"".join(parts)

    def close(self) -> None:
        self.socket.close()


def resident(server: Server) -> float:
    """Memory of the server, MB."""
    return float(psutil.Process(server.process.pid).memory_info().rss) / 2**20
