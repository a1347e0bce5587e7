"""What a module's get_extra_state has put into a state dict beside the tensors: is it stored as it is?"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

EXTRA_STATE = "fusecli.extra_state"
_SCALARS = (type(None), bool, int, float, str)
# torch.load with weights_only gives these back.
_PLAIN = (*_SCALARS, bytes, complex, Tensor)


def in_text(others: Mapping[str, object]) -> dict[str, str]:
    """Metadata of a safetensors file that holds these entries; empty if there are none."""
    return {EXTRA_STATE: json.dumps(others)} if others else {}


def fits_in_text(value: object) -> bool:
    """Whether JSON gives back what it was given: no tuples, tensors, keys that are no text."""
    if isinstance(value, float):
        return value - value == 0  # JSON has no infinities
    if type(value) is list:
        return all(map(fits_in_text, value))
    if type(value) is dict:
        return all(type(key) is str and fits_in_text(each) for key, each in value.items())
    return type(value) in _SCALARS


def is_plain(value: Any) -> bool:
    """Whether torch.load gives it back without running code that the file names."""
    if type(value) in (list, tuple, set):
        return all(map(is_plain, value))
    if type(value) in (dict, OrderedDict):
        return all(is_plain(key) and is_plain(each) for key, each in value.items())
    return type(value) in _PLAIN
