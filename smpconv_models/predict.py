"""Program of ``python -m smpconv_models.predict``. The function is :func:`smpconv_models.prediction.predict`."""
import sys
from types import ModuleType

from smpconv_models.prediction import predict
from smpconv_models.prediction.cli import main, run

__all__ = ['main', 'predict']


class _CallableModule(ModuleType):
    """Module that is called as the function: an import of the module takes the function's name in the package."""

    __call__ = staticmethod(predict)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == '__main__':
    run()
