"""The grammar that a command line names."""

from __future__ import annotations

import argparse
from typing import Any

from ..common.errors import UsageError
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
    import llama_cpp
    from llama_cpp import LlamaGrammar

    make = LlamaGrammar.from_json_schema if args.json_schema else LlamaGrammar.from_string
    try:
        made = make(path.read_text("utf-8"), verbose=False)
    except OSError as e:
        raise UsageError(f"{path}: {(e.strerror or str(e)).lower()}") from None
    except Exception as e:  # whatever a schema may lack
        raise UsageError(f"{path}: this is no JSON schema that llama-cpp-python can follow: {e}") from None
    # llama-cpp-python would go on without a grammar that llama.cpp cannot read
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, made._grammar.encode(), b"root")
    if not sampler:
        raise UsageError(
            f"{path}: this is no GBNF grammar that llama.cpp can read; it says above what is wrong"
        )
    llama_cpp.llama_sampler_free(sampler)
    return made
