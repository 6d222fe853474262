"""The same model in another type: in f32 it is bit for bit what a quantised file means, without its kernels'
rounding."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from ..common.atomic import atomic_path

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}


def expand(source: str | Path, target: str | Path, dtype: str = "f32") -> Path:
    """Write the model `source` to `target` with every weight matrix in `dtype` (a key of TYPES); vectors are f32."""
    kind_of_matrix, file_type = TYPES[dtype]
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    target = Path(target)
    with atomic_path(target) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        for name, field in reader.fields.items():
            if name.startswith("GGUF.") or name == "general.architecture":
                continue
            if name == "general.file_type":
                writer.add_file_type(file_type)
                continue
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub)
        for tensor in reader.tensors:
            data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if len(tensor.shape) > 1:
                quantised = gguf.quants.quantize(data, kind_of_matrix)
                writer.add_tensor(tensor.name, quantised, raw_dtype=kind_of_matrix)
            else:
                writer.add_tensor(tensor.name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return target
