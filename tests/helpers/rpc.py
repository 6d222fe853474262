"""A running `entmtp rpc-server` on this machine."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def rpc_server(port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Address and process of a server."""
    command = [sys.executable, "-m", "entmtp.rpc_server", "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            said = (re.search(r"lending 1 device at (127\.0\.0\.1:\d+);", line) for line in process.stdout)
            found = next(filter(None, said), None)
            assert found, "the server did not start"
            yield found[1], process
        finally:
            process.kill()
