"""The methods of stage two in one table: what each trains, what it freezes, and what it learns from.

A new method is an entry of ``METHODS``, and code of its own only if it computes something new.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method of training. A model is named by the option that gives it: ``reader`` or ``resource``."""

    name: str
    """On the command line, in run folders and in their names."""
    paper_name: str
    """In the paper and in reports."""
    summary: str
    """For the help text."""
    title: str
    """The models of one training in words. Fields of ``TrainConfig`` stand in braces."""
    trains: Literal["reader", "resource"] = "reader"
    """The option that gives the trained model."""
    frozen: Literal["reader", "resource"] | None = None
    """The option that gives the frozen model. Its states are fused and appended. None if nothing is appended."""
    needs_teacher: bool = False
    """Whether it learns from the logits of a teacher beside the labels."""

    @property
    def needs_resource(self) -> bool:
        """Whether ``--resource`` has to be given."""
        return "resource" in (self.trains, self.frozen)

    @property
    def is_plain(self) -> bool:
        """Whether it only fine-tunes one model. Plain methods compute the same and differ in the option they read."""
        return self.frozen is None and not self.needs_teacher


_METHODS = (
    Method(name="kreader", paper_name="KReader", summary="the reader alone", title="{reader}"),
    Method(
        name="kresource",
        paper_name="KResource",
        summary="the resource, fine-tuned",
        title="{resource}",
        trains="resource",
    ),
    Method(
        name="kreader2",
        paper_name="KReader2",
        summary="the reader with a frozen copy of itself as resource",
        title="{reader} with itself, {fusion}",
        frozen="reader",
    ),
    Method(
        name="kr2",
        paper_name="KR2",
        summary="the reader with the resource's states",
        title="{reader} + {resource}, {fusion}",
        frozen="resource",
    ),
    Method(
        name="kd",
        paper_name="KD",
        summary="distillation from --teacher",
        title="{reader}, taught by {teacher}",
        needs_teacher=True,
    ),
)
METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _METHODS})
"""All methods by name, in the order of the paper's tables."""
PLAIN_METHODS = tuple(method.name for method in _METHODS if method.is_plain)
