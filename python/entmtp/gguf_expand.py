"""The same model with its weights in f32: bit for bit what a quantised file means, without its kernels' rounding."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from .atomic import atomic_path


def expand(source: str | Path, target: str | Path, dtype: str = "f32") -> Path:
    """Write the model `source` to `target` with every weight matrix in `dtype` (`f32` or `f16`)."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    target = Path(target)
    with atomic_path(target) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        for name, field in reader.fields.items():
            if name.startswith("GGUF.") or name == "general.architecture":
                continue
            if name == "general.file_type":
                writer.add_file_type({"f32": 0, "f16": 1}[dtype])
                continue
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub)
        for tensor in reader.tensors:
            data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            matrix = len(tensor.shape) > 1
            writer.add_tensor(
                tensor.name, data.astype(np.float16 if dtype == "f16" and matrix else np.float32)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return target
