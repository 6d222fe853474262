"""`make fuzz-server EXAMPLES=100`: requests made up by schemathesis from the server's own description.

No answer may be a server's error (status 500 and above), and the server must answer an honest question at the end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from helpers.hostile import resident
from helpers.serving import Server
from helpers.typed import DEMO

ASK = {"prompt": "The sea", "max_tokens": 8, "temperature": 0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100, help="requests of each path (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default: 0)")
    args = parser.parse_args()
    options = ("--model", DEMO, "--ctx", 256, "--threads", 1, "--parallel", 2, "--max-seconds", 5)
    with Server(*options) as server:
        before = resident(server)
        words = [
            "run", f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {server.key}", "--checks",
            "not_a_server_error", "--phases", "examples,coverage,fuzzing", "--max-examples", args.examples, "--seed",
            args.seed, "--request-timeout", 60, "--generation-database", "none",
        ]  # fmt: skip
        code = subprocess.run([Path(sys.executable).with_name("schemathesis"), *map(str, words)]).returncode
        with server.http() as http:
            honest = http.post("/v1/completions", json=ASK)
        print(
            f"memory: {before:.0f} MB before, {resident(server):.0f} MB after; an honest question: {honest.status_code}"
        )
        ended, stderr = server.stop(15)
        print(f"the server ended with {ended}" + (f"\n{stderr}" if "Traceback" in stderr else ""))
    return code or int(honest.status_code != 200 or ended != 0 or "Traceback" in stderr)


if __name__ == "__main__":
    raise SystemExit(main())
