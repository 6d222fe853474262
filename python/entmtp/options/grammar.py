"""The grammar that a command line names."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..common.errors import UsageError
from ..common.fields import parse_json
from ..llama import Llama


def grammar(args: argparse.Namespace, llm: Llama) -> Any:
    """The grammar that the options name, or None.

    Raises:
        UsageError: the file is missing, or no grammar.
    """
    if args.grammar and args.json_schema:
        raise UsageError("--grammar and --json-schema exclude each other: leave one of them out")
    path = args.grammar or args.json_schema
    if path is None:
        return None
    from ..request import grammar_fault, grammar_of_schema, grammar_of_text

    try:
        text = path.read_text("utf-8-sig")
        if not text.strip():
            raise UsageError(f"{path}: the file is empty")
        made = grammar_of_schema(parse_json(text)) if args.json_schema else grammar_of_text(text)
    except OSError as e:
        raise UsageError(f"{path}: {(e.strerror or str(e)).lower()}") from None
    except json.JSONDecodeError as e:
        raise UsageError(f"{path}: this is no JSON: {e}") from None
    except ValueError as e:
        raise UsageError(f"{path}: {e}") from None
    if why := grammar_fault(llm.model, made):
        raise UsageError(f"{path}: llama.cpp cannot read this grammar: {why}")
    return made
