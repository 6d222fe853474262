"""What ended the process, or stopped drafting for good: each is a sentence now, or leaves no trace. Run in children."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from entmtp import EntmtpError, Llama
from helpers.adapter import write_adapter
from helpers.eagle3 import write_eagle3
from helpers.models import SPECS, write_model
from helpers.rewritten import rewritten
from helpers.typed import DEMO

SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


def ended(code: str) -> str:
    """What a child prints that runs `code`; it must not crash."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(("width", "own"), [(96, False), (32, False), (96, True)])
def test_a_layer_for_a_model_of_another_width(tmp_path: Path, width: int, own: bool) -> None:
    """Of the same vocabulary, as Llama-3.1-8B's for Llama-3.2-1B."""
    base = write_model(tmp_path / "base.gguf", SPECS["llama"], seed=3)
    other = write_model(tmp_path / "other.gguf", replace(SPECS["llama"], n_embd=width), seed=3)
    folder = tmp_path / "layers"
    folder.mkdir()
    layer, _ = write_eagle3(other, folder / "layer.gguf", **({"width": width} if own else {}))
    code = f"""
from entmtp import Llama
try:
    Llama({str(base)!r}, draft="entmtp", draft_model={str(layer)!r}, n_ctx=256, n_threads=1, verbose=False)
except Exception as e:
    print(type(e).__name__, e)
"""
    assert "trained for a model of another width" in ended(code)


def test_a_drafter_without_a_vocabulary(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", SPECS["llama"], seed=3)
    drafter = rewritten(
        base, tmp_path / "drafter.gguf", ("tokenizer.",), lambda w: w.add_tokenizer_model("no_vocab")
    )
    code = f"""
from entmtp import Llama
try:
    Llama({str(base)!r}, draft="entmtp", draft_model={str(drafter)!r}, n_ctx=256, n_threads=1, verbose=False)
except Exception as e:
    print(e)
"""
    assert "vocabulary" in ended(code)


@pytest.mark.parametrize(
    "how",
    [
        "m = Llama(DEMO, embedding=True, **s); m.sample()",
        "m = Llama(DEMO, logits_all=True, **s); m.eval([1, 2, 3]); m.sample(idx=50)",
        "m = Llama(DEMO, draft_model=LlamaPromptLookupDecoding(), **s); m.sample()",
    ],
)
def test_sampling_where_there_are_no_logits(how: str) -> None:
    code = f"""
from entmtp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
DEMO, s = {str(DEMO)!r}, dict(n_ctx=256, n_threads=1, verbose=False)
try:
    {how}
except Exception as e:
    print(e)
"""
    assert "no logits" in ended(code) or "must lie" in ended(code)


@pytest.mark.parametrize("kind", ["i8", "i32", "f64", "3d"])
def test_adapters_of_what_are_no_weights(tmp_path: Path, kind: str) -> None:
    right = write_adapter(DEMO, tmp_path / "right.gguf")
    reader, wrong = gguf.GGUFReader(right), tmp_path / "wrong.gguf"
    writer = gguf.GGUFWriter(wrong, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for t in reader.tensors:
        data = np.array(t.data)
        data = (
            data[None].repeat(2, 0)
            if kind == "3d"
            else data.astype({"i8": "i1", "i32": "i4", "f64": "f8"}[kind])
        )
        writer.add_tensor(t.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"lora_path: .*no matrix of weights"):
        Llama(DEMO, lora_path=str(wrong), **SETTINGS)
    Llama(DEMO, lora_path=str(right), **SETTINGS).close()


def test_logits_that_are_none_do_not_stop_drafting(tmp_path: Path) -> None:
    """One text with a token whose embedding is no number; later texts are drafted as before."""
    path = write_model(tmp_path / "nan.gguf", SPECS["llama"], seed=3)
    next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "token_embd.weight").data[100] = np.nan
    llm = Llama(
        path, draft="entmtp", adapt=False, drafters=["text", "recycling"], calibrate=False, **SETTINGS
    )

    def accepted() -> int:
        before = llm.draft_stats.n_accepted
        tokens = llm.generate([5, 6, 7, 8] * 8, temp=0.0)
        for _ in zip(range(80), tokens, strict=False):
            pass
        return llm.draft_stats.n_accepted - before

    llm.reset()
    assert accepted() > 10
    for _ in zip(range(10), llm.generate([5, 100, 6], temp=0.0), strict=False):
        pass
    llm.reset()
    assert accepted() > 10
    llm.close()


def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / b"\xff.gguf".decode("utf-8", "surrogateescape")
    path.write_bytes(DEMO.read_bytes())
    with pytest.raises(ValueError, match="no UTF-8"):
        Llama(path, **SETTINGS)
    with pytest.raises(EntmtpError, match="heads"):
        Llama(DEMO, draft="entmtp", heads=path, **SETTINGS)
    Llama(DEMO, draft="entmtp", draft_model=path, **SETTINGS).close()  # the model itself drafts
