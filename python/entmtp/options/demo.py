"""The bundled demo as files: what a command uses when no model is named."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..common.cache import cache_folder
from ..common.errors import ModelError
from ..common.version import __version__
from ..models.assets import assets

DEMO = "demo"  # the name of the bundled model


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
