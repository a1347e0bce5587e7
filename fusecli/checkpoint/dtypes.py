"""The dtypes a safetensors file can hold, by the name that stands in its header."""

from __future__ import annotations

import torch

# Newer torch only: a file that uses one of them is refused by name where torch has no such dtype.
_RECENT = {"F8_E8M0": "float8_e8m0fnu"}

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    **{name: getattr(torch, attr) for name, attr in _RECENT.items() if hasattr(torch, attr)},
}

NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
