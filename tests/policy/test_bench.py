"""The parts that all benchmarks share: answers in turn, what they say, tables, and one command line for all."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import numpy as np
import pytest

from entmtp import Llama
from entmtp.bench import accuracy, cli, inputs, memory, run
from entmtp.common.machine import held_memory
from entmtp.measure.compare import LEAST, Comparison, remark
from entmtp.measure.methods import ENTMTP, generic, methods_of
from entmtp.measure.stock import LOOKUP, stock
from entmtp.measure.turns import Answer, Prompt, answering, decode, in_turn
from entmtp.native import kernels
from entmtp.report.tables import cell, table
from helpers.loaded import Loaded, every_model
from helpers.settings import prompts

SUBCOMMANDS = [name for name in cli.COMMANDS if name != "plot"]
NEEDED = {
    "run": ["--prompts", "p.jsonl"], "study": ["--prompts", "p.jsonl"], "heads": ["folder", "--prompts", "p.jsonl"],
    "gpu": [], "curve": [], "load": ["--prompts", "p.jsonl"], "users": ["--prompts", "p.jsonl"],
    "serve": ["--prompts", "p.jsonl"], "memory": [], "accuracy": [],
    "mislead": [],
    "what-if": ["flat", "--traces", "t"], "ablate": ["flat", "--traces", "t"],
}  # fmt: skip


#
# methods
#


@pytest.mark.parametrize(
    ("arch", "has_model", "learning"),
    [
        (None, False, ["EntMTP"]),
        (None, True, ["EntMTP, text", "EntMTP, model", "EntMTP"]),
        ("hydra", False,
         ["EntMTP, text", "EntMTP, heads", "EntMTP, entropy", "EntMTP, confidence", "EntMTP"]),
        ("medusa", True,
         ["EntMTP, text", "EntMTP, model", "EntMTP, heads", "EntMTP, entropy", "EntMTP, confidence", "EntMTP"]),
    ],
)  # fmt: skip
def test_methods_fit_what_drafts(arch: str | None, has_model: bool, learning: list[str]) -> None:
    fixed, found = methods_of(arch, has_model)
    assert [m.label for m in found] == learning
    labels = [m.label for m in fixed]
    only_a_model = has_model and not arch  # it writes rows, and holds no published trees
    assert [x for x in labels if x.startswith("chain")] == [
        f"chain of {n}" for n in range(1, 5) if only_a_model
    ]
    assert ("mc_sim_7b_63" in labels) != only_a_model
    assert any(x.startswith("static ") for x in labels) == bool(arch)
    assert list(LOOKUP.values()) == [10, 2] and all(x.endswith(f" {n}") for x, n in LOOKUP.items())


#
# turns
#


def test_a_model_wakes_up_once_and_a_shared_one_for_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight tokens that nobody sees come before the first answer, or before each where another method had the model."""
    asked: list[int] = []
    monkeypatch.setattr(
        "entmtp.measure.turns.decode", lambda llm, prompt: asked.append(prompt.n_tokens) or said(prompt.n_tokens, 1.0)
    )  # fmt: skip
    alone = answering(None)
    assert [len(alone(Prompt([1], n)).tokens) for n in (20, 30)] == [20, 30] and asked == [8, 20, 30]
    asked.clear()
    applied: list[object] = []
    monkeypatch.setattr(type(ENTMTP), "apply", lambda method, llm: applied.append(llm))
    shared = answering("model", ENTMTP)
    assert [len(shared(Prompt([1], n)).tokens) for n in (20, 30)] == [20, 30] and asked == [8, 20, 8, 30]
    assert applied == ["model", "model"]


def said(n_tokens: int, seconds: float, start: int = 0) -> Answer:
    return Answer(list(range(start, start + n_tokens)), seconds)


