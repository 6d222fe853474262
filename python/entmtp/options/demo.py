"""What a command uses when no model is named: a small real model, or the bundled demo where there is no network."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from ..common.cache import cache_folder
from ..common.errors import ModelError
from ..common.version import __version__
from ..models.assets import assets

DEMO = "demo"  # the name of the bundled model
AUTO = "auto"  # whatever `first_model` names


def first_model(say: Callable[[str], None]) -> str:
    """Name of the model for who has none: $ENTMTP_MODEL, else SmolLM2-135M-Instruct, fetched once, else the demo.

    Args:
        say: called with a sentence where it is the demo because the other one cannot be had.

    Raises:
        OSError: the disk is full or cannot be written to.
    """
    from ..models.known import fetch_known

    if named := os.environ.get("ENTMTP_MODEL"):
        return named
    try:
        fetch_known("smollm2")
    except ModelError as e:
        say(f"{e}. Going on with the bundled toy, which knows simple arithmetic and little else")
        return DEMO
    return "smollm2"


def demo_files() -> tuple[Path, Path]:
    """The bundled demo model and its Hydra heads, made once and kept in the user's cache.

    The model's weights are expanded to f32, in which passes of any size give the same bits up to the order of a sum:
    with and without drafting the text is the same.

    Raises:
        ModelError: the cache cannot be written to.
    """
    from ..convert import convert
    from ..models.gguf_expand import expand

    source, checkpoint = assets() / "demo-base-q8_0.gguf", assets() / "hydra"
    digest = hashlib.sha256(__version__.encode())
    for path in (source, *sorted(checkpoint.iterdir())):
        digest.update(path.read_bytes())
    folder = cache_folder() / "demo" / digest.hexdigest()[:12]
    model, heads = folder / "demo-base-f32.gguf", folder / "demo-hydra-heads-q4_0.gguf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not model.is_file():
            expand(source, model)
        if not heads.is_file():
            convert(checkpoint, model, heads, outtype="q4_0", progress=False)
    except OSError as e:
        raise ModelError(
            f"the demo model needs 30 MB in the cache folder {folder}, which cannot be written "
            f"({(e.strerror or str(e)).lower()}); set ENTMTP_CACHE to another folder"
        ) from e
    return model, heads
