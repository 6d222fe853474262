"""Draft heads for a model, trained on the machine that will run them.

1. plan: what the model, the data and the options make of it, and what it takes (plan.py),
2. text: the user's, and what the base model itself writes (text.py),
3. hidden states and distributions of the very GGUF that will verify, in files (states.py),
4. training: each head learns the base model's distribution a few tokens ahead (loop.py, loss.py),
5. a heads file, and the published PyTorch layout (export.py).
"""

from __future__ import annotations

import shutil
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..common.errors import ModelError
from .options import Options
from .screen import Screen

if TYPE_CHECKING:
    from .evaluation import Acceptance


def train(options: Options, progress: bool = True) -> Acceptance:
    """Train heads; returns how many tokens per step they give on held-out text.

    Raises:
        ModelError, ConvertError: it cannot be done; the text is one sentence.
        OSError: the disk is full. KeyboardInterrupt: after what there is was saved.
    """
    if find_spec("torch") is None:
        raise ModelError("training needs PyTorch; install it with pip install 'entmtp[train]'")
    import torch

    from . import plan, stages
    from .base import Base, read_matrices
    from .eagle3 import Layer
    from .evaluation import Teacher
    from .export import writable

    screen, begin = Screen(progress), time.monotonic()
    writable(options.outfile)
    p = plan.make(options)
    if options.restart and p.work.is_dir():
        shutil.rmtree(p.work)
    p.work.mkdir(parents=True, exist_ok=True)
    plan.claim(p.work, "texts", p.text_digest)
    if options.n_threads:
        torch.set_num_threads(options.n_threads)

    embedding, output = map(torch.from_numpy, read_matrices(options.model))
    without_base = plan.resident()
    inputs = p.shape.inputs if isinstance(p.shape, Layer) else ()
    base = Base(options.model, options.seq_len, options.n_threads, options.n_gpu_layers, inputs)
    try:
        stages.announce(p, without_base, screen)
        lesson = stages.prepare(p, base, screen)
    finally:
        base.close()

    vocab = lesson.draft_vocab
    teacher = Teacher(embedding, output if vocab is None else output[torch.from_numpy(vocab)], vocab)
    trainer = stages.train_heads(p, lesson, teacher, screen)
    acceptance = stages.write_files(p, lesson, trainer, output)
    screen.say(f"held-out tokens per step: {acceptance}")
    screen.say(stages.summary(p, trainer, time.monotonic() - begin))
    if not options.keep_work:
        shutil.rmtree(p.work)
    return acceptance
