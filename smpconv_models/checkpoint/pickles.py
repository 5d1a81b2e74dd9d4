"""What is in a pickle of ``torch.save``, without making anything of it.

Unpickling calls whatever the file names. Here each name stands for a class that does nothing, and each tensor's storage
for its size, so that a file can be judged before any of it is believed.
"""
import pickle
import struct
from typing import IO, Any, Callable, ClassVar, Dict, List, NamedTuple, Set

# Everything that tensors and plain data need; all else is code.
_PLAIN = {
    'argparse.Namespace',  # timm's training script stores its arguments in one
    'collections.OrderedDict', 'torch.Size', 'torch._utils._rebuild_parameter', 'torch._utils._rebuild_tensor',
    'torch._utils._rebuild_tensor_v2',
}
_DTYPES = {'torch.bfloat16', 'torch.float16', 'torch.float32', 'torch.float64'}  # options of optimizers
_TENSORS = ('torch._utils._rebuild_tensor', 'torch._utils._rebuild_tensor_v2')
_MAX_DIMS = 64  # what most of PyTorch's operations take

# What PyTorch's own unpickler knows none of, and Python's reserves memory or calls objects of other libraries for.
_UNUSED = (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.FROZENSET, pickle.ADDITEMS)

# Bytes of an element.
_STORAGES = {
    'Bool': 1, 'Byte': 1, 'Char': 1, 'Untyped': 1, 'BFloat16': 2, 'Half': 2, 'Short': 2, 'Float': 4, 'Int': 4,
    'ComplexFloat': 8, 'Double': 8, 'Long': 8, 'ComplexDouble': 16,
}

# What Python's unpickler raises of a pickle that isn't one; it names no list.
_MALFORMED = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError,
    TypeError, ValueError, struct.error,
)


class Contents(NamedTuple):
    """What pickles name.

    Attributes:
        code: Functions and classes that plain data and tensors don't need, sorted.
        storages: Bytes of each tensor storage, by its key.
        last: What the last of them holds.
    """
    code: List[str]
    storages: Dict[str, int]
    last: Any


class _Inert:
    """An instance of anything: takes all that an unpickler does to it, and does nothing."""

    name = ''

    def __new__(cls, *args: Any, **kwargs: Any) -> '_Inert':
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _ignore(self, *args: Any) -> None:
        pass

    def __call__(self, *args: Any) -> '_Inert':
        return self

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Uncalled(_Inert):
    """A storage's type, whose call would reserve memory, or a data type: both are only named."""

    def __new__(cls, *args: Any, **kwargs: Any) -> '_Uncalled':
        raise pickle.UnpicklingError(f'it makes a {cls.name} of its own')


class _Storage(_Inert):
    def __init__(self, elements: int = 0) -> None:
        self.elements = elements


class _Parameter(_Inert):
    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError('it changes a tensor')


class _Tensor(_Parameter):
    """Lies within its storage, which PyTorch enlarges to whatever a tensor asks for; no element is there twice."""

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
    """Of a container, which would copy them."""
    if args:
        raise pickle.UnpicklingError('it fills a dictionary in one call')


class _Bounded:
    """A file that is asked for no more than it has: Python reserves what it asks for."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.size:
            raise EOFError('it is longer than the file')
        return self.file.read(count)


# Python's own and not C's, which reserves memory for whatever number of entries a pickle speaks of.
_PythonsUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonsUnpickler):
    dispatch: ClassVar[Dict[int, Callable[..., None]]] = {
        code: load for code, load in _PythonsUnpickler.dispatch.items() if bytes([code]) not in _UNUSED}

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
        """torch.Size, which copies what it is given."""
        result = tuple(*values)
        if len(result) > _MAX_DIMS:
            raise pickle.UnpicklingError(f'it has a tensor of {len(result)} dimensions')
        return result

    def _count(self, state: Any) -> None:
        """A state is copied each time it is set, and a pickle can say so many times over."""
        if not isinstance(state, dict) or any(isinstance(name, str) and name.startswith('__') for name in state):
            raise pickle.UnpicklingError('it changes what an object does')  # its __setstate__, say
        self.left -= len(state)
        if self.left < 0:
            raise pickle.UnpicklingError('it repeats itself')

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == 'module':  # a whole module of old: the class is code
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != 'storage':
            raise pickle.UnpicklingError('it refers to something that is no tensor')
        _, kind, key, _, elements, *_ = pid
        size = _STORAGES.get(_storage_kind(getattr(kind, 'name', '')))
        # A key of another type may be unlike itself (NaN), and elements of another type take forever to print
        if size is None or not isinstance(key, str) or not isinstance(elements, int) or not 0 <= elements < 1 << 63:
            raise pickle.UnpicklingError('it has a storage without a type, a name or a size')
        if self.storages.setdefault(key, size * elements) != size * elements:
            raise pickle.UnpicklingError('it has a storage of two sizes')  # PyTorch would make anew each that differs
        return _Storage(elements)

    def _check_keys(self, keys: Any) -> None:
        """Tuples in tuples would be hashed by a recursion that ends the process, or never does."""
        if any(isinstance(key, tuple) and any(isinstance(item, tuple) for item in key) for key in keys):
            raise pickle.UnpicklingError('it has a dictionary whose names are nested')

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_dict()

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict


def _storage_kind(path: str) -> str:
    """'Float' of torch.FloatStorage; '' of what is no storage."""
    module, _, name = path.rpartition('.')
    is_storage = module in ('torch', 'torch.storage') and name.endswith('Storage')
    return name.removesuffix('Storage') if is_storage else ''


def inspect(file: IO[bytes], size: int, count: int = 1) -> Contents:
    """Reads so many pickles, one after the other, of a file of this size.

    Raises:
        ValueError: They are malformed.
    """
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
    code = (name for name in names - _PLAIN - _DTYPES if _storage_kind(name) not in _STORAGES)
    return Contents(sorted(code), storages, last)
