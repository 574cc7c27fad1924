"""Stands in for packages that need a GPU, so that modules which merely import them can be imported.

A name of such a package is an object that can be called, subscripted and used as a decorator, and
does nothing. Nothing that a test looks at goes through one.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Sequence


class Nothing:
    """What every name of an absent package is."""

    def __init__(self, name: str):
        self.__name__ = name

    def __call__(self, *arguments, **named):
        # As a decorator, with or without arguments of its own, it leaves the function as it is.
        if len(arguments) == 1 and callable(arguments[0]) and not named:
            return arguments[0]
        return self

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(f"{self.__name__}.{name}")

    def __getitem__(self, _):
        return self

    def __mro_entries__(self, _):
        return ()


class _Absent(types.ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: Sequence[str]):
        self._packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self._packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Absent(spec.name)

    def exec_module(self, module):
        """There is nothing to run."""


def stand_in_for(*packages: str) -> None:
    """From now on these can be imported. Real ones must not be there."""
    for package in packages:
        assert importlib.machinery.PathFinder.find_spec(package) is None, f"{package} is there"
    sys.meta_path.insert(0, _Finder(packages))
