"""Scan of the pickles of ``torch.save`` without creating their objects.

Unpickling calls the functions that the file names. Here every name is replaced by a class that does nothing, and every
storage of a tensor by its size, so that a file can be checked before it is loaded.
"""
import pickle
import struct
from typing import IO, Any, Callable, ClassVar, Dict, List, NamedTuple, Set

# Globals that tensors and plain data need; all others are unsafe.
_PLAIN = {
    'argparse.Namespace',  # timm's training script stores its arguments in it
    'collections.OrderedDict', 'torch.Size', 'torch._utils._rebuild_parameter', 'torch._utils._rebuild_tensor',
    'torch._utils._rebuild_tensor_v2',
}
_DTYPES = {'torch.bfloat16', 'torch.float16', 'torch.float32', 'torch.float64'}  # among the options of optimizers
_TENSORS = ('torch._utils._rebuild_tensor', 'torch._utils._rebuild_tensor_v2')
_MAX_DIMS = 64  # as in most of PyTorch's operations

# Opcodes that PyTorch's own unpickler lacks. Python's reserves memory for them or calls objects of other libraries.
_UNUSED = (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.FROZENSET, pickle.ADDITEMS)

# Storage type -> bytes of an element.
_STORAGES = {
    'Bool': 1, 'Byte': 1, 'Char': 1, 'Untyped': 1, 'BFloat16': 2, 'Half': 2, 'Short': 2, 'Float': 4, 'Int': 4,
    'ComplexFloat': 8, 'Double': 8, 'Long': 8, 'ComplexDouble': 16,
}

# Errors of Python's unpickler on malformed pickles, which it does not document.
_MALFORMED = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError,
    TypeError, ValueError, struct.error,
)


class Contents(NamedTuple):
    """Contents of pickles."""
    unsafe_globals: List[str]  # sorted names of functions and classes that plain data and tensors do not need
    storages: Dict[str, int]  # bytes of each tensor storage, by its key
    last: Any  # content of the last pickle


class _Inert:
    """Replacement of any object, which accepts all that an unpickler does and does nothing."""

    name = ''

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any) -> '_Inert':
        return self

    __setstate__ = __setitem__ = append = extend = add = __init__


class _Uncalled(_Inert):
    """Replacement of a storage's type, whose call would reserve memory, or of a dtype: neither may be called."""

    def __new__(cls, *args: Any, **kwargs: Any) -> '_Uncalled':
        raise pickle.UnpicklingError(f'it makes a {cls.name} of its own')


class _Storage(_Inert):
    def __init__(self, elements: int = 0) -> None:
        self.elements = elements


class _Parameter(_Inert):
    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError('it changes a tensor')


class _Tensor(_Parameter):
    """Replacement of a tensor, which must lie within its storage and may repeat no element.

    PyTorch would enlarge the storage to the size that the tensor asks for.
    """

    def __init__(self, storage: Any = None, offset: Any = 0, size: Any = (), stride: Any = (), *args: Any) -> None:
        if not isinstance(storage, _Storage) or not _are_counts((offset,), size, stride) or len(size) != len(stride):
            raise pickle.UnpicklingError('it has a tensor that is none')
        elements, last = 1, offset
        for count, step in zip(size, stride):
            elements, last = elements * count, last + (count - 1) * step
        if offset > storage.elements or elements > storage.elements or (elements and last >= storage.elements):
            raise pickle.UnpicklingError(f'it has a tensor of shape {size} in {storage.elements} elements')


def _are_counts(*values: Any) -> bool:
    return all(
        isinstance(value, tuple) and len(value) <= _MAX_DIMS
        and all(isinstance(count, int) and 0 <= count < 1 << 63 for count in value)
        for value in values)


def _no_arguments(self: Any, *args: Any) -> None:
    """Reject the arguments of a container, which would copy them."""
    if args:
        raise pickle.UnpicklingError('it fills a dictionary in one call')


