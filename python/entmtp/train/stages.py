"""The stages of a training, each from what the ones before left: text, draft vocabulary, states, heads, files."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ..common.errors import ModelError
from ..convert.draft_vocab import choose_vocab
from . import plan
from .base import Base
from .eagle3 import Layer, read_last
from .eagle3_file import write_eagle3
from .eagle3_loop import LayerTrainer
from .evaluation import Acceptance, Teacher
from .export import export, rounded
from .jobs import plan_jobs
from .loop import Report, Trainer
from .plan import Plan
from .screen import Screen, with_speed
from .states import States, Store, Texts
from .text import gather


@dataclass(frozen=True)
class Lesson:
    """What heads are trained on.

    Attributes:
        draft_vocab: base tokens that heads can propose, None for all.
        digest: of all that it depends on.
    """

    texts: Texts
    states: States
    draft_vocab: npt.NDArray[np.int64] | None
    digest: str


def announce(p: Plan, without_base: int, screen: Screen) -> None:
    """Say what will be done and what it takes.

    Args:
        without_base: bytes of memory that the process had before the base model was loaded.

    Raises:
        ModelError: the disk is too full.
    """
    o, size, n_tokens = p.options, p.needs, p.n_tokens
    what = "guesses in a row" if isinstance(p.shape, Layer) else "heads"
    memory = size.text + max(plan.resident(), without_base + size.training)
    screen.say(
        f"{o.arch}: {o.n_heads} {what}, {plan.n_parameters(p.shape, p.n_draft) / 1e6:.1f}M parameters, "
        f"{p.n_steps} steps of {o.batch_tokens} tokens\n"
        f"text: {n_tokens / 1e6:.2f}M tokens, "
        + (f"from {p.data}" if o.data else "written by the model itself")
        + f"\ndisk: {size.disk / 1e6:.0f} MB in {p.work}, of which {size.cache / 1e6:.0f} MB hidden states"
        f"\nmemory: {memory / 1e6:.0f} MB"
    )
    if n_tokens < o.n_tokens:
        screen.say(f"note: --cache-gb {o.cache_gb:g} holds {n_tokens} of the {o.n_tokens} tokens asked for")
    plan.check_disk(size.disk - plan.folder_bytes(p.work), p.work)


def prepare(p: Plan, base: Base, screen: Screen) -> Lesson:
    """Text, and what the base model thinks of it: made, or found in the work folder."""
    o = p.options
    with closing(Store(p.work, p.layout)) as store:
        with screen.phase("text ", p.n_tokens) as advance:
            jobs = plan_jobs(p.data, base, p.n_tokens, o.n_held_out, o.temps, o.own, o.made_up, o.seed, o.raw)
            gather(base, jobs, p.n_tokens, store, o.seed, with_speed(advance))
        texts, states = store.opened()
    draft_vocab = _draft_vocab(p, texts, screen)
    kept = None if draft_vocab is None else draft_vocab.tolist()
    return Lesson(texts, states, draft_vocab, plan.digest(p.text_digest, len(texts.tokens), kept))


def _draft_vocab(p: Plan, texts: Texts, screen: Screen) -> npt.NDArray[np.int64] | None:
    asked = p.options.draft_vocab
    if asked is None:
        return None
    size = None if asked == "auto" else int(asked)
    # of answers alone, and of documents: questions are nobody's to guess
    given = np.where(texts.given < texts.lengths, texts.given, 0)
    own = [texts[i][int(n) :] for i, n in enumerate(given)]
    vocab = choose_vocab(np.concatenate(own), p.facts.n_vocab, size, "training text")
    screen.say(f"draft vocabulary: {len(vocab.tokens)} tokens, {vocab.coverage:.1%} of the text")
    return vocab.tokens


def train_heads(p: Plan, lesson: Lesson, teacher: Teacher, screen: Screen) -> Trainer:
    """Heads at the last step, from the beginning or from a checkpoint.

    Raises:
        ModelError: there is a checkpoint and no --resume, or it is damaged; or the loss is no number any more.
    """
    o = p.options
    settings = replace(o.settings, eval_every=1, save_every=1)  # heads do not depend on these
    digest = plan.digest(lesson.digest, p.shape, p.n_steps, settings, p.facts.name)
    folder = p.work / f"{o.arch}-{digest}"
    folder.mkdir(exist_ok=True)
    rest = (o, p.n_steps, teacher, lesson.texts, lesson.states, folder, digest)
    trainer = (
        LayerTrainer(read_last(o.model, p.shape), p.shape, *rest)
        if isinstance(p.shape, Layer)
        else Trainer(p.shape, *rest)
    )
    if trainer.path.exists() and not o.resume:
        raise ModelError(
            f"{trainer.path}: this training was interrupted; go on with --resume, or begin anew with --restart"
        )
    if o.resume:
        trainer.resume()
    measured: Acceptance | None = None
    seen, started = 0, time.monotonic()
    with screen.phase("train ", p.n_steps) as advance:

        def show(report: Report) -> None:
            nonlocal measured, seen
            measured = report.acceptance or measured
            seen += report.n_tokens
            speed = seen / max(time.monotonic() - started, 1e-9)
            text = f"loss {report.loss:.3f}, {speed:.0f} tokens/s"
            if measured:
                text += f", {measured.chain:.2f} / {measured.tree:.2f} tokens per step"
            advance(report.step, text)

        trainer.run(show)
    return trainer


def write_files(p: Plan, lesson: Lesson, trainer: Trainer, output: torch.Tensor) -> Acceptance:
    """Write the heads, and measure them as they are written, in half precision.

    Args:
        output: the base model's whole projection.
    """
    o, facts = p.options, p.facts
    state = rounded(trainer.state)
    halves = {name: t.float() for name, t in state.items()}
    final = trainer.evaluate(halves)
    name = facts.name or o.model.name
    about: dict[str, str | int | float] = {
        "arch": o.arch,
        "base": name,
        "data": str(p.data) if o.data else "text of the base model itself",
        "tokens": len(lesson.texts.tokens),
        "steps": p.n_steps,
        "seed": o.seed,
        "chain": round(final.chain, 4),
        "tree16": round(final.tree, 4),
    }
    outfile, folder = p.outputs
    if isinstance(trainer, LayerTrainer):
        write_eagle3(
            outfile, trainer.shape, halves, trainer.scale, facts, lesson.draft_vocab, o.outtype, about
        )
    else:
        assert folder is not None and not isinstance(p.shape, Layer)
        export(folder, outfile, p.shape, state, o.model, name, output, lesson.draft_vocab, o.outtype, about)
    return final


def summary(p: Plan, trainer: Trainer, seconds: float) -> str:
    """What was written, and what it took."""
    outfile, folder = p.outputs
    size, n_steps = outfile.stat().st_size, trainer.step - trainer.began
    earlier = f" (after {trainer.began})" if trainer.began else ""
    both = f" and {folder}" if folder else ""
    return f"{outfile} ({size / 1e6:.1f} MB){both}, {n_steps} steps{earlier}, {seconds / 60:.1f} min"
