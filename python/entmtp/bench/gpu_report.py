"""The report of `bench --gpu-study` as Markdown tables and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bank.costs import from_json

SHOWN = (1, 2, 4, 8, 16, 32, 64)
GB = 1e9


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table whose first column is text."""
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --: |" * (len(head) - 1)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def passes(m: dict[str, Any]) -> list[str]:
    """Cost of a pass by nodes and context, relative to one token, and the memory bandwidth of one token's pass."""
    costs, peak = from_json(m["costs"], m["model"]), m["bytes_per_second"]
    some = next(iter(costs.verify.values()))
    sizes = [n for n in sorted(some) if n > 1 and (n in SHOWN or len(some) < len(SHOWN))]
    rows = []
    for context in sorted(costs.verify):
        curve = costs.curve(context)
        read = (
            m["bytes"] + int(m["cache_bytes"][context if context in m["cache_bytes"] else str(context)])
        ) / (curve[0] / 1e6)
        share = f"{100 * read / peak:.0f} %" if peak else ""
        rows.append(
            [
                str(context),
                f"{curve[0] / 1e3:.3f}",
                *(f"{curve[n - 1] / curve[0]:.2f}" for n in sizes),
                f"{read / GB:.1f}",
                share,
            ]
        )
    head = ["context", "one token, ms", *(f"{n} nodes" for n in sizes), "GB/s", "of the device's"]
    return table(head, rows)


def drafts(m: dict[str, Any]) -> list[str]:
    """Cost of a draft by depth, and of one head after 1, 2 and 4 paths, ms."""
    costs = from_json(m["costs"], m["model"])
    rows = [
        [str(i + 1), f"{costs.chain[i + 1] / 1e3:.3f}", *(f"{us / 1e3:.3f}" for us in row)]
        for i, row in enumerate(costs.level)
    ]
    return table(["depth", "chain, ms", "its last head alone, 1 path", "2 paths", "4 paths"], rows)


def steps(m: dict[str, Any]) -> list[str]:
    """Where the time of a step goes, and what crosses between host and device in it."""
    rows = []
    for s in m["steps"]:
        t, split = s["traffic"], s["split"]
        besides = split["sample"] + split["host"] + split["rest"]
        rows.append(
            [
                f"{s['nodes']} nodes, {s['sampling']}", f"{s['ms']:.3f}", f"{100 * split['draft']:.0f} %",
                f"{100 * split['verify']:.0f} %", f"{100 * besides:.1f} %", f"{t['to_host']:.0f}",
                f"{t['to_device']:.0f}", f"{t['on_device']:.0f}", f"{t['n_rows']:.2f}", f"{t['n_syncs']:.1f}",
                f"{t['n_graphs'] + t['n_draft_graphs']:.2f}",
            ]
        )  # fmt: skip
    head = [
        "step", "ms", "draft", "verify", "besides", "bytes to host", "to device", "on device", "whole rows", "waits",
        "graphs built",
    ]  # fmt: skip
    return table(head, rows)


def speeds(m: dict[str, Any]) -> list[str]:
    """Tokens/s by context and source of the acceptance."""
    names = ["plain", "63 nodes", "best single tree", "EntMTP", "EntMTP, confidence", "every depth known"]
    rows = []
    for context, sources in m["speeds"].items():
        for source, found in sources.items():
            cells = [f"{found[n]:.1f}" if n in found else "" for n in names]
            best = max(found["EntMTP"], found.get("EntMTP, confidence", 0.0))
            rows.append([f"{source}, {context}", *cells, f"{best / found['63 nodes']:.2f}"])
    return table(["acceptance, context", *names, "EntMTP / 63 nodes"], rows)


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    lines = [f"Device: {report['device']}, {report['threads']} CPU threads.", ""]
    for m in report["gpu_study"]:
        lines += [
            f"### {m['model']}",
            "",
            f"{m['bytes'] / GB:.3f} GB of weights in a pass, vocabulary {m['vocabulary']}, heads on {m['heads']}. "
            f"The device moves {m['bytes_per_second'] / GB:.1f} GB/s. {m['outputs']}.",
            "",
            *passes(m), *drafts(m), *steps(m),
            "Tokens/s, by replay; \"EntMTP\" under published acceptance is the best fixed depth, a lower bound:",
            "",
            *speeds(m),
        ]  # fmt: skip
    lines += [f"Left out: {s['model']}: {s['why']}." for s in report["skipped"]]
    return "\n".join(lines).rstrip() + "\n"


def plot(report: dict[str, Any], path: Path) -> Path:
    """Cost curves of every model, and tokens/s of EntMTP and of the 63-node tree against plain decoding.

    Raises:
        ValueError: matplotlib is missing, or the report holds no model.
    """
    from ..report.plots import pyplot, save

    if not report["gpu_study"]:
        raise ValueError("the report holds no model, so there is nothing to draw")
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
