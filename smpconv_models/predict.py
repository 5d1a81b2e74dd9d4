"""Program of ``python -m smpconv_models.predict``. The function is :func:`smpconv_models.prediction.predict`."""
import signal
import sys
from types import ModuleType

from smpconv_models.prediction import predict
from smpconv_models.prediction.cli import main
from smpconv_models.utils import streams


class _CallableModule(ModuleType):
    """Module that is called as the function: an import of the module takes the function's name in the package."""

    __call__ = staticmethod(predict)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.keep_writable()
    sys.exit(main())
