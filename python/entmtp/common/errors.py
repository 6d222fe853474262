"""What can go wrong. The text of every error is one sentence: what, where, how to mend it."""

MAX_CHARS = 800  # of a text with names from files
NO_CONTEXT = "llama.cpp cannot make a context"  # a ValueError of `Llama`; why follows

CLOSED = "this model is closed: load it anew"  # a ClosedError


def shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + " ..."


class Sentence(Exception):
    """One printable line, whatever names from damaged or hostile files stand in it; `listed` has lines of its own."""

    def __init__(self, text: str = "", *listed: str):
        lines = ("".join(c if c.isprintable() else "?" for c in line) for line in (text, *listed))
        super().__init__("\n".join(lines))


class OfFile(Sentence):
    """Of a file, whose names may be of any length."""

    def __init__(self, text: str = "", *listed: str):
        super().__init__(shortened(text), *listed)


class EntmtpError(Sentence, RuntimeError):
    """A native call failed."""


class Cancelled(EntmtpError):
    """`Llama.cancel()` stopped an evaluation."""


class BusyError(EntmtpError):
    """A model is in use by another thread, or by a generation that began later."""


class ClosedError(EntmtpError):
    """A model is used after it was closed."""


class BankError(OfFile, ValueError):
    """A tree bank is not what the schema asks for."""


class ServerError(EntmtpError):
    """An RPC server that cannot be reached or used, or was lost."""


class ModelError(OfFile, EntmtpError):
    """A model or heads file that cannot be found, fetched or used."""


class UsageError(Sentence, ValueError):
    """The command line asks for something that cannot be."""


class ConvertError(OfFile):
    """A file of weights that cannot be read, or a conversion that cannot be done: what, where and how to mend it."""