class _Bounded:
    """File of which no more can be read than it has: Python reserves the memory before it reads."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.size:
            raise EOFError('it is longer than the file')
        return self.file.read(count)


# The one written in Python: that in C reserves memory for as many memo entries as a pickle claims.
_PythonsUnpickler: Any = pickle._Unpickler


def _with_checked_keys(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    """Return an opcode's handler that rejects keys which are tuples in tuples.

    The recursion of their hash ends the process, or never ends.
    """
    def checked(unpickler: Any) -> None:
        tuples = (key for key in unpickler.stack[keys] if isinstance(key, tuple))
        if any(isinstance(item, tuple) for key in tuples for item in key):
            raise pickle.UnpicklingError('it has a dictionary whose names are nested')
        load(unpickler)
    return checked


class _Unpickler(_PythonsUnpickler):
    dispatch: ClassVar[Dict[int, Callable[..., None]]] = {
        **{code: load for code, load in _PythonsUnpickler.dispatch.items() if bytes([code]) not in _UNUSED},
        pickle.SETITEM[0]: _with_checked_keys(_PythonsUnpickler.load_setitem, slice(-2, -1)),
        pickle.SETITEMS[0]: _with_checked_keys(_PythonsUnpickler.load_setitems, slice(None, None, 2)),
        pickle.DICT[0]: _with_checked_keys(_PythonsUnpickler.load_dict, slice(None, None, 2)),
    }

    def __init__(self, file: IO[bytes], size: int) -> None:
        bounded: Any = _Bounded(file, size)
        super().__init__(bounded, encoding='utf-8')
        self.left = size
        self.types: Dict[str, Any] = {}
        self.storages: Dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        path = f'{module}.{name}'
        if not path.isprintable():
            raise pickle.UnpicklingError(f'it names {path[:80]!r}')
        if path not in self.types:
            self.types[path] = self._stand_in(path)
        return self.types[path]

    def _stand_in(self, path: str) -> Any:
        if path == 'torch.Size':
            return self._size
        if path in _TENSORS:
            return _Tensor
        if path == 'torch._utils._rebuild_parameter':
            return _Parameter
        if path in ('collections.OrderedDict', 'argparse.Namespace'):
            return type('_Container', (_Inert,), {
                '__init__': _no_arguments, '__setstate__': lambda _, state: self._count(state)})
        is_uncalled = _storage_kind(path) in _STORAGES or path in _DTYPES
        return type('_Inert', (_Uncalled if is_uncalled else _Inert,), {'name': path})

    def _size(self, *values: Any) -> Any:
        """Replace torch.Size, which copies its argument."""
        result = tuple(*values)
        if len(result) > _MAX_DIMS:
            raise pickle.UnpicklingError(f'it has a tensor of {len(result)} dimensions')
        return result

    def _count(self, state: Any) -> None:
        """Count the entries of a state: it is copied each time it is set, and a pickle can set it many times."""
        if not isinstance(state, dict) or any(isinstance(name, str) and name.startswith('__') for name in state):
            raise pickle.UnpicklingError('it changes what an object does')  # its __setstate__, say
        self.left -= len(state)
        if self.left < 0:
            raise pickle.UnpicklingError('it repeats itself')

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == 'module':  # a whole module in an old file
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != 'storage':
            raise pickle.UnpicklingError('it refers to something that is no tensor')
        _, kind, key, _, elements, *_ = pid
        size = _STORAGES.get(_storage_kind(getattr(kind, 'name', '')))
        # a key of another type may differ from itself (NaN), and elements of another type take very long to print
        if size is None or not isinstance(key, str) or not isinstance(elements, int) or not 0 <= elements < 1 << 63:
            raise pickle.UnpicklingError('it has a storage without a type, a name or a size')
        if self.storages.setdefault(key, size * elements) != size * elements:
            raise pickle.UnpicklingError('it has a storage of two sizes')  # PyTorch would create each of them
        return _Storage(elements)


def _storage_kind(path: str) -> str:
    """Return 'Float' for torch.FloatStorage; '' for a name that is no storage."""
    module, _, name = path.rpartition('.')
    is_storage = module in ('torch', 'torch.storage') and name.endswith('Storage')
    return name.removesuffix('Storage') if is_storage else ''


def scan_pickles(file: IO[bytes], size: int, count: int = 1) -> Contents:
    """Scan ``count`` consecutive pickles of a file with ``size`` bytes; raise ValueError if one is malformed."""
    names: Set[str] = set()
    storages: Dict[str, int] = {}
    for _ in range(count):
        unpickler = _Unpickler(file, size)
        try:
            last = unpickler.load()
        except _MALFORMED as error:
            raise ValueError(f'its pickle cannot be read: {type(error).__name__} {error}') from error
        names.update(unpickler.types)
        for key, claimed in unpickler.storages.items():
            storages[key] = max(storages.get(key, 0), claimed)
    unsafe = (name for name in names - _PLAIN - _DTYPES if _storage_kind(name) not in _STORAGES)
    return Contents(sorted(unsafe), storages, last)
