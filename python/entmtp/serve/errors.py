"""What goes wrong, in words: the status and the form that each API gives an error."""

from __future__ import annotations

import json
import re
import sys
import traceback
from contextvars import ContextVar
from typing import Any

from pydantic import ValidationError

from ..common.errors import EntmtpError, shortened
from ..models.messages import in_template

ANTHROPIC = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
# what the request that is being answered is called: its client's name for it, or ours
request_id: ContextVar[str] = ContextVar("request_id", default="")

MOST_ERRORS = 1000  # that pydantic is asked for the words of
FOLDERS = re.compile(r"(?<![\w:/])(/[^\s/:]+)+/")  # of this machine, in front of a file's name
TOO_LONG = re.compile(r"Requested tokens \((\d+)\) exceed context window of (\d+)")


class Refused(Exception):
    """A request that cannot be answered.

    Attributes:
        status: of the response.
        param: field of the request that is to blame.
        code: OpenAI's name of the error, where it has one.
    """

    def __init__(self, text: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(text)
        self.status, self.param, self.code = status, param, code

    def content(self, path: str) -> dict[str, Any]:
        """The body of the response, as the API at `path` has it."""
        if path.startswith("/api/"):
            return {"error": str(self)}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if path.startswith("/v1/messages"):
            kind = ANTHROPIC.get(self.status, kind if self.status < 500 else "api_error")
            error = {"type": kind, "message": str(self)}
            return {"type": "error", "error": error, "request_id": request_id.get()}
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def event(self, path: str, number: int = 0) -> bytes:
        """The last event of a stream; `number` of the events before it."""
        content = self.content(path)
        if path.startswith("/api/"):
            return json.dumps(content).encode() + b"\n"
        name = "event: error\n" if path in ("/v1/messages", "/v1/responses") else ""
        if path == "/v1/responses":
            error = {k: content["error"][k] for k in ("code", "message", "param")}
            content = {"type": "error", "sequence_number": number, **error}
        return f"{name}data: {json.dumps(content)}\n\n".encode()


def worded(error: Exception) -> Refused:
    """Any error as one for the client; only what nobody expected leaves a traceback in the log."""
    text = str(error)
    if isinstance(error, Refused):
        return error
    if isinstance(error, ValidationError):
        if error.error_count() > MOST_ERRORS:
            return Refused(f"the body of the request has {error.error_count()} values of wrong types")
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return Refused(
            f"{where}: {first['msg']}" if where else first["msg"], str(first["loc"][0]) if where else None
        )
    if found := TOO_LONG.search(text):
        return Refused(
            f"This model's maximum context length is {found[2]} tokens, and the prompt has {found[1]}; shorten it.",
            "messages", code="context_length_exceeded",
        )  # fmt: skip
    if isinstance(error, RecursionError):
        return Refused("the body of the request is nested too deeply")
    if isinstance(error, RuntimeError) and "embedding=True" in text:
        return Refused("this model is served for text; start the server with --embedding true for embeddings")
    if isinstance(error, ValueError):
        return Refused(shortened(text), "messages" if in_template(error) else None)
    if in_template(error):
        return Refused(
            f"the model's chat template cannot write these messages: {shortened(text)}", "messages"
        )
    if isinstance(error, EntmtpError) and "grammar" in text:  # it led to nothing, or to too much
        return Refused(f"grammar: {text}", "grammar")
    print(f"request {request_id.get()} failed:", file=sys.stderr)
    traceback.print_exception(error, file=sys.stderr)
    return Refused(FOLDERS.sub("", text), status=500)
