"""Errors are one printable line, and lists below it, whatever the files that they name hold."""

from __future__ import annotations

import pytest

from entmtp.bank.bank import from_json
from entmtp.common import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
HOSTILE = "a\n\x1b[2J\u202eb"


@pytest.mark.parametrize("kind", KINDS)
def test_one_printable_line(kind: type[Exception]) -> None:
    text = str(kind(f"{HOSTILE} is no model"))
    assert text == "a??[2J?b is no model" and str(kind()) == ""
    assert str(kind("there are", HOSTILE, "c")) == "there are\na??[2J?b\nc"


@pytest.mark.parametrize("kind", [errors.BankError, errors.ModelError, errors.ConvertError])
def test_names_of_any_length(kind: type[Exception]) -> None:
    assert str(kind("a" * 10_000)) == "a" * errors.MAX_CHARS + " ..."
    assert str(kind("a" * errors.MAX_CHARS)) == "a" * errors.MAX_CHARS


def test_what_callers_catch() -> None:
    """As what they were before they had a class of their own."""
    assert issubclass(errors.EntmtpError, RuntimeError) and issubclass(errors.ModelError, errors.EntmtpError)
    assert issubclass(errors.BankError, ValueError) and issubclass(errors.UsageError, ValueError)


def test_a_name_from_a_bank() -> None:
    with pytest.raises(errors.BankError) as e:
        from_json({"version": 3, "trees": [{"name": HOSTILE, "paths": 1}]}, "x")
    assert str(e.value).startswith("tree a??[2J?b: paths must be a list of rank paths")
