"""Pictures of a tuned bank and of benchmark reports. Needs matplotlib (the plot extra)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..bank.bank import Bank
from ..bank.costs import N_VERIFY, from_json
from ..bank.tree import PLAIN, Tree
from ..common.atomic import atomic_path


def pyplot() -> Any:
    """matplotlib.pyplot with a backend that needs no screen.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install 'entmtp[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"figure.dpi": 130, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "text.parse_math": False}
    )  # fmt: skip
    return plt


@contextmanager
def of_file(path: Path) -> Iterator[None]:
    """Errors of drawing what a file holds, which may be anybody's, name it.

    Raises:
        ValueError: it holds something else than reports of this version.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, StopIteration) as e:
        what = f"{type(e).__name__}: {e}"
        raise ValueError(f"{path} cannot be drawn: it is no report of this version ({what:.100})") from e


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all, and close it."""
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot().close(figure)
    return path


def plot_bank(bank: Bank, path: Path) -> list[Path]:
    """Four PNG files beside the bank's own: costs, fronts, trees, and a text with the trees chosen along it.

    Raises:
        BankError: the bank has no costs.
        ValueError: matplotlib is missing, or the bank was not made by the tuner.
    """
    if bank.is_for_auto or (bank.heads is None and "held_out" in bank.report):
        raise ValueError(f"bank {bank.name} is of a model without heads: it holds no trees to draw")
    if not {"front", "text", "held_out"} <= set(bank.report):
        raise ValueError(
            f"bank {bank.name} holds no report of the tuner: only banks by entmtp tune can be drawn"
        )
    figures = {
        "costs": cost_curve(bank),
        "fronts": fronts(bank),
        "trees": trees(bank),
        "text": along_text(bank),
    }
    return [save(f, path.with_name(f"{path.stem}-{name}.png")) for name, f in figures.items()]


def cost_curve(bank: Bank) -> Any:
    """Cost of a pass by number of tokens, and of the drafts."""
    plt = pyplot()
    costs = bank.need_costs()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 2))
    n = np.arange(1, N_VERIFY + 1)
    for depth, row in sorted(costs.verify.items()):
        left.plot(n, costs.curve(depth) / 1e3, lw=1.5)
        left.plot(list(row), [us / 1e3 for us in row.values()], "o", ms=3, color=left.lines[-1].get_color())
        left.lines[-2].set_label(f"context {depth}")
    plain = costs.curve()[0] / 1e3
    top = max(float(costs.curve(d).max()) for d in costs.verify) / 1e3
    left.plot(n, np.minimum(plain * n, top), ls=":", color="gray", label="one pass per token")
    left.axhline(plain, ls="--", color="gray", lw=1, label="free")
    left.set(xlabel="tokens in one pass", ylabel="ms", title="Verify", ylim=(0, None), xlim=(0, None))
    left.legend(frameon=False)
    right.plot(range(len(costs.chain)), [us / 1e3 for us in costs.chain], "o-", label="chain, one graph")
    for i, w in enumerate((1, 2, 4)):
        total = np.cumsum([row[i] for row in costs.level]) / 1e3
        right.plot(range(1, len(total) + 1), total, "s--", ms=4, label=f"level by level, {w} wide")
    right.set(xlabel="depth", ylabel="ms", title="Draft", ylim=(0, None))
    right.legend(frameon=False)
    figure.suptitle(bank.device or "", fontsize=9)
    return figure


def fronts(bank: Bank) -> Any:
    """Tokens per step and tokens per second of the best tree of every size."""
    plt = pyplot()
    front = np.array(bank.report["front"], dtype=float)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.step(front[:, 0], front[:, 1], where="post")
    left.set(xlabel="nodes", ylabel="tokens per step", title="Acceptance front", ylim=(1, None))
    speed = front[:, 2] / front[0, 2]
    right.plot(front[:, 0], speed, ".-")
    best = int(np.argmax(speed))
    mark = {"ms": 9, "mfc": "none", "color": "tab:red", "label": f"{front[best, 0]:.0f} nodes"}
    right.plot(front[best, 0], speed[best], "o", **mark)
    right.axhline(1.0, ls="--", color="gray", lw=1, label="plain decoding")
    right.set(xlabel="nodes", ylabel="speed against plain decoding", title="Throughput front", ylim=(0, None))
    right.legend(frameon=False)
    return figure