def test_every_method_answers_every_prompt_and_each_is_first_in_turn() -> None:
    asked: list[tuple[str, int]] = []

    def method(label: str) -> Callable[[Prompt], Answer]:
        def answer(prompt: Prompt) -> Answer:
            asked.append((label, prompt.seed))
            return said(prompt.seed, 1.0)

        return answer

    steps: list[tuple[str, int, int]] = []
    questions = [Prompt([], 9, seed=s) for s in (10, 20, 30)]
    turns = in_turn({x: method(x) for x in "abc"}, questions, 2, lambda *step: steps.append(step))
    firsts = [label for label, _ in asked[::3]]
    assert firsts == ["a", "b", "c", "b", "c", "a"]
    assert [seed for _, seed in asked[::3]] == [10, 20, 30] * 2
    assert all({label for label, _ in asked[i : i + 3]} == set("abc") for i in range(0, 18, 3))
    assert [set(t) for t in turns] == [set("abc")] * 6
    assert [len(t["b"].tokens) for t in turns] == [10, 20, 30] * 2
    assert steps == [("answers", i, 18) for i in range(1, 19)]


def test_decode_times_what_it_counts(load: Callable[..., Llama]) -> None:
    """From a fresh start with a seed: the same tokens again; statistics are of the timed tokens alone."""
    llm = load(heads="hydra")
    generic("hydra")[1].apply(llm)
    prompt = Prompt(llm.tokenize(prompts("gsm8k")[0].encode(), special=True), 24, temp=0.8, seed=7)
    first, again = decode(llm, prompt), decode(llm, prompt)
    assert first.tokens == again.tokens and len(first.tokens) == 24
    assert decode(llm, prompt._replace(seed=8)).tokens != first.tokens
    for untimed in (1, 9):
        answer = decode(llm, prompt, untimed=untimed)
        stats = answer.stats
        assert answer.tokens == first.tokens and stats is not None
        drawn = stats.n_steps + stats.n_accepted
        # the last step may have accepted tokens that were not asked for, and one under way when the clock started
        assert 24 - untimed - 4 <= drawn <= 24 - untimed + 4
        assert sum(stats.time_split.values()) <= 1.05 * answer.seconds + 0.002
    assert decode(llm, prompt._replace(n_tokens=4), untimed=9).seconds == 0.0


