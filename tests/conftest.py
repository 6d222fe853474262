"""Models that several tests share. Everything is made from the bundled demo assets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import entmtp
from entmtp.convert import convert
from entmtp.models.assets import assets
from entmtp.models.gguf_expand import expand
from entmtp.options.demo import demo_files
from helpers.growth import give_back
from helpers.settings import F32

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave the cores to other tests
os.environ["ENTMTP_MODEL"] = "demo"  # of commands without --model: no test depends on a network

# the same examples in every run, however busy the machine is
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo base in f32, f16 and q8_0, and its heads in f32."""
    folder = tmp_path_factory.mktemp("models")
    q8_0 = assets() / "demo-base-q8_0.gguf"
    found = {
        "q8_0": q8_0,
        "f32": expand(q8_0, folder / "base-f32.gguf"),
        "f16": expand(q8_0, folder / "base-f16.gguf", dtype="f16"),
    }
    for arch in ("medusa", "hydra"):
        found[arch] = folder / f"{arch}.gguf"
        convert(assets() / arch, found["f32"], found[arch], outtype="f32", progress=False)
    return found


@pytest.fixture(scope="module")
def load(models: dict[str, Path]) -> Iterator[Callable[..., entmtp.Llama]]:
    """load(base="f32", heads=None, **settings): a model; equal calls in a file share one, closed at the file's end."""
    loaded: dict[str, entmtp.Llama] = {}

    def get(base: str = "f32", heads: str | None = None, **settings: object) -> entmtp.Llama:
        key = repr((base, heads, sorted(settings.items(), key=str)))
        if key not in loaded:
            draft = {"draft": "entmtp", "heads": models[heads]} if heads else {}
            loaded[key] = entmtp.Llama(models[base], **{**F32, **draft, **settings})
        return loaded[key]

    yield get
    for llm in loaded.values():
        llm.close()
    give_back()


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of its own, with the demo's files: ENTMTP_CACHE for commands."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTMTP_CACHE", str(folder))
        demo_files()
    yield folder
