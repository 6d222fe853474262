"""Heads are found beside the model they were made for, by what their files say."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import gguf
import pytest

from entmtp import Llama
from entmtp.common.errors import ModelError
from entmtp.convert import convert
from entmtp.models import beside
from entmtp.models.assets import assets
from entmtp.models.base import context_length
from entmtp.models.beside import find_heads, heads_keys
from entmtp.models.names import resolve
from entmtp.options.demo import demo_files
from helpers.checkpoints import medusa_config, medusa_state, tiny_base, write_checkpoint


@pytest.fixture
def folder(models: dict[str, Path], tmp_path: Path) -> Path:
    """A folder with the demo model, another model with its own heads, and a broken file."""
    shutil.copy(models["q8_0"], tmp_path / "model.gguf")
    other = tiny_base(tmp_path / "other.gguf")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", medusa_state(2), medusa_config(2))
    convert(checkpoint, other, tmp_path / "a-heads.gguf", progress=False)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    return tmp_path


def renamed(source: Path, target: Path, name: str) -> Path:
    """A copy of a heads file that says it was made for a model of that name."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "medusa")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = name if key == "entmtp.base.name" else field.contents()
            writer.add_key_value(key, value, field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def never(sentence: str) -> None:
    raise AssertionError(sentence)


def test_only_heads_that_fit(folder: Path, models: dict[str, Path]) -> None:
    assert find_heads(folder / "model.gguf", never) is None
    assert find_heads(folder / "other.gguf", never) == folder / "a-heads.gguf"
    mine = Path(shutil.copy(models["medusa"], folder / "any name.gguf"))
    assert find_heads(folder / "model.gguf", never) == mine
    assert find_heads(folder / "broken.gguf", never) is None
    assert find_heads(folder / "no-such.gguf", never) is None


def test_bundled_heads_are_for_their_model(
    folder: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the very name, and after those beside the model."""
    bundled = folder / "assets" / "heads"
    bundled.mkdir(parents=True)
    monkeypatch.setattr(beside, "assets", lambda: folder / "assets")
    foreign = renamed(models["hydra"], bundled / "foreign.gguf", "Another 7B")
    assert find_heads(folder / "model.gguf", never) is None
    own = Path(shutil.copy(models["hydra"], bundled / "own.gguf"))
    assert find_heads(folder / "model.gguf", never) == own
    foreign.unlink()
    mine = Path(shutil.copy(models["medusa"], folder / "mine.gguf"))
    assert find_heads(folder / "model.gguf", never) == mine


def test_the_bundled_heads() -> None:
    """Files that are what docs/train.md says of them."""
    [path] = (assets() / "heads").glob("*.gguf")
    keys = heads_keys(path)
    assert keys is not None and path.stat().st_size < 12e6
    assert (
        keys["entmtp.base.name"] == "Smollm2 135M 8k Lc100K Mix1 Ep2"
        and keys["hydra.embedding_length"] == 576
    )
    assert keys["entmtp.train.chain"] > 1.6


def test_from_inside_the_folder(
    folder: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(models["medusa"], folder / "heads.gguf")
    monkeypatch.chdir(folder)
    found = find_heads(Path("model.gguf"), never)
    assert found is not None and found.samefile(folder / "heads.gguf")


def test_which_of_several(folder: Path, models: dict[str, Path]) -> None:
    said: list[str] = []
    hydra = Path(shutil.copy(models["hydra"], folder / "z.gguf"))
    medusa = Path(shutil.copy(models["medusa"], folder / "b.gguf"))
    newer = Path(shutil.copy(models["medusa"], folder / "c.gguf"))
    foreign = renamed(models["medusa"], folder / "a.gguf", "Another 7B")
    for path, age in ((hydra, 500), (medusa, 400), (newer, 300), (foreign, 0)):
        os.utime(path, (1e9 - age, 1e9 - age))
    for best, others in ((hydra, "c.gguf, b.gguf, a.gguf"), (newer, "b.gguf, a.gguf"), (medusa, "a.gguf")):
        assert find_heads(folder / "model.gguf", said.append) == best
        assert said.pop().endswith(f"using {best.name}, not {others}")
        assert not said
        best.unlink()
    assert find_heads(folder / "model.gguf", said.append) == foreign
    assert "a.gguf was made for Another 7B" in said.pop()


def test_llama_finds_them_and_says_which(folder: Path, models: dict[str, Path]) -> None:
    shutil.copy(models["medusa"], folder / "b.gguf")
    hydra = shutil.copy(models["hydra"], folder / "z.gguf")
    with pytest.warns(RuntimeWarning, match="2 heads files fit"):
        llm = Llama(folder / "model.gguf", draft="entmtp", verbose=False, calibrate=False, n_ctx=64)
    assert llm.heads_path == str(hydra)
    llm.close()


def test_resolve_paths(folder: Path) -> None:
    with pytest.raises(ModelError, match="this is a folder; give a GGUF file, one of") as e:
        resolve(folder)
    assert str(folder / "model.gguf") in str(e.value)
    parts = [folder / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    parts[1].write_bytes(b"")
    with pytest.raises(ModelError, match="its first part m-00001-of-00002"):
        resolve(parts[1])
    parts[0].write_bytes(b"")
    assert resolve(parts[1]) == resolve(str(parts[0])) == parts[0]


def test_context_length(models: dict[str, Path], folder: Path) -> None:
    assert context_length(models["q8_0"]) == 1024
    assert context_length(folder / "broken.gguf") is None


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTMTP_CACHE", str(tmp_path))
    model, heads = demo_files()
    assert find_heads(model, never) == heads
    before = model.stat().st_mtime_ns, heads.stat().st_mtime_ns
    assert demo_files() == (model, heads)
    assert (model.stat().st_mtime_ns, heads.stat().st_mtime_ns) == before
    monkeypatch.setenv("ENTMTP_CACHE", str(model))  # a file
    with pytest.raises(ModelError, match="set ENTMTP_CACHE"):
        demo_files()