def test_decode_ends_with_the_text(load: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load()
    prompt = Prompt(llm.tokenize(b"def f(x):\n", special=True), 12)
    free = decode(llm, prompt).tokens
    end = free[5]
    monkeypatch.setattr(llm, "token_eos", lambda: end)
    assert decode(llm, prompt).tokens == free[: free.index(end) + 1]
    assert decode(llm, prompt, past_end=True).tokens == free


def test_answering_sets_the_method(load: Callable[..., Llama]) -> None:
    """Methods that share a model answer each with its own trees."""
    llm = load(heads="hydra", kernels="off")
    small, large = generic("hydra")[:2]
    prompt = Prompt(llm.tokenize(b"def f(x):\n", special=True), 16)
    (turn,) = in_turn({m.label: answering(llm, m, "off") for m in (small, large)}, [prompt])
    for method in (small, large):
        stats = turn[method.label].stats
        assert stats is not None and set(stats.trees_used) == {method.tree}
    assert turn[small.label].tokens == turn[large.label].tokens


#
# judge
#


def test_what_people_run_today(models: dict[str, Path]) -> None:
    """llama-cpp-python's model with the settings of ours."""
    ours: Any = SimpleNamespace(
        n_threads=3, n_threads_batch=5, model_path=str(models["f32"]), n_ctx=lambda: 512,
        context_params=SimpleNamespace(type_k=8, type_v=0),
    )  # fmt: skip
    plain, lookup = stock(ours), stock(ours, 2, n_threads=1)
    assert (plain.n_threads, plain.n_threads_batch, plain.n_ctx(), plain.draft_model) == (3, 5, 512, None)
    assert (lookup.n_threads, lookup.n_threads_batch) == (1, 5) and lookup.draft_model.num_pred_tokens == 2
    assert (plain.context_params.type_k, plain.context_params.type_v) == (8, 0)
    assert type(plain) is llama_cpp.Llama
    assert set(LOOKUP) == {f"llama-cpp-python, prompt lookup {n}" for n in (10, 2)}
    plain.close()
    lookup.close()


def test_pairs_are_of_the_same_prompt_and_long_enough() -> None:
    """Each method has another short answer; what is left is compared, and everything else of the same prompts."""
    turns = [
        {"plain": said(11, 1.0), "fast": said(11, 0.5)},  # 10 and 20 tokens/s
        {"plain": said(LEAST, 0.001), "fast": said(31, 1.0, 5)},  # too short with the one
        {"plain": said(31, 1.0), "fast": said(LEAST, 0.001, 5)},  # and with the other
        {"plain": said(21, 4.0), "fast": said(21, 1.0)},  # 5 and 20
        {"plain": said(1, 0.0), "fast": said(1, 0.0)},
    ]
    found = Comparison(turns)
    plain, fast = found.row("plain", "plain"), found.row("fast", "plain")
    assert fast["ratio"] == pytest.approx([3.0, 2.5, 3.5])
    assert fast["tokens_per_second"] == [20.0, 20.0, 20.0] and plain["tokens_per_second"][0] == 7.5
    assert (plain["tokens_per_second_overall"], fast["tokens_per_second_overall"]) == (6.0, 20.0)
    assert fast["overall"] == pytest.approx(20 / 6, abs=1e-4)
    assert (fast["identical"], fast["answers"], fast["pairs"]) == (3, 5, 2)
    assert plain["ratio"] == [1.0, 1.0, 1.0]
    assert remark([plain, fast]).startswith("Speeds are of the 2 of 5 prompts")
    assert remark([plain | {"pairs": 5}, fast]) == remark([fast]) and remark([fast | {"pairs": 5}]) == ""


def test_a_third_method_takes_its_prompt_out_for_all() -> None:
    """The columns of one table come from one set of prompts."""
    turns = [
        {"plain": said(11, 1.0), "a": said(11, 1.0), "b": said(11, 1.0)},
        {"plain": said(101, 1.0), "a": said(101, 1.0), "b": said(3, 1.0)},
    ]
    found = Comparison(turns)
    assert all(found.row(x, "plain")["tokens_per_second"][0] == 10.0 for x in ("plain", "a", "b"))


def test_nothing_to_compare_is_said() -> None:
    found = Comparison([{"plain": said(4, 0.1), "EntMTP": said(4, 0.0)}])
    row = found.row("EntMTP", "plain")
    assert (
        row["ratio"] is row["overall"] is row["tokens_per_second"] is row["tokens_per_second_overall"] is None
    )
    assert "time_split" not in row and (row["identical"], row["pairs"]) == (1, 0)
    text = run.markdown("t", run.judged(found, ["plain", "EntMTP"]))
    assert (
        "| EntMTP | – | – | – | – – | – – |  |" in text and "| plain | – | – | – | – – | – – | 1.00 |" in text
    )
    assert "nan" not in text.lower()
    assert text.count("against plain") == 1, "the first method is the plain loop: no column twice"
    assert f"No prompt got more than {LEAST} tokens" in text
    json.dumps(row, allow_nan=False)


def test_shares_are_of_the_pairs(load: Callable[..., Llama]) -> None:
    """τ and the time split against the records of the steps themselves."""
    llm = load(heads="hydra")
    generic("hydra")[1].apply(llm)
    asked = [
        Prompt(llm.tokenize(p.encode(), special=True), n)
        for p, n in zip(prompts("gsm8k"), (24, 3), strict=False)
    ]
    turns = in_turn({"n": answering(llm)}, asked)
    row = Comparison(turns).row("n", "n")
    stats = turns[0]["n"].stats
    assert stats is not None and row["pairs"] == 1
    assert row["tokens_per_step"] == pytest.approx(1 + np.mean(stats.steps["n_accepted"]))
    verify = stats.steps["t_verify_us"].sum() / 1e6 / turns[0]["n"].seconds
    assert row["time_split"]["verify"] == pytest.approx(verify)
    assert sum(row["time_split"].values()) == pytest.approx(1.0, abs=0.05)


def test_tables() -> None:
    text = table(
        {"a": "{name}", "b": lambda r: str(r["n"] + 1)}, [{"name": "x", "n": 0}, {"name": "y", "n": 1}]
    )
    assert text == "| a | b |\n| --- | --: |\n| x | 1 |\n| y | 2 |\n"
    row = {"none": None, "x": 1.234, "all": [1.0, 0.5, 2.0], "parts": {"k": 0.5}}
    forms = ["{none:.2f}", "{none[k]}", "{x:.2f}", "{all:.1f}×", "{all:.2f}", "{parts[k]:.0%}"]
    told = ["–", "–", "1.23", "1.0 (0.5–2.0)×", "1.00 (0.50–2.00)", "50%"]
    assert [cell(form, row) for form in forms] == told
    assert cell("{x:.0f} of {missing}", row) == cell("{parts[none]}", row) == "", "what a row lacks"


#
# the command
#


def write_prompts(folder: Path, texts: list[str]) -> str:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in texts), "utf-8")
    return str(path)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for v in value.values() for x in numbers(v)]
    if isinstance(value, list):
        return [x for v in value for x in numbers(v)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("n_tokens", [16, 6])
def test_run(
    n_tokens: int, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a subcommand, as before; and answers that are too short for any speed."""
    out = tmp_path / "bench.json"
    arguments = [
        "--model", str(models["q8_0"]), "--heads", str(models["hydra"]), "--prompts",
        write_prompts(tmp_path, prompts("gsm8k")[:2]), "--tokens", str(n_tokens), "--temp", "0", "--threads", "1",
        "--methods", "static n4", "EntMTP", "-o", str(out), "--flash-attn", "--ctx", "512", "--kernels", "portable",
    ]  # fmt: skip
    with every_model() as made:
        assert cli.main(arguments) == 0
    assert {(m.n_ctx, m.threads, m.flash_attn) for m in made} == {(512, (1, 1), True)}
    assert [m.kernels for m in made] == ["portable", "portable", "off", "portable"]
    report = json.loads(out.read_text("utf-8"))
    assert report["threads"] == 1
    (task,) = report["tasks"]
    rows = {r["method"]: r for r in task["rows"]}
    assert list(rows) == [run.STOCK, run.GGML.label, "plain", "static n4", ENTMTP.label]
    for label in ("plain", "static n4", ENTMTP.label):
        assert (rows[label]["identical"], rows[label]["answers"]) == (2, 2)
    text = out.with_suffix(".md").read_text("utf-8")
    assert text in capsys.readouterr().out and "nan" not in text.lower()
    assert all(math.isfinite(x) for x in numbers(report))
    if n_tokens > LEAST:
        assert rows["plain"]["ratio_plain"] == [1.0, 1.0, 1.0] and rows["static n4"]["tokens_per_step"] > 1.0
        assert all(r["pairs"] == 2 and min(r["ratio"]) > 0 for r in rows.values())
    else:
        assert all(r["pairs"] == 0 and r["ratio"] is None for r in rows.values())
        assert "No prompt got more than" in text


def test_run_says_what_it_lacks(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_prompts(tmp_path, ["a"])
    common = ["run", "--heads", str(models["hydra"]), "--prompts", files, "--threads", "1"]
    assert cli.main([*common, "-m", str(models["q8_0"]), "--methods", "magic"]) == 2
    assert "there is no method magic; there are" in capsys.readouterr().err
    assert cli.main([*common, "-m", str(tmp_path / "none.gguf")]) == 1
    assert "none.gguf: there is no such model file" in capsys.readouterr().err


def test_curve_with_several_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "curve.json"
    arguments = ["--model", "tiny:q8_0", "--verify-curve", "--contexts", "16", "32", "--sizes", "1", "2", "4"]
    more = ["--rounds", "2", "--threads", "1", "--flash-attn", "--ctx", "512"]
    sets = ["off", "portable", "portable"]
    with every_model() as made:
        assert cli.main([*arguments, *more, "--kernels", *sets, "-o", str(out)]) == 0
    assert made == [Loaded(512, (1, 1), True, k) for k in sets]
    (curve,) = json.loads(out.read_text("utf-8"))["curves"]
    found = {(p["kernels"], p["context"], p["n"]) for p in curve["passes"]}
    names = ("off", "portable", "portable 2")
    assert found == {(k, c, n) for k in names for c in (16, 32) for n in (1, 2, 4)}
    assert all(p["ms"] > 0 for p in curve["passes"]) and curve["model"] == "tiny:q8_0, random weights"
    text = capsys.readouterr().out
    assert "| tokens, context 32 | off, ms | off, relative | off, memory | off, int8 | portable, ms |" in text
    assert re.search(r"^\| 1 \| [\d.]+ ±\d+% \| 1\.00 \|", text, re.MULTILINE)
    out.with_suffix(".png").unlink()
    assert cli.main(["--plot", str(out)]) == 0 and out.with_suffix(".png").exists()


@pytest.mark.skipif("Rss" not in held_memory(), reason="this system does not say what is held")
def test_memory_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memory.json"
    assert cli.main(["memory", "-m", "demo:f16", "--rounds", "1", "-o", str(out)]) == 0
    (found,) = json.loads(out.read_text("utf-8"))["memory"]
    by = {(row["how"], row["kernels"]): row for row in found["rows"]}
    assert set(by) == {(how, k) for how in memory.WAYS for k in memory.KERNELS}
    for way in ("mapped", "read"):
        # 13 MB of a model, and what every process differs by
        assert 0.7 * found["bytes"] < by[way, "auto"]["held"] < 1.05 * found["bytes"] + 6e6, by
        assert by[way, "auto"]["peak"] > 0 and by[way, "auto"]["seconds"] > 0
    assert found["bytes"] < found["writing"]["plain"] < found["writing"]["drafting"]
    text = capsys.readouterr().out
    assert (
        "#### demo:f16: a file of" in text
        and "| read (use_mmap=False) | ours |" in text
        and "| with drafts |" in text
    )


def test_accuracy_of_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], models: dict[str, Path]
) -> None:
    asked = write_prompts(tmp_path, ["Why is the sky blue?", "def add(a, b):"])
    out = tmp_path / "accuracy.json"
    arguments = ["accuracy", "-m", f"{models['q8_0']}:q4_0", "--prompts", asked, "--raw", "--threads", "1"]
    assert cli.main([*arguments, "-o", str(out)]) == 0
    (found,) = json.loads(out.read_text("utf-8"))["accuracy"]
    ggml, ours = found["rows"]
    assert (ggml["kernels"], ours["kernels"]) == ("off", "auto") and ours["tokens"] == ggml["tokens"] > 10
    assert 0 < ggml["one"] < 0.1
    if kernels.available() != ["portable"]:
        assert ours["between"] == ours["other"] == 0 and ours["one"] == ours["several"] < 1.5 * ggml["one"]
    assert "KL between passes of 1 and of 8" in capsys.readouterr().out


def test_divergence_is_that_of_distributions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    expected = 0.5 * np.log(2) - 0.25 * np.log(2)
    rows = np.log([p, p]).astype(np.float32), np.log([q, p]).astype(np.float32)
    np.testing.assert_allclose(accuracy.divergence(*rows), [expected, 0.0], atol=1e-7)
    assert accuracy.with_type("smollm2:q8_0") == ("smollm2", "q8_0")
    assert accuracy.with_type("1b:q8_0") == ("1b:q8_0", None)
    assert accuracy.with_type("a/b.gguf") == ("a/b.gguf", None)


def test_names_of_models() -> None:
    assert inputs.shape_of("1b:q8_0") == ("1b", "q8_0") and inputs.shape_of("1b") == ("1b", "q4_0")
    assert inputs.shape_of("demo") is None, "the bundled demo, not random weights"
    assert inputs.shape_of("demo:q8_0") == ("demo", "q8_0")
    assert inputs.shape_of("hf:owner/repo") is inputs.shape_of("model.gguf") is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--model", "m", "--heads", "h", "--prompts", "p"], ["run", "--model", "m", "--heads", "h", "--prompts", "p"]),
        (["--model", "m", "--verify-curve", "--sizes", "1", "2"], ["curve", "--model", "m", "--sizes", "1", "2"]),
        (["--study", "--prompts", "p"], ["study", "--prompts", "p"]),
        (["--gpu-study", "--shapes", "7b"], ["gpu", "--shapes", "7b"]),
        (["--threads", "2", "--what-if", "1b", "flat", "--traces", "t"],
         ["what-if", "1b", "flat", "--threads", "2", "--traces", "t"]),
        (["--traces", "t", "--ablate", "flat"], ["ablate", "flat", "--traces", "t"]),
        (["--ablate=flat", "--traces", "t"], ["ablate", "flat", "--traces", "t"]),
        (["--plot", "r.json"], ["plot", "r.json"]),
        (["study", "--prompts", "p"], ["study", "--prompts", "p"]),
        (["--help"], ["--help"]), ([], []),
    ],
)  # fmt: skip
def test_spellings_of_before(old: list[str], new: list[str]) -> None:
    assert cli.modern(old) == new
    if new and new != ["--help"]:
        assert cli.setup_arg_parser().parse_args(new).subcommand == new[0]


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_every_subcommand_takes_the_shared_options(subcommand: str) -> None:
    shared = [
        "-m", "m.gguf", "--heads", "h.gguf", "--ctx", "512", "--threads", "1", "--flash-attn", "--kernels", "off",
        "--n-gpu-layers", "-1", "--tensor-split", "1,2", "--outputs", "host", "--rpc", "127.0.0.1:50052",
    ]  # fmt: skip
    args = cli.setup_arg_parser().parse_args([subcommand, *NEEDED[subcommand], *shared])
    assert (args.model, args.heads, args.ctx, args.threads, args.flash_attn) == (
        "m.gguf",
        "h.gguf",
        512,
        1,
        True,
    )
    assert (args.n_gpu_layers, args.tensor_split, args.rpc) == (-1, [1, 2], ["127.0.0.1:50052"])
    assert args.outputs == "host" and args.kernels == (["off"] if subcommand == "curve" else "off")
    assert args.draft is args.trees is None, "what a benchmark compares is no option"


@pytest.mark.parametrize("subcommand", [None, *cli.COMMANDS])
def test_help_teaches(subcommand: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*([subcommand] if subcommand else []), "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    if subcommand is None:
        assert all(f"entmtp bench {name}" in text for name in cli.COMMANDS)
    else:
        assert f"example: {cli.COMMANDS[subcommand].example}" in text
        # the example of a subcommand can be parsed
        words = cli.COMMANDS[subcommand].example.split()[2:]
        assert cli.setup_arg_parser().parse_args(words).subcommand == subcommand


def test_names_of_before() -> None:
    for module in (["entmtp.heads_study"], ["entmtp.bench", "heads"]):
        done = subprocess.run(
            [sys.executable, "-m", *module, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "[NAME[:FORM,..]=]FOLDER" in done.stdout


def test_users_is_run(tmp_path: Path) -> None:
    """All of it, once: engines and their slots, and each answer plain decoding's."""
    asked = tmp_path / "p.jsonl"
    asked.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts("gsm8k")[:2]), "utf-8")
    out = tmp_path / "users.json"
    words = [
        "users",
        "-m",
        "demo",
        "--threads",
        "1",
        "--prompts",
        str(asked),
        "--limit",
        "2",
        "--tokens",
        "8",
    ]
    assert cli.main([*words, "--temp", "0", "--users", "1", "2", "--rounds", "1", "-o", str(out)]) == 0
    assert json.loads(out.read_text("utf-8"))
