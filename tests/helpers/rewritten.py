"""A GGUF file once more, with other keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf


def rewritten(
    source: Path, path: Path, without: tuple[str, ...], more: Callable[[gguf.GGUFWriter], None]
) -> Path:
    """Write `source` to `path` without the keys that begin so; `more` adds others."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "general.architecture", *without)):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub)
    more(writer)
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
