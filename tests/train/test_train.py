"""`python -m entmtp.train` as a user runs it: from text to heads, interrupted and gone on with, and what goes wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (the train extra)")
torch.set_num_threads(1)  # xdist workers share the cores

import gguf  # noqa: E402
from safetensors import safe_open  # noqa: E402

import entmtp  # noqa: E402
from entmtp.bank.bank import Bank  # noqa: E402
from entmtp.bank.tree import PLAIN, Tree  # noqa: E402
from entmtp.convert import convert  # noqa: E402
from entmtp.train import choice, plan, stages  # noqa: E402
from entmtp.train.cli import main  # noqa: E402
from helpers.models import SPECS, write_encoder, write_model  # noqa: E402
from helpers.training import arguments  # noqa: E402

pytestmark = pytest.mark.torch


def start(model: Path, outfile: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "entmtp.train", *arguments(model, outfile, *more)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        # a run in the background ignores Ctrl-C, and would pass that on
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == "posix" else None,
    )  # fmt: skip


def checkpoint_step(work: Path) -> int:
    """Step of the checkpoint in a work folder, 0 without one."""
    for path in work.glob("*/checkpoint.safetensors"):
        with safe_open(path, "np") as file:
            return int(re.findall(r'"step": (\d+)', file.metadata()["run"])[0])
    return 0


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("arch", ["medusa", "hydra", "hydra++"])
def test_trained_heads_draft(
    tiny: Path, tmp_path: Path, arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads made of the model's own text: they load, say where they come from, and the text stays the model's."""
    outfile = tmp_path / "heads.gguf"
    assert (
        main(arguments(tiny, outfile, "--arch", arch, "--outtype", "f32", "--epochs", "2", "--noise", "1"))
        == 0
    )
    said = capsys.readouterr().err
    assert "written by the model itself" in said
    assert "tokens per step" in said
    fields = gguf.GGUFReader(outfile).fields
    assert fields["entmtp.train.arch"].contents() == arch
    assert fields["entmtp.train.steps"].contents() == 20
    assert not (tmp_path / "heads.gguf.train").exists()

    settings: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    # so wide that heads of few steps guess right, too
    wide = Tree.from_paths("wide", [[i] for i in range(48)] + [[i, j] for i in range(4) for j in range(8)])
    bank = Bank("wide", (PLAIN, wide))
    drafting = {"draft": "entmtp", "heads": outfile, "policy": "static", "trees": bank}
    texts, accepted = [], []
    for draft in ({}, drafting):
        with closing(entmtp.Llama(tiny, **settings, **draft)) as llm:
            texts.append(list(islice(llm.generate([5, 6, 7], temp=0.0), 60)))
            accepted.append(llm.draft_stats.n_accepted)
    assert texts[0] == texts[1]
    assert accepted[0] == 0 and accepted[1] > 5, f"hardly a draft was right: {accepted}"

    # the published layout, as the original code and the converter read it
    again = tmp_path / "again.gguf"
    convert(tmp_path / "heads", tiny, again, outtype="f32", progress=False)
    ours, theirs = tensors(outfile), tensors(again)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_training_helps(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few steps on the demo model lift held-out tokens per step well above one."""
    outfile = tmp_path / "heads.gguf"
    argv = [
        "--model", str(models["q8_0"]), "-o", str(outfile), "--arch", "hydra", "--threads", "1", "--tokens", "16k",
        "--held-out", "12", "--seq-len", "128", "--batch-tokens", "512", "--epochs", "2", "--draft-vocab", "all",
        "--lm-head", "own",
    ]  # fmt: skip
    assert main(argv) == 0
    chain = float(gguf.GGUFReader(outfile).fields["entmtp.train.chain"].contents())
    assert chain > 1.2


@pytest.mark.parametrize("arch", ["medusa", "hydra"])
def test_projections_of_every_kind(
    tiny: Path, tmp_path: Path, arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each head's own, one for all, and the base's: what the file holds, what the screen counts, and they draft. The
    same text and states serve all."""
    outfile, work = tmp_path / "heads.gguf", tmp_path / "work"
    options = ("--work", str(work), "--keep-work", "--arch", arch, "--epochs", "1", "--draft-vocab", "64")
    n_blocks = 2 * 64 * 65 if arch == "medusa" else 2 * 64 * (128 + 1 + 192 + 1)
    bias = 0 if arch == "medusa" else 2 * 64
    settings: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    wide = Bank("wide", (PLAIN, Tree.from_paths("wide", [[i] for i in range(48)])))
    with closing(entmtp.Llama(tiny, **settings)) as llm:
        plain = list(islice(llm.generate([5, 6, 7], temp=0.0), 40))
    written = None
    for lm_head, projections, n in (
        ("own", {"head.0.output.weight", "head.1.output.weight"}, n_blocks + bias + 2 * 64 * 64),
        ("shared", {"output.weight"}, n_blocks + bias + 64 * 64),
        ("base", set(), n_blocks),
    ):
        capsys.readouterr()
        assert main(arguments(tiny, outfile, *options, "--lm-head", lm_head)) == 0
        assert f"training {n / 1e6:.1f}M parameters" in capsys.readouterr().err
        found = tensors(outfile)
        assert {name for name in found if name.endswith("output.weight")} == projections
        assert found["d2t"].shape == (64,)
        assert gguf.GGUFReader(outfile).fields["entmtp.train.lm_head"].contents() == lm_head
        drafting = {"draft": "entmtp", "heads": outfile, "policy": "static", "trees": wide}
        with closing(entmtp.Llama(tiny, **settings, **drafting)) as llm:
            assert list(islice(llm.generate([5, 6, 7], temp=0.0), 40)) == plain
            assert llm.draft_stats.n_drafted > 0
        times = {p.name: p.stat().st_mtime_ns for p in work.glob("text-*")}
        assert written is None or times == written, "the text was written again"
        written = times


def test_another_draft_vocabulary_uses_the_same_text(tiny: Path, tmp_path: Path) -> None:
    outfile, work = tmp_path / "heads.gguf", tmp_path / "work"
    options = ("--work", str(work), "--keep-work", "--epochs", "1")
    written = None
    for vocab in ("100", "64", "auto"):
        assert main(arguments(tiny, outfile, *options, "--draft-vocab", vocab)) == 0
        times = {p.name: p.stat().st_mtime_ns for p in [*work.glob("text-*"), *work.glob("states.hidden")]}
        assert written is None or times.keys() == written.keys()
        assert (
            all(times[name] == written[name] for name in times if name.startswith("text"))
            if written
            else times
        )
        written = times


def test_draft_vocabulary_and_shared_projection(tiny: Path, tmp_path: Path) -> None:
    outfile = tmp_path / "heads.gguf"
    assert main(arguments(tiny, outfile, "--draft-vocab", "100", "--lm-head", "base", "--epochs", "1")) == 0
    found = tensors(outfile)
    assert found["d2t"].shape == (100,)
    assert not any("output" in name for name in found)
    # the published layout holds whole projections: the base model's
    state = torch.load(tmp_path / "heads" / "hydra_lm_head.pt", weights_only=True)
    assert state["hydra_lm_head.0.weight"].shape == (320, 64)

    assert main(arguments(tiny, outfile, "--draft-vocab", "64", "--arch", "medusa", "--epochs", "1")) == 0
    found = tensors(outfile)
    assert found["head.0.output.weight"].shape[0] == len(found["d2t"]) == 64
    state = torch.load(tmp_path / "heads" / "medusa_lm_head.pt", weights_only=True)
    rows = state["0.1.weight"][torch.from_numpy(found["d2t"])]
    trained = gguf.quants.dequantize(found["head.0.output.weight"], gguf.GGMLQuantizationType.F32)
    assert torch.equal(rows.float(), torch.from_numpy(np.array(trained)).float())


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    while not ready():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows cannot kill a process at once as kill -9 does")
def test_killed_at_any_point_and_resumed(tiny: Path, tmp_path: Path) -> None:
    """Killed while it writes text, records states and trains: the heads are those of an undisturbed training."""
    options = ("--epochs", "20", "--save-every", "20", "--outtype", "f32", "--tokens", "6000")
    calm, killed = tmp_path / "calm.gguf", tmp_path / "killed.gguf"
    assert main(arguments(tiny, calm, *options)) == 0
    work = tmp_path / "killed.gguf.train"
    moments: tuple[Callable[[], bool], ...] = (
        lambda: (work / "texts.digest").exists(),
        lambda: any(work.glob("text-*.npz")),
        lambda: (work / "states.hidden").exists(),
        lambda: checkpoint_step(work) >= 20,
        lambda: checkpoint_step(work) >= 120,
        lambda: checkpoint_step(work) >= 240,
    )
    for ready in moments:
        process = start(tiny, killed, *options, "--resume")
        wait_for(process, ready)
        process.kill()
        process.wait()
        assert not killed.exists()
    process = start(tiny, killed, *options, "--resume")
    _, said = process.communicate()
    assert process.returncode == 0, said
    ours, theirs = tensors(calm), tensors(killed)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(value, theirs[name]), name


STAGES = {  # where the run is stopped: what it had begun then is done anew, and nothing else
    "before the text": "plan_jobs", "before the draft vocabulary": "choose_rows", "before the training": "new_trainer",
    "before the files": "write_files", "among the files": "export",
}  # fmt: skip


def test_resumed_after_any_stage(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads are those of an undisturbed training, and what was measured of the machine is not measured again."""
    options = ("--epochs", "2", "--outtype", "f32", "--draft-vocab", "auto", "--lm-head", "auto")

    def stop(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    def fixed(*args: Any, **more: Any) -> Any:
        measured.append(1)
        return real(*args, **more)

    measured: list[int] = []
    real = stages.measure_prices
    stopped = tmp_path / "stopped.gguf"
    monkeypatch.setattr(stages, "measure_prices", fixed)
    for name in STAGES.values():
        with monkeypatch.context() as m:
            m.setattr(stages, name, stop)
            assert main(arguments(tiny, stopped, *options, "--resume")) == 130, name
        assert not stopped.exists()
    assert main(arguments(tiny, stopped, *options, "--resume")) == 0
    assert len(measured) == 1
    calm = tmp_path / "calm.gguf"
    ours = tensors(stopped)
    lm_head = gguf.GGUFReader(stopped).fields["entmtp.train.lm_head"].contents()
    vocab = str(len(ours["d2t"])) if "d2t" in ours else "all"
    given = ("--draft-vocab", vocab, "--lm-head", lm_head)
    assert main(arguments(tiny, calm, "--epochs", "2", "--outtype", "f32", *given)) == 0
    theirs = tensors(calm)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(value, theirs[name]), name


def test_split_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of several files: the same heads as of one."""
    whole = write_model(tmp_path / "whole.gguf", SPECS["llama"])
    first = write_model(tmp_path / "parts.gguf", SPECS["llama"], split=1)
    assert first.name.startswith("parts-00001-of-000")
    options = ("--epochs", "1", "--outtype", "f32", "--draft-vocab", "100")
    found = []
    for model in (whole, first):
        out = tmp_path / f"{model.stem}.heads.gguf"
        assert main(arguments(model, out, *options)) == 0
        found.append(tensors(out))
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])
    last = sorted(tmp_path.glob("parts-*"))[-1]
    last.unlink()
    said = failed(capsys, *arguments(first, tmp_path / "no.gguf"))
    assert f"{last.name} is missing" in said