def draw_tree(axes: Any, tree: Tree, acceptance: Any = None) -> None:
    """A tree, root at the top; nodes the darker the likelier they are accepted, with their rank."""
    plt = pyplot()
    paths = [(), *tree.paths]
    children = {p: [q for q in tree.paths if q[:-1] == p] for p in paths}
    place: dict[Any, tuple[float, float]] = {}
    cursor = 0.0

    def layout(path: Any) -> float:
        nonlocal cursor
        if not children[path]:
            x, cursor = cursor, cursor + 1.0
        else:
            xs = [layout(c) for c in children[path]]
            x = (xs[0] + xs[-1]) / 2
        place[path] = (x, -len(path))
        return x

    layout(())
    shade = {(): 1.0} | dict(
        zip(tree.paths, acceptance if acceptance is not None else [0.5] * len(tree.paths), strict=True)
    )
    size = 120 if len(paths) <= 16 else 40
    for path in tree.paths:
        (x0, y0), (x1, y1) = place[path[:-1]], place[path]
        axes.plot([x0, x1], [y0, y1], color="gray", lw=0.8, zorder=1)
    for path in paths:
        x, y = place[path]
        axes.scatter([x], [y], s=size, color=plt.cm.viridis(1.0 - shade[path] ** 0.5), zorder=2)
        if len(paths) <= 16 and path:
            axes.text(x, y, str(path[-1]), ha="center", va="center", fontsize=7, color="white", zorder=3)
    axes.set_title(f"{tree.name}: {tree.n_nodes} nodes", fontsize=9)
    axes.set(xlim=(-0.7, max(cursor, 1.0) - 0.3), ylim=(-tree.max_depth - 0.5, 0.5))
    axes.axis("off")


def trees(bank: Bank) -> Any:
    """Every tree of the bank; acceptance averaged over the entropy bins."""
    plt = pyplot()
    shown = [i for i, t in enumerate(bank.trees) if t.paths] or [0]
    rows = -(-len(shown) // 4)
    figure, axes = plt.subplots(
        rows, min(len(shown), 4), figsize=(2.8 * min(len(shown), 4) + 1, 2.4 * rows), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, shown, strict=False):
        acceptance = None if bank.acceptance is None else np.mean([b[i] for b in bank.acceptance], axis=0)
        draw_tree(axis, bank.trees[i], acceptance)
    return figure


def along_text(bank: Bank) -> Any:
    """Entropy along one held-out text, and under it the size of the tree that the entropy policy chose."""
    plt = pyplot()
    text = bank.report["text"]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 5), sharex=True, height_ratios=(3, 2))
    top.plot(text["entropy"], lw=0.7, color="tab:gray", label="entropy")
    top.plot(text["position"], text["running"], lw=1.6, color="tab:blue", label="running estimate")
    for edge in bank.bin_edges:
        top.axhline(edge, ls=":", lw=0.8, color="tab:red")
    top.set(ylabel="nats", title=f"Held-out text, window {bank.ema_window:g} tokens")
    top.legend(frameon=False, loc="upper right")
    sizes = [bank.trees[i].n_nodes if i < len(bank.trees) else PLAIN.n_nodes for i in text["tree"]]
    bottom.bar(text["position"], sizes, width=1.0, align="edge", color="tab:green")
    bottom.set(xlabel="token", ylabel="nodes in the pass")
    return figure


