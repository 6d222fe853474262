"""`bench gpu` at a scale that every machine has, on the CPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from entmtp.bank.costs import relative
from entmtp.bench import cli as bench
from entmtp.bench import gpu, inputs
from helpers.loaded import every_model

SMALL = [
    "--gpu-study",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--rounds",
    "1",
    "--limit",
    "3",
    "--tokens",
    "20",
]


def test_study_of_small_models(tmp_path: Path, capsys: pytest.CaptureFixture[str], demo_cache: Path) -> None:
    out = tmp_path / "gpu.json"
    arguments = [
        "--shapes",
        "tiny,demo",
        "--types",
        "q8_0",
        "--contexts",
        "64,512",
        "--sizes",
        "1",
        "4",
        "64",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTMTP_CACHE", str(demo_cache))
        with every_model() as made:
            assert (
                bench.main([*SMALL, *arguments, "--outputs", "device", "--flash-attn", "-o", str(out)]) == 0
            )
    assert [m.n_ctx >= 512 and m.threads == (1, 1) and m.flash_attn for m in made] == [True] * 3, (
        "two, and traces"
    )
    report = json.loads(out.read_text())
    assert [m["model"] for m in report["gpu_study"]] == ["tiny q8_0", "demo f32"] and not report["skipped"]
    for m in report["gpu_study"]:
        assert set(m["costs"]["verify"]) == {"64", "512"}
        assert m["bytes_per_second"] > 0 and m["outputs"].endswith("logits are reduced on the device")
        assert len(m["costs"]["chain"]) == 5 and len(m["costs"]["level"]) == 4
        for s in m["steps"]:
            t, k = s["traffic"], 1 if s["sampling"] == "greedy" else 65
            assert t["n_graphs"] == t["n_draft_graphs"] == t["n_rows"] == 0
            # for a node, and for the tokens that the heads guess
            assert t["to_host"] <= s["nodes"] * (12 * k + 8) + 4 * s["nodes"]
            assert sum(s["split"].values()) == pytest.approx(1.0, abs=0.05)
        for sources in m["speeds"].values():
            assert set(sources) == {"demo traces", *gpu.PUBLISHED_ACCEPTANCE}
            for found in sources.values():
                assert all(v > 0 for v in found.values())
            for task in gpu.PUBLISHED_ACCEPTANCE:
                found = sources[task]
                assert found["EntMTP"] >= max(found["plain"], found["63 nodes"]) * (1 - 1e-9)
                assert found["every depth known"] >= found["EntMTP"] * (1 - 1e-9)
    text = out.with_suffix(".md").read_text()
    assert text.startswith(gpu.markdown(report)) and text.strip() in capsys.readouterr().out
    assert "| 64 nodes, top-k |" in text and "| HumanEval (published), 512 |" in text
    assert out.with_suffix(".png").stat().st_size > 10_000
    out.with_suffix(".png").unlink()
    assert bench.main(["--plot", str(out)]) == 0 and out.with_suffix(".png").exists()


def test_published_shares() -> None:
    """The shares give the published tokens per step; a flat curve the whole tree, a steep one none of it."""
    for shares, tau in zip(gpu.PUBLISHED_ACCEPTANCE.values(), (3.78, 3.25), strict=True):
        assert 1 + sum(a * p for a, p in enumerate(shares)) == pytest.approx(tau, abs=0.01)
        assert sum(shares) == pytest.approx(1.0, abs=0.002)
        flat = gpu.from_shares(shares, relative({1: 1.0, 64: 1.0}, [0.0] * 5))
        assert flat["EntMTP"] == pytest.approx(flat["63 nodes"])
        assert flat["63 nodes"] / flat["plain"] == pytest.approx(tau, abs=0.02)
        steep = gpu.from_shares(shares, relative({1: 1.0, 64: 64.0}, [0.0] * 5))
        assert steep["EntMTP"] == steep["plain"] > 10 * steep["63 nodes"]


def test_what_has_no_room_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = gpu.Device(0, "a small device", 8 << 30)
    assert gpu.why_not("tiny", "f16", 512, small) is None
    why = gpu.why_not("32b", "q4_k", 32768, small)
    assert why is not None and "8.6 GB of a small device are free" in why and "--types" in why
    monkeypatch.setattr(gpu, "find_device", lambda wanted: small)
    monkeypatch.setattr(gpu, "demo_traces", lambda *args: None)
    assert bench.main([*SMALL, "--shapes", "32b", "--types", "q4_k,f16", "--contexts", "512"]) == 1
    err = capsys.readouterr().err
    assert "32b q4_k is left out" in err and "32b f16 is left out" in err and "Traceback" not in err


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert inputs.context_lengths("512,4k,32K") == [512, 4096, 32768]
    with pytest.raises(argparse.ArgumentTypeError):
        inputs.context_lengths("4q")
    for wrong, text in (
        (["--shapes", "900b"], "none of"),
        (["--types", "q1"], "none of"),
        (["--contexts", "many"], "no number of tokens"),
    ):
        with pytest.raises(SystemExit) as stop:
            bench.main(["--gpu-study", *wrong])
        assert stop.value.code == 2 and text in capsys.readouterr().err


def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    from entmtp.native.backends import backends

    if any("GPU" in d.kind for found in backends().values() for d in found):
        pytest.skip("there is a GPU")
    assert bench.main(["--gpu-study", "--device", "gpu"]) == 1
    err = capsys.readouterr().err
    assert "this build finds no GPU" in err and "CUDA=1" in err and "Traceback" not in err
