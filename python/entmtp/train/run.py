"""Draft heads for a model, trained on the machine that will run them.

1. text: the user's, and what the base model itself writes (text.py),
2. hidden states and distributions of the very GGUF that will verify, in files (states.py),
3. training: each head learns the base model's distribution a few tokens ahead (loop.py, loss.py),
4. a heads file, and the published PyTorch layout (export.py).
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..common.errors import ModelError
from .options import Options
from .screen import Screen, with_speed

if TYPE_CHECKING:
    from .evaluation import Acceptance


def train(options: Options, progress: bool = True) -> Acceptance:
    """Train heads; returns how many tokens per step they give on held-out text.

    Raises:
        ModelError, ConvertError: it cannot be done; the text is one sentence.
        OSError: the disk is full. KeyboardInterrupt: after what there is was saved.
    """
    try:
        import torch
    except ImportError as e:
        raise ModelError("training needs PyTorch; install it with pip install 'entmtp[train]'") from e
    from ..models.base import read_base
    from . import plan
    from .base import Base, read_matrices
    from .evaluation import Teacher, evaluate
    from .export import export, rounded, writable
    from .heads import Shape
    from .loop import Report, Settings, Trainer
    from .states import Layout, record
    from .text import gather, plan_jobs, read_data

    o, screen = options, Screen(progress)
    begin = time.monotonic()
    if o.outfile.is_dir() or not o.outfile.absolute().parent.is_dir():
        raise ModelError(
            f"{o.outfile}: cannot be written, for its folder is missing or it is a folder; change -o"
        )
    writable(o.outfile)
    facts = read_base(o.model)
    prefix: dict[str, Any] = {}
    if o.arch == "hydra++":
        n_head = int(facts.get("attention.head_count"))
        prefix = {
            "n_head": n_head,
            "n_head_kv": int(facts.keys.get("attention.head_count_kv") or n_head),
            "n_ff": int(facts.get("feed_forward_length")),
            "rms_eps": float(facts.get("attention.layer_norm_rms_epsilon")),
            "rope_base": float(facts.keys.get("rope.freq_base") or 10000.0),
        }
    shape = Shape(o.arch, o.n_heads, o.n_layers, facts.n_embd, o.share_lm_head, **prefix)
    data = read_data(o.data)

    work = o.work or o.outfile.with_name(o.outfile.name + ".train")
    if o.restart and work.is_dir():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    if o.n_threads:
        torch.set_num_threads(o.n_threads)

    # how much text there is room for
    k = min(o.k, facts.n_vocab if not isinstance(o.draft_vocab, int) else o.draft_vocab)
    per_token = Layout(1, facts.n_embd, k).bytes_per_token
    n_tokens = min(o.n_tokens, int(o.cache_gb * 1e9 / per_token) - o.seq_len)
    if n_tokens < 8 * o.seq_len:
        raise ModelError(f"--cache-gb {o.cache_gb:g} holds too few hidden states; give more")
    n_draft = o.draft_vocab if isinstance(o.draft_vocab, int) else facts.n_vocab
    settings = Settings(
        n_steps=max(1, round(o.epochs * n_tokens / o.settings.get("batch_tokens", 4096))),
        bf16=_has_bf16() if o.bf16 is None else o.bf16,
        seed=o.seed,
        **o.settings,
    )
    size = plan.needs(shape, settings, Layout(n_tokens, facts.n_embd, k), facts.n_vocab, n_draft)

    mend = "give another --work, or --restart to begin anew"
    text_digest = plan.digest(
        facts.fingerprint,
        o.model.stat().st_size,
        data,
        n_tokens,
        o.seq_len,
        o.own,
        o.temps,
        o.n_held_out,
        o.seed,
    )
    plan.claim(work, "texts", text_digest, mend)

    matrices = read_matrices(o.model)
    embedding, output = (torch.from_numpy(m) for m in matrices)
    without_base = plan.resident()
    base = Base(o.model, o.seq_len, o.n_threads, o.n_gpu_layers)
    try:
        screen.say(
            f"{o.arch}: {o.n_heads} heads, {plan.n_parameters(shape, n_draft) / 1e6:.1f}M parameters, "
            f"{settings.n_steps} steps of {settings.batch_tokens} tokens\n"
            f"text: {n_tokens / 1e6:.2f}M tokens, "
            + (f"from {data}" if o.data else "written by the model itself")
            + f"\ndisk: {size.disk / 1e6:.0f} MB in {work}, of which {size.cache / 1e6:.0f} MB hidden states"
            f"\nmemory: {(size.text + max(plan.resident(), without_base + size.training)) / 1e6:.0f} MB"
        )
        if n_tokens < o.n_tokens:
            screen.say(
                f"note: --cache-gb {o.cache_gb:g} holds {n_tokens} of the {o.n_tokens} tokens asked for"
            )
        plan.check_disk(size.disk - plan.folder_bytes(work), work)

        with screen.phase("text  ", n_tokens) as advance:
            jobs = plan_jobs(data, base, n_tokens, o.n_held_out, o.temps, o.own, o.seed)
            texts = gather(base, jobs, n_tokens, work, o.seed, with_speed(advance))

        draft_vocab = None
        if o.draft_vocab is not None:
            from ..convert.draft_vocab import choose_vocab

            vocab = choose_vocab(
                texts.tokens,
                base.n_vocab,
                None if o.draft_vocab == "auto" else int(o.draft_vocab),
                "training text",
            )
            draft_vocab = vocab.tokens
            screen.say(f"draft vocabulary: {len(draft_vocab)} tokens, {vocab.coverage:.1%} of the text")
        layout = Layout(len(texts.tokens), facts.n_embd, k)
        plan.claim(
            work,
            "states",
            plan.digest(text_digest, layout, None if draft_vocab is None else draft_vocab.tolist()),
            mend,
        )
        with screen.phase("states", layout.n_tokens) as advance:
            states = record(
                base,
                texts,
                layout,
                work,
                None if draft_vocab is None else draft_vocab.tolist(),
                with_speed(advance),
            )
    finally:
        base.close()

    teacher = Teacher(
        embedding, output if draft_vocab is None else output[torch.from_numpy(draft_vocab)], draft_vocab
    )
    digest = plan.digest(
        text_digest,
        layout,
        shape,
        replace(settings, eval_every=0, save_every=0),
        o.draft_vocab,
        str(facts.name),
    )
    folder = work / f"{o.arch}-{digest}"
    folder.mkdir(exist_ok=True)
    trainer = Trainer(shape, settings, teacher, texts, states, folder, digest)
    if trainer.path.exists() and not o.resume:
        raise ModelError(
            f"{trainer.path}: this training was interrupted; go on with --resume, or begin anew with --restart"
        )
    if o.resume:
        trainer.resume()
    measured: Acceptance | None = None
    first, seen, started = trainer.step, 0, time.monotonic()

    with screen.phase("train ", settings.n_steps) as advance:

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

    state = rounded(trainer.state)
    final = evaluate(shape, {name: t.float() for name, t in state.items()}, teacher, texts, states)
    torch_folder = o.torch_folder or o.outfile.with_suffix("")
    about: dict[str, str | int | float] = {
        "arch": o.arch,
        "base": facts.name or o.model.name,
        "data": str(data) if o.data else "text of the base model itself",
        "tokens": len(texts.tokens),
        "steps": settings.n_steps,
        "seed": o.seed,
        "chain": round(final.chain, 4),
        "tree16": round(final.tree, 4),
    }
    export(
        torch_folder,
        o.outfile,
        shape,
        state,
        o.model,
        facts.name or o.model.name,
        output,
        draft_vocab,
        o.outtype,
        about,
    )
    screen.say(f"held-out tokens per step: {final}")
    minutes = (time.monotonic() - begin) / 60
    steps = f"{trainer.step - first} steps" + (f" (after {first})" if first else "")
    screen.say(
        f"{o.outfile} ({o.outfile.stat().st_size / 1e6:.1f} MB) and {torch_folder}, {steps}, {minutes:.1f} min"
    )
    if not o.keep_work:
        shutil.rmtree(work)
    return final


def _has_bf16() -> bool:
    """The CPU multiplies in bfloat16, so that it gains."""
    import torch

    ops = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(ops and ops())
