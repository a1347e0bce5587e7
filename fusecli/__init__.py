"""Fold what is linear at inference into the layer beside it, and prove that nothing changed.

`import fusecli` is cheap: torch comes with the first of the names below that is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusecli.api import (
        fuse,
        fuse_modules,
        fuse_modules_qat,
        load_fused,
        load_int8,
        plan,
        prepare_qat,
        verify,
    )

__all__ = [
    "fuse",
    "fuse_modules",
    "fuse_modules_qat",
    "load_fused",
    "load_int8",
    "plan",
    "prepare_qat",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fusecli' has no attribute {name!r}")
    from fusecli import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
