"""Draft heads for a model, trained on the machine that will run them.

1. plan: what the model, the data and the options make of it, and what it takes (plan.py, forecast.py),
2. text: the user's, and what the base model itself writes, with hidden states and distributions of the very GGUF that
   will verify, in files (text.py, states.py),
3. which tokens heads propose, and by which projection: by what that costs here (choice.py, price.py),
4. training: each head learns the base model's distribution a few tokens ahead (loop.py, loss.py),
5. a heads file, the published PyTorch layout, and what is told of the training (export.py, record.py).
"""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.console import Console

from ..common.errors import ModelError
from ..common.fields import without_nan
from .options import Options
from .screen import Screen

if TYPE_CHECKING:
    from .evaluation import Acceptance


def _need_torch() -> None:
    if find_spec("torch") is None:
        raise ModelError("training needs PyTorch; install it with pip install 'entmtp[train]'")


def train(options: Options, progress: bool = True) -> Acceptance:
    """Train heads; returns how many tokens per step they give on held-out text.

    Raises:
        ModelError, ConvertError: it cannot be done; the text is one sentence.
        OSError: the disk is full. KeyboardInterrupt: after what there is was saved.
    """
    _need_torch()
    import torch

    from ..common.files import check_output
    from . import folder, forecast, plan, stages
    from .base import Base, read_matrices
    from .eagle3 import Layer
    from .export import writable

    screen, begin = Screen(progress), time.monotonic()
    check_output(options.outfile, [options.model, *options.data])
    p = plan.make(options)
    writable(*p.outputs)
    folder.check(p.work)
    folder.begin(p.work, p.text_digest, options.restart)
    plan.check_memory(p)
    plan.check_disk(p.needs.disk - folder.n_bytes(p.work), p.work)
    if options.n_threads:
        torch.set_num_threads(options.n_threads)

    embedding, output = map(torch.from_numpy, read_matrices(options.model))
    without_base = plan.resident()
    training = forecast.training_rate(p, embedding, output)
    inputs = p.shape.inputs if isinstance(p.shape, Layer) else ()
    base = Base(options.model, options.seq_len, options.n_threads, options.n_gpu_layers, inputs)
    try:
        rates = forecast.Rates(forecast.text_rate(p, base), training)
        stages.announce(p, without_base, rates, screen)
        texts, states = stages.write_text(p, base, screen)
        p, vocab = stages.choose_rows(p, base, texts, screen)
    finally:
        base.close()
    plan.give_back()

    lesson = stages.lesson(p, texts, states, vocab)
    teacher = stages.teacher(embedding, output, vocab)
    trainer = stages.train_heads(p, lesson, teacher, screen)
    acceptance = stages.write_files(p, lesson, trainer, output)
    screen.say(f"held-out tokens per step: {acceptance}")
    screen.say(stages.summary(p, trainer, time.monotonic() - begin))
    if not options.keep_work:
        folder.remove(p.work)
    return acceptance


def report(options: Options, as_json: bool = False) -> None:
    """Print how good the heads of a training are, what they bring here, and whether to go on.

    Raises:
        ModelError: there is no such training.
    """
    _need_torch()
    from . import plan, record
    from .base import Base
    from .price import measure_prices
    from .report import report, show

    p = plan.make(options)
    found = record.read(p)
    base = Base(options.model, 64, options.n_threads, options.n_gpu_layers)
    try:
        prices = measure_prices(base, p.facts, found.shape, found.outtype, [found.shape.lm_head])
    finally:
        base.close()
    told = report(found, prices)
    if as_json:
        print(json.dumps(without_nan(told), indent=2))
    else:
        show(told, Console())
