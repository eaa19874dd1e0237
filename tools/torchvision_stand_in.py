"""A module that stands in for torchvision while timm is imported: timm only needs its names to be there."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_MODULES = ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".utils")


class _AnyName(type):
    """A class that has every attribute: its name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {"__module__": self.__name__})


@contextlib.contextmanager
def torchvision_stand_in() -> Iterator[None]:
    """Put the stand-in into `sys.modules` for the time of an import, where there is no torchvision.

    timm imports torchvision for its data loaders and for two names its models test against; no model uses it. The
    torchvision that fits this torch wants CUDA, hence this.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    names = [f"torchvision{m}" for m in _MODULES]
    for name in names:
        module = sys.modules[name] = _StandIn(name)
        module.__path__ = []
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
