"""The stages of a training, each from what the ones before left: text and states, draft vocabulary, heads, files."""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ..common.atomic import atomic_path
from ..common.errors import ModelError
from ..convert.draft_vocab import ranked
from . import choice, plan, record
from .base import Base
from .eagle3 import Layer
from .eagle3_file import write_eagle3
from .eagle3_loop import LayerTrainer, new_trainer
from .evaluation import Acceptance, Teacher, acceptance
from .export import export, rounded
from .forecast import Rates, minutes
from .heads import Shape
from .jobs import plan_jobs
from .loop import Report, Trainer
from .options import PRESETS
from .plan import Plan
from .price import LM_HEADS, measure_prices
from .screen import Screen, with_speed
from .states import States, Store, Texts, read_texts
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


def announce(p: Plan, without_base: int, rates: Rates, screen: Screen) -> None:
    """Say what will be done and what it takes.

    Args:
        without_base: bytes of memory that the process had before the base model was loaded.
    """
    o, size, n_tokens = p.options, p.needs, p.n_tokens
    what = "guesses in a row" if isinstance(p.shape, Layer) else "heads"
    memory = size.text + max(plan.resident(), without_base + size.training)
    bound = "at most " if p.is_open else ""
    writing, training = rates.seconds(o, n_tokens, read_texts(p.work).n_tokens)
    screen.say(
        f"{o.arch}: {o.n_heads} {what}, {bound}{plan.n_parameters(p.shape, p.n_draft) / 1e6:.1f}M parameters, "
        f"{p.n_steps} steps of {o.batch_tokens} tokens\n"
        f"text: {n_tokens / 1e6:.2f}M tokens, "
        + (f"from {p.data}" if o.data else "written by the model itself")
        + f"\ntime: {minutes(writing + training)}, of which {minutes(writing)} for the text and {minutes(training)} "
        f"for training\ndisk: {bound}{size.disk / 1e6:.0f} MB in {p.work}, of which {size.cache / 1e6:.0f} MB hidden "
        f"states\nmemory: {bound}{memory / 1e6:.0f} MB"
    )
    if not (o.resume or o.data):
        presets = (f"{name} {minutes(sum(rates.preset(o, name)))}" for name in PRESETS)
        screen.say(f"presets would take here: {', '.join(presets)}")
    if n_tokens < o.n_tokens:
        screen.say(f"note: --cache-gb {o.cache_gb:g} holds {n_tokens} of the {o.n_tokens} tokens asked for")


def write_text(p: Plan, base: Base, screen: Screen) -> tuple[Texts, States]:
    """Text, and what the base model thinks of it: made, or found in the work folder."""
    o = p.options
    with closing(Store(p.work, p.layout)) as store:
        with screen.phase("text ", p.n_tokens) as advance:
            jobs = plan_jobs(p.data, base, p.n_tokens, o.n_held_out, o.temps, o.own, o.made_up, o.seed, o.raw)
            gather(base, jobs, p.n_tokens, store, o.seed, with_speed(advance))
        return store.opened()


def choose_rows(
    p: Plan, base: Base, texts: Texts, screen: Screen
) -> tuple[Plan, npt.NDArray[np.int64] | None]:
    """The plan with what was left open in it, and the tokens that heads can propose, None for all.

    What this machine's timing decided is kept in the work folder: a run that goes on trains the same heads.
    """
    o, n_vocab = p.options, p.facts.n_vocab
    if o.draft_vocab is None and not p.is_open:
        return p, None
    # of answers alone, and of documents: questions are nobody's to guess
    given = np.where(texts.given < texts.lengths, texts.given, 0)
    order, coverage = ranked(np.concatenate([texts[i][int(n) :] for i, n in enumerate(given)]), n_vocab)
    if p.is_open:
        lm_head, n_rows = _choice(p, base, coverage, screen)
    else:
        lm_head, n_rows = p.shape.lm_head, p.n_draft
        screen.say(choice.covered(n_rows, coverage))
    p = replace(p, shape=_with(p.shape, lm_head), n_draft=n_rows, is_open=False)
    return p, None if n_rows == n_vocab else np.sort(order[:n_rows])