@pytest.mark.slow
def test_a_large_tied_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma 3's shape and vocabulary: memory is said first, by default few rows are trained, and all of them only where
    there is room."""
    spec = replace(SPECS["gemma3"], n_vocab=262_144, tied=True, types=(("token_embd", "Q8_0"),))
    model = write_model(tmp_path / "gemma.gguf", spec)
    out = tmp_path / "heads.gguf"
    argv = [
        "--model", str(model), "-o", str(out), "--threads", "1", "--tokens", "1200", "--seq-len", "64",
        "--held-out", "4", "--batch-tokens", "300", "--heads", "4", "--epochs", "1",
    ]  # fmt: skip
    monkeypatch.setattr(plan, "available", lambda: 1_000_000_000)
    # four times 262,144 rows of 64, 16 bytes each in training, are more
    said = failed(capsys, *argv, "--draft-vocab", "all", "--lm-head", "own")
    assert re.search(r"training takes 1\.\d GB of memory and 1\.0 GB are free; give --draft-vocab auto", said)
    assert main(argv) == 0
    said = capsys.readouterr().err
    assert re.search(r"memory: at most \d+ MB", said.split("text :")[0])
    rows = int(re.findall(r"draft vocabulary: (\d+) of 262144 tokens", said)[0])
    found = tensors(out)
    assert len(found["d2t"]) == rows <= choice.MOST
    with closing(entmtp.Llama(model, n_ctx=128, n_threads=1, verbose=False)) as llm:
        plain = list(islice(llm.generate([5, 6, 7], temp=0.0), 20))
    drafting: dict[str, Any] = {"draft": "entmtp", "heads": out, "drafters": "heads", "calibrate": False}
    with closing(entmtp.Llama(model, n_ctx=128, n_threads=1, verbose=False, **drafting)) as llm:
        assert list(islice(llm.generate([5, 6, 7], temp=0.0), 20)) == plain


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT to send on Windows")
def test_ctrl_c_saves(tiny: Path, tmp_path: Path) -> None:
    outfile = tmp_path / "heads.gguf"
    work = tmp_path / "heads.gguf.train"
    options = ("--epochs", "2000", "--save-every", "10")
    process = start(tiny, outfile, *options)
    wait_for(process, lambda: checkpoint_step(work) >= 10)
    before = checkpoint_step(work)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert "go on with --resume" in said
    assert "Traceback" not in said
    assert checkpoint_step(work) >= before
    assert not outfile.exists()
    # without --resume nothing is overwritten, and other settings are another training
    assert main(arguments(tiny, outfile, *options)) == 1
    assert checkpoint_step(work) >= before


def failed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run, expect exit code 1 and one sentence."""
    assert main(list(argv)) == 1
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said, said
    return errors[0]


