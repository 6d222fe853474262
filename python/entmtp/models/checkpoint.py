"""Find a checkpoint, in a folder or on the Hugging Face Hub, and list its config and tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import ConvertError, ModelError
from ..common.fields import parse_json
from . import hub
from .formats.safetensors_file import read_safetensors_file
from .formats.tensors import SourceTensor
from .formats.torch_file import read_torch_file

# weight files by how specific they are; the first that exists is taken
HEAD_FILES = (
    "medusa_lm_head.safetensors", "medusa_lm_head.pt", "hydra_lm_head.safetensors", "hydra_lm_head.pt",
)  # fmt: skip
MODEL_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_HEAD_TENSOR = re.compile(r"(.*\.)?(medusa_head|hydra_head|hydra_mlp|hydra_lm_head|prefix_embeding_layer)\.")
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: what is known of its origin, its config.json, and its tensors by name (not loaded)."""

    name: str
    license: str | None
    url: str | None
    label: str  # of the weight file, for messages
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]


def open_checkpoint(source: str, revision: str | None = None, progress: bool = True) -> Checkpoint:
    """Open a checkpoint folder, weight file, or `hf:owner/repo[/file]`.

    Raises ConvertError when something is missing, damaged or holds more than tensors; OSError when a file cannot
    be read.
    """
    if source.startswith("hf:"):
        return _open_hub(source, revision, progress)
    path = Path(source)
    if not path.exists():
        raise ConvertError(
            f"{source}: there is no such folder or file; a repository is given as hf:owner/repo"
        )
    folder, chosen = path, None
    if not path.is_dir():
        folder, chosen = path.parent, path.name
    names = {p.name for p in folder.iterdir()}
    return _read(
        folder.resolve().name, _card_license(folder), None, names, chosen, lambda name: folder / name, source
    )


def _choose(names: set[str], where: str) -> str:
    """The weight file among a checkpoint's files."""
    kinds = {name.split("_")[0] for name in HEAD_FILES if name in names}
    if len(kinds) > 1:
        raise ConvertError(f"{where}: both Medusa and Hydra heads are here; name the weight file itself")
    for name in (*HEAD_FILES, *MODEL_FILES):
        if name in names:
            return name
    raise ConvertError(
        f"{where}: there is no medusa_lm_head or hydra_lm_head file (.safetensors or .pt) and no model file; check "
        "that this is a Medusa or Hydra checkpoint"
    )


def _read(
    name: str,
    license: str | None,
    url: str | None,
    names: set[str],
    chosen: str | None,
    get: Callable[[str], Path],
    where: str,
) -> Checkpoint:
    """Read config and tensors; `get` gives the local path of one of the checkpoint's files `names`."""
    file = chosen or _choose(names, where)
    if "config.json" not in names:
        raise ConvertError(f"{where}: config.json is missing; put the checkpoint's config.json beside {file}")
    config = _read_json(get("config.json"))
    files = [file]
    if file.endswith(".index.json"):
        files = _shards(_read_json(get(file)), file)
    tensors: dict[str, SourceTensor] = {}
    for shard in files:
        if shard not in names:
            raise ConvertError(f"{where}: the weight file {shard} is missing; get the whole checkpoint")
        tensors.update(_read_weights(get(shard)))
    licensed = config.get("license")
    return Checkpoint(
        name, license or (licensed if isinstance(licensed, str) else None), url, file, config, tensors
    )


def _shards(index: dict[str, Any], label: str) -> list[str]:
    """The files that hold heads, of a checkpoint that is split into several."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ConvertError(
            f"{label}: there is no 'weight_map' from tensors to files; get the whole checkpoint"
        )
    files = sorted({file for tensor, file in weight_map.items() if _HEAD_TENSOR.match(tensor)})
    if not files:
        raise ConvertError(
            f"{label}: no tensor of Medusa or Hydra heads is listed; this is a model without heads"
        )
    for file in files:
        if Path(file).name != file:
            raise ConvertError(
                f"{label}: the file {file!r} lies outside the checkpoint; get the whole checkpoint"
            )
    return files


def _read_weights(path: Path) -> dict[str, SourceTensor]:
    with open(path, "rb") as f:
        start = f.read(len(_LFS))
    if not start:
        raise ConvertError(f"{path.name}: the file is empty; download it again")
    if start == _LFS:
        raise ConvertError(
            f"{path.name}: this is a Git LFS pointer, not the weights; run 'git lfs pull' in the checkpoint's folder"
        )
    return read_safetensors_file(path) if path.suffix == ".safetensors" else read_torch_file(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ConvertError(
            f"{path.name}: this is not valid JSON ({e}); download it again or correct it"
        ) from e
    if not isinstance(value, dict):
        raise ConvertError(f"{path.name}: this is no JSON object; download it again or correct it")
    return value


def _card_license(folder: Path) -> str | None:
    """`license:` of the model card's front matter, if there is one."""
    card = folder / "README.md"
    if card.is_file():
        front = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        if front and (line := re.search(r"^license:\s*([\w.+-]+)\s*$", front[1], re.MULTILINE)):
            return line[1]
    return None


def _open_hub(source: str, revision: str | None, progress: bool) -> Checkpoint:
    try:
        name = hub.Name.parse(source, revision)
        repository = hub.open_repository(name, progress)

        def get(file: str) -> Path:
            try:
                return repository.get(file)
            except ModelError as e:
                raise ConvertError(str(e)) from e

    except ModelError as e:
        raise ConvertError(str(e)) from e
    url = f"https://huggingface.co/{name.repo}" + (f"/tree/{name.revision}" if name.revision else "")
    if name.file and name.file not in repository.files:
        raise ConvertError(f"{source}: the repository {name.repo} has no file {name.file}; check the name")
    return _read(name.repo, repository.license, url, set(repository.files), name.file, get, source)
