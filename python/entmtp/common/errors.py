"""What can go wrong. The text of every error is one sentence: what, where, how to mend it."""

MAX_CHARS = 800  # of a text with names from files


class EntmtpError(RuntimeError):
    """A native call failed."""


class Cancelled(EntmtpError):
    """`Llama.cancel()` stopped an evaluation."""


class BusyError(EntmtpError):
    """A model is in use by another thread, or by a generation that began later."""


class BankError(ValueError):
    """A tree bank is not what the schema asks for."""


class ServerError(EntmtpError):
    """An RPC server that cannot be reached or used, or was lost."""


class ModelError(EntmtpError):
    """A model or heads file that cannot be found, fetched or used."""


class UsageError(ValueError):
    """The command line asks for something that cannot be."""


class ConvertError(Exception):
    """A file of weights that cannot be read, or a conversion that cannot be done: what, where and how to mend it.

    Names from damaged or hostile files end up in its text, so it is kept to one printable line.
    """

    def __init__(self, sentence: str):
        line = "".join(c if c.isprintable() else "?" for c in sentence)
        super().__init__(line if len(line) <= MAX_CHARS else line[:MAX_CHARS] + " ...")
