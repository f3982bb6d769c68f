"""Parameterisations by name: built-in ones are imported when first named, others register themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from postformer.design.base import nearest

T = TypeVar("T", bound=type)


class Named:
    """One family of parameterisations. built_in: name -> module of `package` that registers it."""

    def __init__(self, package: str, built_in: Mapping[str, str]) -> None:
        self.package, self.built_in = package, built_in
        self.classes: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator."""
        def add(cls: T) -> T:
            self.classes[name] = cls
            return cls
        return add

    def resolve(self, name: str) -> Any:
        """The parameterisation of this name. ValueError for an unknown one."""
        if name not in self.classes and name in self.built_in:
            import_module(f"{self.package}.{self.built_in[name]}")
        if name not in self.classes:
            raise ValueError(f"unknown parameterisation '{name}'.{nearest(name, {*self.classes, *self.built_in})}")
        return self.classes[name]
