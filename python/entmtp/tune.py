"""`python -m entmtp.tune`: trees and their calibration for one base model, its heads, a task and this machine.

Three measurements, then a search without the model:

1. what a verify pass of n nodes and a draft of depth d cost here,
2. rank traces: plain rollouts of the prompts, with the running entropy before every token and, for each head, the rank
   of the token that really came. Under lossless acceptance a tree accepts exactly the longest prefix of real tokens
   whose rank path it contains, so the traces give the acceptance of any tree,
3. trees grown one node at a time by the probability that the node is accepted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from .atomic import atomic_path
from .bank import PLAIN, Bank, Paths, Tree, dumps
from .errors import EntmtpError
from .llama import Llama

MAX_RANK = 64  # a token ranked lower by a head counts as not guessed


def softmax_entropy(logits: npt.NDArray[np.float32]) -> float:
    """H = -sum p ln p of softmax(logits), nats."""
    x = logits.astype(np.float64)
    x -= x.max()
    p = np.exp(x)
    p /= p.sum()
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum())


def running_entropy(entropies: npt.NDArray[np.float64], window: float) -> npt.NDArray[np.float64]:
    """The decoder's estimate after each token: bias-corrected EMA, as in native/src/entropy.cpp."""
    decay = 1.0 - 2.0 / (window + 1.0)
    out, total, weight = np.empty_like(entropies), 0.0, 0.0
    for i, h in enumerate(entropies):
        total, weight = decay * total + (1 - decay) * h, decay * weight + (1 - decay)
        out[i] = total / weight
    return out


def rollout(llm: Llama, prompt: str, n_tokens: int, temp: float, seed: int) -> dict[str, npt.NDArray[Any]]:
    """One plain rollout with the ranks the heads gave to what came.

    Returns:
        entropy: entropy of the distribution each token was drawn from, [n].
        ranks: rank by head h, from the state after token i, of token i + 1 + h, [n, n_heads]; -1 where the text ends.
    """
    assert llm._heads is not None and llm._decoder is not None
    heads, dec = llm._heads, llm._decoder
    prefix = bool(heads.info.prefix)

    llm.set_seed(seed)
    prompt_tokens = llm.tokenize(prompt.encode(), add_bos=True)[: llm.n_ctx() // 2]
    tokens: list[int] = []
    states: list[npt.NDArray[np.float32]] = []
    entropies: list[float] = []

    if prefix:
        # the layer reads every state of the prompt: evaluate it token by token
        llm.reset()
        for i, token in enumerate(prompt_tokens):
            llm.eval([token])
            heads.prefix(dec.hidden()[None], i)

    for token in llm.generate(prompt_tokens, temp=temp, top_k=40, top_p=0.95, min_p=0.0):
        hidden = dec.hidden()
        states.append(heads.prefix(hidden[None], llm.n_tokens - 1) if prefix else hidden.copy())
        entropies.append(softmax_entropy(dec.logits(llm.n_vocab())))
        tokens.append(token)
        if len(tokens) >= n_tokens or token == llm.token_eos() or llm.n_tokens >= llm.n_ctx() - 1:
            break

    ranks = np.full((len(tokens), heads.n_heads), -1, dtype=np.int32)
    for i, state in enumerate(states):
        for h in range(min(heads.n_heads, len(tokens) - 1 - i)):
            logits = heads.logits(h, state, tokens[i : i + h + 1])
            rank = int((logits > logits[tokens[i + h + 1]]).sum())
            ranks[i, h] = min(rank, MAX_RANK)
    return {"entropy": np.array(entropies), "ranks": ranks}


def node_probabilities(ranks: npt.NDArray[np.int32], max_rank: int = 16) -> dict[tuple[int, ...], float]:
    """How often each rank path came true, over the positions where the text is long enough. {path: probability}"""
    n_heads = ranks.shape[1]
    counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(n_heads)]
    totals = [0] * n_heads
    for row in ranks:
        known = int((row >= 0).sum())
        for d in range(known):
            totals[d] += 1
            if row[: d + 1].max() < max_rank:
                counts[d][tuple(int(r) for r in row[: d + 1])] += 1
    return {path: c / totals[d] for d, by_path in enumerate(counts) for path, c in by_path.items()}