def test_no_number_in_the_loss(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outfile = tmp_path / "heads.gguf"
    said = failed(
        capsys, *arguments(tiny, outfile, "--epochs", "3", "--lr", "1e30", "--clip", "0", "--save-every", "1")
    )
    assert "the loss is" in said and "lower --lr" in said
    assert not outfile.exists()
    [path] = (tmp_path / "heads.gguf.train").glob("*/checkpoint.safetensors")
    with safe_open(path, "pt") as file:  # the last good one
        names = [name for name in file.keys() if name.startswith("state/")]  # noqa: SIM118
        assert names


def test_models_that_cannot_have_heads(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "heads.gguf"
    assert "no such model file" in failed(capsys, *arguments(tmp_path / "no.gguf", out))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    failed(capsys, *arguments(tmp_path / "bad.gguf", out))
    (tmp_path / "text.gguf").write_bytes(b"hello there")
    failed(capsys, *arguments(tmp_path / "text.gguf", out))
    encoder = write_encoder(tmp_path / "encoder.gguf")
    assert "encoder" in failed(capsys, *arguments(encoder, out))
    assert "there is no folder" in failed(capsys, *arguments(tiny, tmp_path / "no" / "heads.gguf"))
    assert not out.exists()


def test_bad_data(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, empty = tmp_path / "heads.gguf", tmp_path / "empty.txt"
    empty.write_text("  \n")
    assert "no text in it" in failed(capsys, *arguments(tiny, out, "--data", str(empty)))
    few = tmp_path / "few.txt"
    few.write_text("one sentence of text, which is long enough to be read.")
    assert "too few" in failed(capsys, *arguments(tiny, out, "--data", str(few)))


def test_another_training_in_the_folder(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text and states serve heads of every kind, but not another text."""
    out, work = tmp_path / "heads.gguf", tmp_path / "work"
    shared = ("--work", str(work), "--keep-work", "--epochs", "1")
    assert main(arguments(tiny, out, "--arch", "medusa", *shared)) == 0
    changed = {p.name: p.stat().st_mtime_ns for p in work.glob("text-*")}
    assert main(arguments(tiny, out, "--arch", "hydra", *shared)) == 0
    assert {p.name: p.stat().st_mtime_ns for p in work.glob("text-*")} == changed
    assert "another training" in failed(capsys, *arguments(tiny, out, *shared, "--seed", "1"))
    assert main(arguments(tiny, out, *shared, "--seed", "1", "--restart")) == 0


def test_files_of_others_stay(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The work folder is removed at the end, and by --restart; what nobody trained is not."""
    work, thesis = tmp_path / "work", tmp_path / "work" / "thesis" / "chapter.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("precious")
    out, beside = tmp_path / "heads.gguf", tmp_path / "heads.gguf.test"
    beside.write_text("mine")
    for how in ([], ["--restart"], ["--resume"]):
        assert main(arguments(tiny, out, "--work", str(work), *how)) == 1
        assert "there are files of others in it" in capsys.readouterr().err
    assert thesis.read_text() == "precious" and not out.exists()
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny.read_bytes())
    assert main(arguments(model, model)) == 1
    assert "this is one of the files to read" in capsys.readouterr().err
    assert model.read_bytes() == tiny.read_bytes()
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / ".texts.digest.01234567-1-0.tmp").touch()
    bare = tmp_path / "heads"  # a name without a suffix, whose folder has one
    assert (
        main(arguments(tiny, bare, "--work", str(tmp_path / "left"), "--arch", "medusa", "--epochs", "1"))
        == 0
    )
    assert bare.is_file() and (tmp_path / "heads.torch").is_dir() and beside.read_text() == "mine"
    capsys.readouterr()
    assert main(arguments(tiny, bare, "--torch-dir", str(bare))) == 1
    assert "change --torch-dir" in capsys.readouterr().err


def test_damaged_checkpoint(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, work = tmp_path / "heads.gguf", tmp_path / "work"
    options = arguments(tiny, out, "--work", str(work), "--keep-work", "--epochs", "1")
    assert main(options) == 0
    [path] = work.glob("*/checkpoint.safetensors")
    data = path.read_bytes()
    for broken in (b"", data[: len(data) // 2], b"\xff" * 64 + data[64:]):
        path.write_bytes(broken)
        assert "the checkpoint is damaged" in failed(capsys, *options, "--resume")


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        [], ["--model", "m.gguf"], ["--model", "m", "-o", "h", "--temps", "x"],
        ["--model", "m", "-o", "h", "--tokens", "many"], ["--model", "m", "-o", "h", "--own", "2"],
        ["--model", "m", "-o", "h", "--preset", "fast"], ["--model", "m", "-o", "h", "--json"],
        ["--model", "m", "-o", "h", "--lm-head", "one"], ["--model", "m", "-o", "h", "--outtype", "q3"],
        ["--model", "m", "-o", "h", "--resume", "--restart"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == 2
    assert "examples:" not in capsys.readouterr().out


#
# a small disk
#
