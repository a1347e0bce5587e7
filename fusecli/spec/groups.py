"""A group: the ordered names to fuse, and what a bare state dict cannot say about them."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, ValidationInfo, field_validator, model_validator

from fusecli.spec.part import Count, Eps, Listed, Maybe, Part, Pattern
from fusecli.spec.scalars import one_of, problem
from fusecli.spec.wording import described

Kind = Literal[
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"
]


def _read_stride(value: object) -> object:
    return value if isinstance(value, (list, tuple)) else [value]


Stride = Annotated[Listed[Count], BeforeValidator(_read_stride)]


class GroupSpec(Part):
    """One entry of `groups`: names or patterns in the order of the dataflow.

    kind, groups, eps and stride describe the first layer and its norm where no module can be asked.
    A single stride stands for all dimensions. A single name is a layer that is baked and not folded, or a
    module that a fuser for its class takes.
    """

    modules: Listed[Pattern]
    kind: Maybe[Annotated[Kind, BeforeValidator(one_of("kind", get_args(Kind)))]] = None
    groups: Maybe[Count] = None
    eps: Maybe[Eps] = None
    stride: Maybe[Stride] = None

    @model_validator(mode="before")
    @classmethod
    def _a_list_is_its_modules(cls, value: object) -> object:
        if isinstance(value, (list, tuple)):
            return {"modules": value}
        if isinstance(value, (dict, GroupSpec)):
            return value
        fix = "write [conv1, bn1] or {modules: [conv1, bn1], eps: 1e-5}"
        raise problem(f"a group is a list of names, found {described(value)}", fix)

    @field_validator("modules")
    @classmethod
    def _two_or_more(cls, modules: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not modules:
            raise problem("this group is empty", "list the names to fuse: [conv1, bn1], or remove it")
        if len(modules) == 1 and not (info.context or {}).get("alone"):
            raise problem("a group needs at least two names", "list what is fused into what: [conv1, bn1]")
        return modules
