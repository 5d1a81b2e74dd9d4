"""Program of ``python -m smpconv_models.predict``. The function is :func:`smpconv_models.prediction.predict`."""
import sys
from types import ModuleType

from smpconv_models.prediction import predict
from smpconv_models.prediction.cli import main, run

__all__ = ['main', 'predict']


class _CallableModule(ModuleType):
    """Callable module: importing it binds ``smpconv_models.predict`` to the module."""

    __call__ = staticmethod(predict)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == '__main__':
    run()