def plot_study(report: dict[str, Any], path: Path) -> Path:
    """`bench study`: speed against plain decoding, live as bars, with replay's prediction."""
    plt = pyplot()
    shown = [
        "published 63-node tree", "best single tree", "EntMTP, entropy", "EntMTP, confidence", "EntMTP, untuned",
    ]  # fmt: skip
    studies = report["studies"]
    labels = [f"{s['model'].removeprefix('demo-')}\n{s['heads']}\nT={s['temp']:g}" for s in studies]
    x = np.arange(len(studies))
    figure, axes = plt.subplots(figsize=(1.1 * len(studies) + 2.5, 4.2))
    for i, method in enumerate(shown):
        rows = [s["tasks"]["all"][method] for s in studies]
        at = x + 0.16 * (i - 2)
        # where nothing could be compared there is no bar
        median, low, high = np.array([r["ratio"] or [np.nan] * 3 for r in rows]).T
        axes.bar(at, median, 0.15, label=method)
        axes.errorbar(at, median, [median - low, high - median], fmt="none", ecolor="black", elinewidth=0.7)
        predicted = np.array([np.nan if r["predicted"] is None else r["predicted"] for r in rows])
        axes.plot(at, predicted, "_", color="black", ms=9)
    axes.axhline(1.0, ls="--", color="gray", lw=1)
    axes.set(xticks=x, ylabel="speed against plain decoding", ylim=(0, None), title="Held-out prompts")
    axes.set_xticklabels(labels, fontsize=7)
    axes.legend(frameon=False, fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return save(figure, path)


def plot_curves(report: dict[str, Any], path: Path) -> Path:
    """`bench curve`: cost of a pass, 1 for one token with the first kernels."""
    plt = pyplot()
    curves = report["curves"]
    contexts = sorted({p["context"] for c in curves for p in c["passes"]})
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 3.1 * rows), squeeze=False, sharex=True
    )
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    styles = ("-", "--", ":")
    for axis, curve in zip(axes.flat, curves, strict=False):
        sets = list(dict.fromkeys(p["kernels"] for p in curve["passes"]))
        for depth, style in zip(contexts, styles, strict=False):
            here = [p for p in curve["passes"] if p["context"] == depth and p["n"] <= 32]
            base = next(p["ms"] for p in here if p["kernels"] == sets[0])
            for i, name in enumerate(sets):
                at = [(p["n"], p["ms"] / base) for p in here if p["kernels"] == name]
                look = {"color": ("tab:gray", "tab:blue", "tab:green")[i % 3], "marker": ".", "ms": 4}
                axis.plot(*zip(*at, strict=True), style, label=f"{name}, {depth}", **look)
        axis.axhline(1.0, color="black", lw=0.6)
        axis.set(title=curve["model"], ylim=(0, None), xlim=(0, 33))
    for axis in axes[-1]:
        axis.set(xlabel="tokens in one pass")
    for row in axes:
        row[0].set(ylabel=f"cost, 1 = one token, {sets[0]}")
    axes[0][0].legend(frameon=False, fontsize=7, title="kernels, context", title_fontsize=7)
    figure.suptitle(f"{report.get('machine', '')}, {report.get('threads', '?')} threads", fontsize=9)
    return save(figure, path)


