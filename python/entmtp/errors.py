"""What can go wrong. The text of every error is one sentence: what, where, how to mend it."""


class EntmtpError(RuntimeError):
    """A native call failed."""


class Cancelled(EntmtpError):
    """`Llama.cancel()` stopped an evaluation."""


class BankError(ValueError):
    """A tree bank is not what the schema asks for."""


class ServerError(EntmtpError):
    """An RPC server that cannot be reached or used, or was lost."""


class ModelError(EntmtpError):
    """A model or heads file that cannot be found, fetched or used."""
