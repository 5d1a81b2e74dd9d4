"""Registration of the models of smpconv_models right after the first import of timm; see smpconv_models/run.py."""
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Optional


class _RegisteringLoader(Loader):
    """Loader of timm that imports smpconv_models afterwards."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> Optional[ModuleType]:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if importlib.util.find_spec('smpconv_models') is None:  # in a checkout that is not installed
            sys.path.append(str(Path(__file__).resolve().parents[2]))
        import smpconv_models  # noqa: F401 (registers the models with timm)


class _TimmFinder(MetaPathFinder):
    """Finder that leaves the search to the others, and wraps the loader that they find for timm."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:
        if fullname != 'timm':
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def _import_hidden_module() -> None:
    """Import the ``sitecustomize`` module that this one hides."""
    own = Path(__file__).resolve().parent
    spec = PathFinder.find_spec('sitecustomize', [path for path in sys.path if Path(path).resolve() != own])
    if spec is not None and spec.loader is not None:
        module = sys.modules['sitecustomize'] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


sys.meta_path.insert(0, _TimmFinder())
_import_hidden_module()