def plot_heads(report: dict[str, Any], path: Path) -> Path:
    """`bench heads`: what a draft costs and brings, and the speed it gives."""
    plt = pyplot()
    rows = report["heads"]
    kinds = list(dict.fromkeys((r["checkpoint"], r["form"]) for r in rows))
    types = list(dict.fromkeys(r["type"] for r in rows))
    colors = {kind: f"C{i % 10}" for i, kind in enumerate(kinds)}
    markers = {kind: "osD^vP*X"[i % 8] for i, kind in enumerate(types)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for r in rows:
        kind = (r["checkpoint"], r["form"])
        look = {"color": colors[kind], "marker": markers[r["type"]], "ls": "none", "ms": 6, "alpha": 0.85}
        left.plot(r["draft_us"][-1], r["chain"], **look)
        if r["speedup"] is not None:
            error = [[r["speedup"] - r["speedup_low"]], [r["speedup_high"] - r["speedup"]]]
            right.errorbar(r["bytes"] / 1e6, r["speedup"], yerr=error, elinewidth=0.6, **look)
    depth = max(len(r["draft_us"]) for r in rows)
    left.set(xlabel=f"draft of {depth} levels, µs", ylabel=f"tokens per step, chain of {depth}",
             title="What a draft costs and brings", xlim=(0, None), ylim=(1, None))  # fmt: skip
    right.axhline(1.0, ls="--", color="gray", lw=1)
    right.set(xlabel="heads file, MB", ylabel="speed against plain decoding", title="EntMTP", xlim=(0, None))
    several = len({name for name, _ in kinds}) > 1
    for (name, form), color in colors.items():
        left.plot([], [], "s", color=color, label=f"{name}, {form}" if several else form)
    for kind, marker in markers.items():
        left.plot([], [], marker, color="gray", label=kind)
    left.legend(frameon=False, fontsize=7)
    figure.suptitle(f"{report.get('model', '')}; {report.get('device', '')}", fontsize=9)
    return save(figure, path)


def plot_gpu(report: dict[str, Any], path: Path) -> Path:
    """`bench gpu`: cost curves, and tokens/s of EntMTP and of the 63-node tree against plain decoding."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    labels: list[str] = []
    for m in report["gpu_study"]:
        costs = from_json(m["costs"], m["model"])
        for context in sorted(costs.verify):
            curve = costs.curve(context)
            n = max(costs.verify[context])
            left.plot(range(1, n + 1), curve[:n] / curve[0], label=f"{m['model']}, {context}")
            for source, found in m["speeds"][str(context)].items():
                x = len(labels)
                labels.append(f"{m['model']}, {context}\n{source}")
                right.bar(x - 0.2, found["63 nodes"] / found["plain"], 0.38, color="tab:gray")
                right.bar(x + 0.2, found["EntMTP"] / found["plain"], 0.38, color="tab:blue")
    left.set(xlabel="nodes in one pass", ylabel="cost, 1 = one token", ylim=(0, None), title="Verify")
    left.legend(frameon=False, fontsize=7)
    right.axhline(1.0, ls="--", color="black", lw=0.7)
    right.set(ylabel="tokens/s, 1 = plain decoding", title="By replay: 63 nodes (gray), EntMTP (blue)")
    right.set_xticks(range(len(labels)))
    right.set_xticklabels(labels, fontsize=6, rotation=90)
    figure.suptitle(report["device"], fontsize=9)
    return save(figure, path)


def plot_serve(report: dict[str, Any], path: Path) -> Path:
    """`bench serve`: tokens/s, time to the first token and between tokens, by load; dots the 95th percentile."""
    plt = pyplot()
    rows = report["serve"]
    loads = list(dict.fromkeys(r["load"] for r in rows))
    figure, (speed, first, gap) = plt.subplots(1, 3, figsize=(12, 3.8))
    for i, server in enumerate(dict.fromkeys(r["server"] for r in rows)):
        own = [r for r in rows if r["server"] == server]
        at = [loads.index(r["load"]) for r in own]
        speed.plot(at, [r["tokens_per_second"] for r in own], "o-", color=f"C{i}", label=server)
        for axes, key in ((first, "first_ms"), (gap, "gap_ms")):
            middle, high, _ = np.array([r[key] or [np.nan] * 3 for r in own]).T
            axes.plot(at, middle, "o-", color=f"C{i}", label=server)
            axes.plot(at, high, ".:", color=f"C{i}")
    for axes, title in ((speed, "tokens/s"), (first, "ms to the first token"), (gap, "ms between tokens")):
        axes.set(title=title, ylim=(0, None), xticks=range(len(loads)))
        axes.set_xticklabels(loads, fontsize=7, rotation=30)
    speed.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{report.get('machine', '')}, {report.get('threads', '?')} threads", fontsize=9)
    return save(figure, path)


# by the part of a report that they draw
PLOTS = {
    "studies": plot_study,
    "curves": plot_curves,
    "heads": plot_heads,
    "gpu_study": plot_gpu,
    "serve": plot_serve,
}


def draw(report: Any, path: Path) -> Path | None:
    """The picture of a report of `entmtp bench` (its JSON) as PNG; None where it holds nothing that is drawn.

    Raises:
        ValueError: matplotlib is missing.
    """
    for part, plot in PLOTS.items():
        if isinstance(report, dict) and report.get(part):
            return plot(report, path)
    return None
