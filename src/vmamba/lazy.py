"""Importing late: attributes that are imported when somebody asks, and a module that follows another package."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def attributes(
    package: str, homes: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` of a package whose names are imported when they are first used.

    Args:
        package: its name.
        homes: by module, the names that it defines.
        modules: modules of the package that are attributes as well.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    class Package(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            # An import binds the module in its package, also where a function of the package has the same name.
            if not (isinstance(value, ModuleType) and name in home_of):
                super().__setattr__(name, value)

    sys.modules[package].__class__ = Package
    return get, lambda: sorted({*vars(sys.modules[package]), *home_of, *modules})


def import_after(package: str, module: str) -> None:
    """Import `module` once `package` is imported: at once if it is already, else when somebody has imported it.

    If one of `module`'s own relatives imports the package, `module` waits until that relative is complete.
    """
    finder = _Finder(package, module)
    # Before looking whether it is there, so that a thread which imports it meanwhile meets the finder.
    sys.meta_path.insert(0, finder)
    finder.follow()


class _Finder(MetaPathFinder, threading.local):
    """Finds what the other finders find; notices when the package, or a relative that may import it, is complete."""

    depth = 0  # of imports within imports, of these modules, in this thread

    def __init__(self, package: str, module: str) -> None:
        self.package, self.module, self.relatives = package, module, f"{module.partition('.')[0]}."

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package and not fullname.startswith(self.relatives):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for other in others if (found := other.find_spec(fullname, path, target))), None)
        if spec and spec.loader:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def follow(self) -> None:
        """Import the module if its time has come."""
        if self.depth == 0 and self.package in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            importlib.import_module(self.module)


class _Loader(Loader):
    """Loads as the loader that it stands for, and puts that back in its place."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__
        module.__spec__.loader = module.__loader__ = self.loader
        self.finder.depth += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.depth -= 1
        self.finder.follow()