def _with(shape: Shape | Layer, lm_head: str) -> Shape | Layer:
    """An EAGLE-3 layer has a projection of its own."""
    return shape if isinstance(shape, Layer) else replace(shape, lm_head=lm_head)


def _choice(p: Plan, base: Base, coverage: npt.NDArray[np.float64], screen: Screen) -> tuple[str, int]:
    """Kind of projections and number of their rows, by measured costs."""
    o = p.options
    digest = plan.digest(p.text_digest, p.shape, o.lm_head, o.draft_vocab, o.outtype)
    path = p.work / f"choice-{digest}.json"
    if path.exists():
        kept = json.loads(path.read_text("utf-8"))
    else:
        kinds = (p.shape.lm_head,) if isinstance(p.shape, Layer) or o.lm_head != "auto" else LM_HEADS
        counts = choice.sizes(p.facts.n_vocab) if o.draft_vocab == "auto" else [p.n_draft]
        free = plan.available()

        def fits(lm_head: str, n_rows: int) -> bool:
            size = plan.needs(_with(p.shape, lm_head), o, p.layout, p.facts.n_vocab, n_rows)
            return free is None or size.training < free + plan.resident()

        screen.say("measuring what heads cost here")
        prices = measure_prices(base, p.facts, p.shape, o.outtype, kinds)
        found = choice.choose(prices, p.shape, coverage, kinds, counts, fits)
        if not found:
            raise ModelError(
                f"training takes more than the {free or 0:.2g} bytes of memory that are free; give a smaller "
                "--draft-vocab or --batch-tokens"
            )
        best = found[0]
        left = [kind for kind in kinds if kind not in {c.lm_head for c in found}]
        by_cost = o.draft_vocab == "auto"
        said = [
            choice.why(prices, p.shape, best, coverage) if by_cost else choice.covered(best.n_rows, coverage)
        ]
        said += [choice.compared(found, left)] if len(kinds) > 1 else []
        kept = {"lm_head": best.lm_head, "n_rows": best.n_rows, "said": said}
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(kept), "utf-8")
    for sentence in kept["said"]:
        screen.say(sentence)
    return kept["lm_head"], kept["n_rows"]


def teacher(embedding: torch.Tensor, output: torch.Tensor, vocab: npt.NDArray[np.int64] | None) -> Teacher:
    """The base model's matrices, with the rows that heads can propose."""
    return Teacher(embedding, output if vocab is None else output[torch.from_numpy(vocab)], vocab)


def lesson(p: Plan, texts: Texts, states: States, vocab: npt.NDArray[np.int64] | None) -> Lesson:
    """What there is to learn."""
    kept = None if vocab is None else vocab.tolist()
    return Lesson(texts, states, vocab, plan.digest(p.text_digest, len(texts.tokens), kept))


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
    record.begin(folder, p, lesson.draft_vocab)
    trainer = new_trainer(p.shape, o, p.n_steps, teacher, lesson.texts, lesson.states, folder, digest)
    if trainer.path.exists() and not o.resume:
        raise ModelError(
            f"{trainer.path}: this training was interrupted; go on with --resume, or begin anew with --restart"
        )
    if o.resume:
        trainer.resume()
    n = plan.n_parameters(p.shape, p.n_draft)
    screen.say(f"training {n / 1e6:.1f}M parameters, {p.n_steps - trainer.step} steps")
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
    judged = trainer.judge(halves)
    final = acceptance(judged)
    name = facts.name or o.model.name
    about: dict[str, str | int | float] = {
        "arch": o.arch,
        "lm_head": p.shape.lm_head,
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
        record.finish(folder, p, trainer, judged)
    return final


def summary(p: Plan, trainer: Trainer, seconds: float) -> str:
    """What was written, and what it took."""
    outfile, folder = p.outputs
    size, n_steps = outfile.stat().st_size, trainer.step - trainer.began
    earlier = f" (after {trainer.began})" if trainer.began else ""
    both = f" and {folder}" if folder else ""
    return f"{outfile} ({size / 1e6:.1f} MB){both}, {n_steps} steps{earlier}, {seconds / 60:.1f} min"