def grow(probabilities: dict[tuple[int, ...], float], n_nodes: int) -> Paths:
    """The n_nodes - 1 most probable paths below the root. A path is never more probable than its parent, so they form a
    tree; ties go to the shallower path."""
    order = sorted(probabilities, key=lambda p: (-probabilities[p], len(p), p))
    tree: list[tuple[int, ...]] = []
    for path in order:
        if len(tree) == n_nodes - 1:
            break
        if len(path) == 1 or path[:-1] in tree:
            tree.append(path)
    return tuple(sorted(tree, key=lambda p: (len(p), p)))


def measure_costs(
    llm: Llama, sizes: list[int], n_rounds: int, progress: Progress | None = None
) -> tuple[dict[int, float], list[float]]:
    """Median costs here, relative to a pass of one token; sizes and depths interleaved, so that drift cancels.

    Returns:
        verify: cost of a pass per number of nodes.
        draft: cost of a draft per depth, [n_heads + 1].
    """
    assert llm._heads is not None and llm._decoder is not None
    dec, n_heads = llm._decoder, llm._heads.n_heads
    wide = [Tree.from_paths(f"w{n}", [[r] for r in range(n - 1)]) for n in sizes if n > 1]
    deep = [Tree.from_paths(f"d{d}", [[0] * (i + 1) for i in range(d)]) for d in range(1, n_heads + 1)]
    bank = Bank("costs", (PLAIN, *wide, *deep))

    prompt = llm.tokenize(b"The quick brown fox jumps over the lazy dog. " * 8)[:64]
    times: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(bank.trees))}
    task = progress.add_task("verify and draft costs", total=n_rounds * len(bank.trees)) if progress else None
    dec.set_bank(bank, "off")
    llm.reset()
    llm.eval(prompt)
    n_past = llm.n_tokens
    for _ in range(n_rounds):
        for i in range(len(bank.trees)):
            dec.set_bank(bank, "static", i)
            dec.eval([prompt[-1]], n_past - 1)  # back to the prompt
            llm.reset_draft_stats()
            for k in range(
                6
            ):  # one step after another, as in a text: the graph of a shape is built once and reused
                dec.eval([prompt[k]], n_past + k)
            steps = llm.draft_stats.steps
            times[i] += [(int(s["t_draft_us"]), int(s["t_verify_us"])) for s in steps[1:]]
            if progress and task is not None:
                progress.advance(task)
    llm.reset()

    draft_us, verify_us = (
        {i: float(np.median([t[k] for t in ts])) for i, ts in times.items() if ts} for k in (0, 1)
    )
    unit = verify_us[0]
    verify = {1: 1.0} | {t.n_nodes: verify_us[1 + i] / unit for i, t in enumerate(wide)}
    draft = [0.0] + [draft_us[1 + len(wide) + i] / unit for i in range(len(deep))]
    return verify, draft


