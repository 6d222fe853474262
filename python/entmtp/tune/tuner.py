"""A bank for a model that is named: `measure/tuning.py` on a model that is loaded for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ..bank import Bank
from ..common.prompts import Question
from ..llama import Llama
from ..measure import tuning
from ..models.templates import fitting_tokens


def tune(
    model: str | Path,
    heads: str | Path,
    prompts: Sequence[tuple[str, str]],
    *,
    n_threads: int | None = None,
    n_ctx: int = 2048,
    settings: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Bank:
    """A bank tuned for a base model, its heads, a task and this machine.

    Args:
        prompts: (task, text) pairs; every other one is held out. A chat model is asked them by its template.
        n_threads: for passes of any size; None: as `Llama` does.
        settings: further arguments of `Llama`.
        kwargs: of `entmtp.measure.tuning.tune`.

    Raises:
        ValueError: too few prompts, or traces of other heads.
    """
    loaded: dict[str, Any] = {"n_ctx": n_ctx, "verbose": False, **(settings or {})}
    if n_threads:
        loaded |= {"n_threads": n_threads, "n_threads_batch": n_threads}
    with closing(Llama(model, draft="entmtp", heads=heads, policy="off", **loaded)) as llm:
        room = llm.n_ctx() - kwargs.get("n_tokens", 128) - 1
        asked = [(task, fitting_tokens(llm, Question("", (text,)), room)) for task, text in prompts]
        return tuning.tune(llm, asked, **kwargs)
