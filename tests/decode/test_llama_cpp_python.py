"""llama-cpp-python's own tests, from the source distribution that the build is pinned to, with our `Llama` in place.

They run in a process of their own, in which `llama_cpp.Llama` is a class that drafts wherever there are heads, and the
models that they would download are the demo model and small models with random weights. That distribution holds no
tests of the server; tests/test_serve.py asks it over its socket.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from helpers.models import model_path

NATIVE = Path(__file__).resolve().parents[2] / "native"

TEXT = (
    "expects the very words of Qwen3.5-0.8B; the same calls are compared with plain decoding in test_llama.py"
)
HYBRID = (
    "needs a hybrid model (Falcon-H1): none is at hand, and no small one can be made with gguf's writer alone"
)
NOT_APPLICABLE = {
    "test_real_model": "expects Qwen3.5's token numbers, from classes below Llama that are not ours",
    "test_real_llama": TEXT,
    "test_real_llama_repeated_prompt_cache": TEXT,
    "test_real_llama_embeddings": "needs an encoder (bge): on a model that gives a row per token "
    "llama-cpp-python's own class fails it, too",
    "test_hybrid_model_prompt_cache_reset": HYBRID,
    "test_exact_cached_prompt_reuse_matches_fresh[llama_cpp_hybrid_model_path-False-True]": HYBRID,
    "test_loaded_exact_cached_prompt_reuse_matches_fresh[llama_cpp_hybrid_model_path-False-True]": HYBRID,
    "test_ram_cache_exact_prompt_hit_matches_fresh[llama_cpp_hybrid_model_path-False-True]": HYBRID,
    "test_shorter_prompt_prefix_reuse_matches_fresh[llama_cpp_hybrid_model_path-False-True]": HYBRID,
}

# What stands for the models they download.
PLUGIN = """
import multiprocessing

import huggingface_hub

import entmtp, llama_cpp

DEMO, HEADS, MAMBA = {demo!r}, {heads!r}, {mamba!r}
NOT_APPLICABLE = {not_applicable!r}
n_drafting = 0


def hf_hub_download(repo_id, filename):
    return MAMBA if "mamba" in repo_id else DEMO


class Llama(entmtp.Llama):
    def __init__(self, model_path, **settings):
        if model_path == DEMO:
            settings |= dict(draft="entmtp", heads=HEADS, trees="generic-hydra:n8", policy="static")
            global n_drafting
            n_drafting += 1
        super().__init__(model_path, **settings)


huggingface_hub.hf_hub_download = hf_hub_download
multiprocessing.cpu_count = lambda: 1  # threads that wait for each other spin, and this is not the only test
llama_cpp.Llama = Llama


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if item.name in NOT_APPLICABLE]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.name not in NOT_APPLICABLE]


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"drafting models: {{n_drafting}}")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its tests, and the vocabulary that they read, beside each other as there."""
    result = subprocess.run(
        [sys.executable, NATIVE / "llama_cpp.py", "sdist"], capture_output=True, text=True, timeout=300
    )
    if result.returncode != 0:
        pytest.skip(f"llama-cpp-python's source cannot be had: {result.stderr.strip().splitlines()[-1]}")
    folder = tmp_path_factory.mktemp("llama-cpp-python")
    wanted = re.compile(r"[^/]+/(tests/[^/]+\.py|vendor/llama\.cpp/models/ggml-vocab-llama-spm\.gguf)")
    with tarfile.open(result.stdout.strip()) as tar:
        for member in tar:
            if wanted.fullmatch(member.name):
                path = folder / member.name.partition("/")[2]
                path.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None
                path.write_bytes(content.read())
    return folder


def test_its_tests_pass(source: Path, models: dict[str, Path]) -> None:
    (source / "plugin.py").write_text(
        PLUGIN.format(
            demo=str(models["f32"]),
            heads=str(models["hydra"]),
            mamba=str(model_path("mamba")),
            not_applicable=set(NOT_APPLICABLE),
        )
    )
    options = ["-p", "plugin", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "tests"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=source, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    counts = re.search(r"(\d+) passed, (\d+) deselected", result.stdout)
    assert counts, result.stdout
    assert int(counts[2]) == len(NOT_APPLICABLE)  # each of them is a test that there is
    assert int(counts[1]) >= 17
    drafting = re.search(r"drafting models: (\d+)", result.stdout)
    assert drafting and int(drafting[1]) >= 8