def tune(
    model: str | Path,
    heads: str | Path,
    prompts: list[str],
    *,
    name: str = "tuned",
    task: str | None = None,
    sizes: tuple[int, ...] = (2, 4, 8, 16, 32),
    temps: tuple[float, ...] = (0.0, 0.8),
    n_tokens: int = 128,
    n_bins: int = 4,
    ema_window: float = 8.0,
    n_threads: int | None = None,
    n_ctx: int = 2048,
    seed: int = 0,
    show_progress: bool = True,
) -> Bank:
    """A calibrated bank for a base model and its heads. See the module's text for how.

    Args:
        sizes: numbers of nodes of the trees, besides plain decoding.
        temps: sampling temperatures of the rollouts.
        n_tokens: tokens per rollout.
    """
    n_threads = n_threads or os.cpu_count() or 1
    llm = Llama(
        model, draft="entmtp", heads=heads, policy="off", n_ctx=n_ctx, verbose=False,
        n_threads=n_threads, n_threads_batch=n_threads,
    )  # fmt: skip
    try:
        with Progress(disable=not show_progress, transient=True) as progress:
            verify, draft = measure_costs(llm, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64], 3, progress)
            llm.set_trees(Bank("off", (PLAIN,)), policy="off")
            job = progress.add_task("rollouts", total=len(prompts) * len(temps))
            traces = []
            for i, prompt in enumerate(prompts):
                for temp in temps:
                    traces.append(rollout(llm, prompt, n_tokens, temp, seed + i))
                    progress.advance(job)
    finally:
        arch = llm._heads.arch if llm._heads else ""
        llm.close()

    entropy = np.concatenate([running_entropy(t["entropy"], ema_window) for t in traces])
    ranks = np.concatenate([t["ranks"] for t in traces])
    edges = np.quantile(entropy, np.arange(1, n_bins) / n_bins).round(3)
    bins = np.searchsorted(edges, entropy, side="right")

    overall = node_probabilities(ranks)
    trees = [PLAIN] + [Tree(f"n{n}", grow(overall, n)) for n in sizes]
    per_bin = [node_probabilities(ranks[bins == b]) for b in range(n_bins)]
    acceptance = tuple(
        tuple(tuple(round(p.get(path, 0.0), 4) for path in tree.paths) for tree in trees) for p in per_bin
    )
    return Bank(
        name=name,
        trees=tuple(trees),
        source=f"python -m entmtp.tune, {len(prompts)} prompts, {len(ranks)} tokens at temperatures {list(temps)}",
        task=task,
        heads=f"{arch}: {Path(heads).name}",
        device=f"{platform.machine()}, {n_threads} threads",
        ema_window=ema_window,
        bin_edges=tuple(float(e) for e in edges),
        acceptance=acceptance,
        verify_cost={n: round(c, 3) for n, c in verify.items()},
        draft_cost=tuple(round(c, 3) for c in draft),
    )


def read_prompts(path: str | Path, limit: int | None = None) -> list[str]:
    """The `prompt` of each line of a JSONL file; Spec-Bench's `turns` count by their first."""
    prompts = []
    for i, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            prompts.append(item["prompt"] if "prompt" in item else item["turns"][0])
        except (json.JSONDecodeError, KeyError, IndexError, TypeError):
            raise ValueError(f"{path}, line {i}: expected a JSON object with a text field prompt") from None
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts[:limit]


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m entmtp.tune",
        description="Grow and calibrate a bank of trees for a base model and its heads, on this machine.",
        epilog="example: python -m entmtp.tune --model model.gguf --heads heads.gguf --prompts my.jsonl -o bank.json; "
        'then Llama(..., trees="bank.json")',
    )
    parser.add_argument("--model", required=True, help="base model (GGUF)")
    parser.add_argument("--heads", required=True, help="its heads, from python -m entmtp.convert")
    parser.add_argument("--prompts", required=True, help="JSONL, one object with a field prompt per line")
    parser.add_argument("-o", "--outfile", required=True, help="bank to write (JSON)")
    parser.add_argument("--task", help="what the prompts are, kept in the bank")
    parser.add_argument("--name", help="name of the bank (default: the file's)")
    parser.add_argument("--limit", type=int, help="use the first N prompts only")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per rollout (default: 128)")
    parser.add_argument(
        "--temp", type=float, nargs="+", default=[0.0, 0.8], help="temperatures (default: 0 and 0.8)"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="nodes per tree")
    parser.add_argument("--bins", type=int, default=4, help="entropy bins (default: 4)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--ctx", type=int, default=2048, help="context length (default: 2048)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = setup_arg_parser().parse_args(argv)
    out = Path(args.outfile)
    try:
        prompts = read_prompts(args.prompts, args.limit)
        bank = tune(
            args.model, args.heads, prompts,
            name=args.name or out.stem, task=args.task, sizes=tuple(args.sizes), temps=tuple(args.temp),
            n_tokens=args.tokens, n_bins=args.bins, n_threads=args.threads, n_ctx=args.ctx,
        )  # fmt: skip
        with atomic_path(out) as temporary:
            temporary.write_text(dumps(bank), "utf-8")
    except (EntmtpError, ValueError, OSError) as e:
        print(f"entmtp.tune: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("entmtp.tune: interrupted, nothing was written", file=sys.stderr)
        return 130
    for tree, cost, row in zip(bank.trees, bank.step_costs(), bank.expected().T, strict=True):
        accepted = " ".join(f"{e:.2f}" for e in row)
        print(
            f"{tree.name:>6}: {tree.n_nodes:2d} nodes, step cost {cost:.2f}, accepted per entropy bin {accepted}"
        )
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
