"""Hostile files, and all kinds of files that torch.save and safetensors write."""
import argparse
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from common import Call
from safetensors.torch import load_file, save_file

from smpconv_models import checkpoint
from smpconv_models.checkpoint import pickles
from smpconv_models.utils.errors import first_line

MIB = 1 << 20
MAGIC = torch.serialization.MAGIC_NUMBER
PROTO = b'\x80\x02'


# --- pickles by hand ---


def name(path):
    module, _, attribute = path.rpartition('.')
    return f'c{module}\n{attribute}\n'.encode()


def text(value):
    return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def number(value):
    digits = pickle.encode_long(value)
    return (b'\x8a' + bytes([len(digits)]) if len(digits) < 256 else b'\x8b' + struct.pack('<i', len(digits))) + digits


def several(*items):
    return b'(' + b''.join(items) + b't'


def under(value, key='w'):
    """A dictionary of one entry."""
    return b'}' + text(key) + value + b's'


def storage(elements=1, kind='torch.FloatStorage', key=None, view=b''):
    return several(
        text('storage'), name(kind), key or text('0'), text('cpu'), number(elements), view) + b'Q'


def tensor(of, size=(1,), stride=(1,), offset=0):
    numbers = number(offset), several(*map(number, size)), several(*map(number, stride))
    arguments = several(of, *numbers, b'\x89', name('collections.OrderedDict') + b')R')
    return name('torch._utils._rebuild_tensor_v2') + arguments + b'R'


def write_zip(path, body, records=(('data/0', bytes(4)),), prefix='archive/', proto=PROTO, **kwargs):
    with zipfile.ZipFile(path, 'w', **kwargs) as archive:
        archive.writestr(f'{prefix}data.pkl', proto + body + b'.')
        archive.writestr(f'{prefix}version', '3\n')
        for record, content in records:
            archive.writestr(prefix + record, content)
    return path


ONE_FLOAT = struct.pack('<q', 1) + bytes(4)  # as a legacy file has it, after its length


def write_legacy(path, body, keys=None, data=ONE_FLOAT):
    head = b''.join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {}))
    keys = b']' + text('0') + b'a' if keys is None else keys
    path.write_bytes(head + PROTO + body + b'.' + PROTO + keys + b'.' + data)
    return path


def write(path, body, new_format, elements=1):
    """Write either format, with a storage of ``elements`` floats."""
    if new_format:
        return write_zip(path, body, [('data/0', bytes(4 * elements))])
    return write_legacy(path, body, data=struct.pack('<q', elements) + bytes(4 * elements))


def view_of(new_format):
    """Return the last part of a storage's description, which only the legacy format has."""
    return b'' if new_format else b'N'


@contextmanager
def memory_below(limit):
    """Fail if Python's objects take more bytes at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def refused(path, match=None, readers=(checkpoint.check_file, checkpoint.load_file)):
    """Check that the readers raise one line that names the file, without the memory that the file asks for."""
    with memory_below(64 * path.stat().st_size + 8 * MIB):
        for reader in readers:
            with pytest.raises(ValueError, match=match) as error:
                reader(path)
            message = str(error.value)
            assert str(path) in message and len(message.splitlines()) == 1 and len(message) < 1500


formats = pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])


def test_pickles_by_hand_are_read(tmp_path):
    """The harmless file from which the attacks differ."""
    for new_format in (True, False):
        path = write(tmp_path / 'a.pth', under(tensor(storage(view=view_of(new_format)))), new_format)
        assert torch.equal(checkpoint.load_file(path)['w'], torch.zeros(1))


# --- code ---


@formats
@pytest.mark.parametrize('function', [os.system, os.mkdir, eval, exec, torch.load, getattr, subprocess.call])
def test_calls_are_named_and_not_made(tmp_path, new_format, function):
    path = tmp_path / 'a.pth'
    torch.save({'w': Call(function, 'x', {})}, path, _use_new_zipfile_serialization=new_format)
    refused(path, rf'it references unsafe globals: \S+\.{function.__name__}')


@formats
def test_another_loader_makes_the_call(tmp_path, new_format):
    path, trap = tmp_path / 'a.pth', tmp_path / 'trap'
    torch.save({'w': Call(os.mkdir, str(trap))}, path, _use_new_zipfile_serialization=new_format)
    refused(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()


@formats
@pytest.mark.filterwarnings('ignore')
def test_whole_module(tmp_path, new_format):
    torch.save(torch.nn.Linear(2, 3), tmp_path / 'a.pth', _use_new_zipfile_serialization=new_format)
    refused(tmp_path / 'a.pth', r'torch\.nn\.modules\.linear\.Linear')
    assert isinstance(torch.load(tmp_path / 'a.pth', weights_only=False), torch.nn.Linear)


@pytest.mark.parametrize('place', range(5))
def test_each_pickle_of_a_legacy_file(tmp_path, place):
    parts = [pickle.dumps(part, 2) for part in (MAGIC, 1001, {}, {}, [])]
    parts[place] = pickle.dumps(Call(os.mkdir, str(tmp_path / 'trap')), 2)
    path = tmp_path / 'a.pth'
    path.write_bytes(b''.join(parts))
    refused(path, r'posix\.mkdir')
    assert not (tmp_path / 'trap').exists()


@pytest.mark.filterwarnings('ignore')
def test_programs_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), tmp_path / 'a.pth')
    refused(tmp_path / 'a.pth', 'TorchScript')
    with torch.package.PackageExporter(tmp_path / 'b.pth') as exporter:
        exporter.save_pickle('x', 'data.pkl', {'a': torch.ones(2)})
    refused(tmp_path / 'b.pth')


# --- pickles of an archive: the dictionary's value, in torch.save's protocol, and the message ---


def set_many_times(kind, line):
    """A line of 10 bytes copies all entries."""
    entries = b'}(' + b''.join(number(i) + b'N' for i in range(2000)) + b'u'
    return b'](' + name(kind) + b'q\x00' + entries + b'q\x01' + line * 100 + b'e'


LAUGHS = b'(t' + b'q\x00h\x00\x86' * 60  # a tuple of itself twice, 60 deep, is hashed in 2^60 steps
PATH = text('trap')
CALLS = {  # of os.mkdir('trap')
    'reduce': name('os.mkdir') + several(PATH) + b'R',
    'inst': b'(' + PATH + b'ios\nmkdir\n',
    'obj': b'(' + name('os.mkdir') + PATH + b'o',
    'stack_global': text('os') + text('mkdir') + b'\x93' + several(PATH) + b'R',
    **{f'protocol {protocol}': pickle.dumps(Call(os.mkdir, 'trap'), protocol)[:-1] for protocol in range(6)},
}
HOSTILE = {
    **{name: (call, r'(os|posix)\.mkdir') for name, call in CALLS.items()},
    **{f'class by {opcode}': (name('subprocess.Popen') + opcode, r'subprocess\.Popen')
       for opcode in (b')\x81', b')}\x92', b')\x81}b', b'}b')},
    'call of a call': (
        name('builtins.getattr') + several(name('os.path'), text('system')) + b'R' + several(text('x')) + b'R',
        r'builtins\.getattr, os\.path'),
    'behind the pickle': (b'N' + b's.' + PROTO + name('os.system'), 'behind its pickle'),
    **{f'name of two lines {body}': (body, None) for body in (
        b'\x8c\x03a\nb\x8c\x01c\x93', b'\x8c\x03a\rb\x8c\x01c\x93', storage(key=text('a\nb')), b'cos\n\x1b[2J\n')},
    **{f'storage of {elements:.3g} elements': (storage(elements), None)
       for elements in (-1, 2, 0, 1 << 40, 1 << 62, 1 << 70)},
    'storage of many elements': (storage(1 << 5000), None),
    'size of many dimensions': (name('torch.Size') + b'](' + b'K\x01' * 2000 + b'e' + b'\x85R', '2000 dimensions'),
    # a Namespace whose __setstate__ is a storage's type reserves memory for its state
    'object with a method': (
        name('argparse.Namespace') + b')R' + under(name('torch.storage.UntypedStorage'), '__setstate__') + b'b'
        + number(1 << 30) + b'b', 'what an object does'),
    **{f'nested name {body}': (body % LAUGHS, None)
       for body in (b'}(%sNu', b'(%sNd', b'}%sNs', b'](%s\x91', b'\x8f(%s\x90')},
    'nested key of a storage': (storage(key=LAUGHS), None),
    'nested number of elements': (storage().replace(number(1), LAUGHS), None),
    **{f'state of {kind} set {times}': (set_many_times(kind, line), message)
       for kind in ('collections.OrderedDict', 'argparse.Namespace')
       for times, line, message in (('many times', b'h\x00)Rh\x01b', 'repeats'), (
           'in calls', b'h\x00h\x01\x85R', 'in one call'))},
}


@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_pickles_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    body, match = HOSTILE[kind]
    refused(write_zip(tmp_path / 'a.pth', under(body)), match)
    assert os.listdir() == ['a.pth']


@pytest.mark.parametrize('kind', CALLS)
def test_the_calls_would_be_made(tmp_path, monkeypatch, kind):
    """Otherwise their refusal would prove nothing."""
    monkeypatch.chdir(tmp_path)
    pickle.loads((b'' if kind.startswith('protocol') else b'\x80\x04') + CALLS[kind] + b'.')
    assert os.listdir() == ['trap']


@formats
@pytest.mark.parametrize('body', [
    b'J\x01\x02', b'h\x09', b'0', b'a', b's', b'R', b'e', b'\xff', b'(', b'Vabc', b'I12x\n', b'U\x02\xff\xff',
    name('torch.Size') + text('x') + b'\x85R', name('torch._utils._rebuild_parameter') + b')R', b'}]Ns', b'P0\n',
    name('argparse.Namespace') + several(b'N') + b'R', b'K\x01Q', b'\x82\x01', b'\x97', b')Q',
])
def test_malformed_pickles(tmp_path, new_format, body):
    readers = (checkpoint.load_file,)  # PyTorch's reader is stricter than the scan
    refused(write(tmp_path / 'a.pth', under(body), new_format), readers=readers)


@formats
@pytest.mark.parametrize('body', [
    *(code + struct.pack('<Q', length) for code in (b'\x8e', b'\x96') for length in (1 << 60, 1 << 31)),
    b'\x8d' + struct.pack('<Q', 1 << 60), b'X\xff\xff\xff\xff', b'B\xff\xff\xff\xff', b'\x8b\xff\xff\xff\x7f',
    b'\x8b\xff\xff\xff\xff', b'T\xff\xff\xff\x7f', b'\x95' + struct.pack('<Q', 1 << 31)])
def test_claimed_lengths_are_not_allocated(tmp_path, new_format, body):
    refused(write(tmp_path / 'a.pth', under(body), new_format))


@formats
@pytest.mark.parametrize('content, match', [
    ([Call(os.system, 'x'), Call(eval, '1'), Call(exec, '1')], r'builtin\w*\.eval, __builtin__\.exec, posix\.system'),
    ({'a': {1}, 'b': b'x'}, r'__builtin__\.set, _codecs\.encode'),  # each is a call in torch.save's protocol
    ({'metric': np.float64(3)}, r'numpy\S*\.scalar')])
def test_all_unsafe_globals_are_listed(tmp_path, new_format, content, match):
    torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=new_format)
    refused(tmp_path / 'a.pth', match)


LEGACY = {
    **{f'{elements:.3g} elements': (storage(elements, view=b'N'), None, None)
       for elements in (-1, 2, 40_000_000_000, 1 << 62, 1 << 70)},
    # PyTorch would leave their memory uninitialized
    **{f'keys {keys}': (tensor(storage(view=b'N')), keys, 'not those')
       for keys in (b']', b']' + text('1') + b'a', b'N', b']K\x01a')},
    'later pickle': (
        storage(40_000_000_000, view=b'N'), storage(0, view=b'N') + b'0' + b']' + text('0') + b'a', 'bytes of tensors'),
}


@pytest.mark.parametrize('kind', LEGACY)
def test_storages_of_a_legacy_file(tmp_path, kind):
    body, keys, match = LEGACY[kind]
    refused(write_legacy(tmp_path / 'a.pth', under(body), keys), match)


@formats
def test_one_storage_of_two_sizes(tmp_path, new_format):
    last = view_of(new_format)
    pair = several(storage(4, 'torch.ByteStorage', view=last), storage(0, view=last))
    refused(write(tmp_path / 'a.pth', under(pair), new_format), 'two sizes')


# --- memory ---


def test_memo_of_a_far_place(tmp_path):
    """C's unpickler would allocate 2^32 entries."""
    path = write_zip(tmp_path / 'a.pth', under(b'Nr\xff\xff\xff\xff'))
    with memory_below(MIB):
        assert checkpoint.load_file(path) == {'w': None}


@formats
@pytest.mark.parametrize('place', ['size', 'stride', 'offset', 'negative', 'overflow', 'repeated'])
def test_tensor_beyond_its_storage(tmp_path, new_format, place):
    """PyTorch would enlarge the storage, or show one element 4e10 times."""
    described = {
        'size': dict(size=(1 << 30,)), 'stride': dict(size=(2,), stride=(1 << 30,)), 'offset': dict(offset=1 << 30),
        'negative': dict(size=(-1,)), 'overflow': dict(size=(1 << 62, 4), stride=(0, 0)),
        'repeated': dict(size=(40_000_000_000,), stride=(0,)),
    }[place]
    of = storage(view=view_of(new_format))
    refused(write(tmp_path / 'a.pth', under(tensor(of, **described)), new_format), 'it has a tensor')


def test_a_repeated_element_is_refused_though_pytorch_loads_it(tmp_path):
    torch.save({'w': torch.ones(1).expand(40_000_000_000)}, tmp_path / 'a.pth')
    assert torch.load(tmp_path / 'a.pth')['w'].nbytes == 160_000_000_000
    refused(tmp_path / 'a.pth', r'shape \(40000000000,\) in 1 elements')


@formats
def test_tensor_is_not_changed_later(tmp_path, new_format):
    of = storage(view=view_of(new_format))
    for made in (tensor(of), name('torch._utils._rebuild_parameter') + several(tensor(of), b'\x88', b'N') + b'R'):
        state = several(of, number(0), several(number(1 << 30)), several(number(1)))
        refused(write(tmp_path / 'a.pth', under(made + state + b'b'), new_format), 'changes a tensor')


@pytest.mark.parametrize('kind', ['torch.UntypedStorage', 'torch.storage.UntypedStorage', 'torch.FloatStorage'])
@pytest.mark.parametrize('opcode', [b'R', b'\x81'])
def test_storages_are_not_made(tmp_path, kind, opcode):
    path = write_zip(tmp_path / 'a.pth', under(name(kind) + number(1 << 30) + b'\x85' + opcode))
    refused(path, 'of its own')
    if (kind, opcode) == ('torch.storage.UntypedStorage', b'R'):
        assert torch.load(path, weights_only=True)['w'].nbytes() == 1 << 30


@formats
@pytest.mark.parametrize('key', [b'G' + struct.pack('>d', float('nan')), number(0), several(text('0'))])
def test_storage_key_that_differs_from_itself(tmp_path, new_format, key):
    """NaN differs from NaN: PyTorch would read the record each time that the key occurs."""
    path = tmp_path / 'a.pth'
    body = under(several(*[storage(MIB, 'torch.ByteStorage', key, view_of(new_format))] * 20))
    if new_format:
        write_zip(path, body, [('data/nan', bytes(MIB)), ('data/0', bytes(MIB))])
    else:
        write_legacy(path, body, b']', bytes(2 * MIB))
    refused(path, 'without a type, a name or a size')


# --- depth ---


def test_deep_names_do_not_end_the_process(tmp_path):
    """In a process of its own, without PyTorch, as it may die."""
    (tmp_path / 'a.pkl').write_bytes(PROTO + b'})' + b'\x85' * 1_000_000 + b'Ns.')
    code = 'import runpy, sys; runpy.run_path(sys.argv[1])["scan_pickles"](open(sys.argv[2], "rb"), 2_000_000)'
    result = subprocess.run(
        [sys.executable, '-c', code, pickles.__file__, str(tmp_path / 'a.pkl')], capture_output=True, text=True)
    assert result.returncode == 1 and 'ValueError' in result.stderr and 'nested' in result.stderr


def test_deep_and_circular_lists_are_read(tmp_path):
    deep = checkpoint.load_file(write_zip(tmp_path / 'a.pth', under(b']' * 20_000 + b'a' * 19_999)))['w']
    depth = 1
    while deep:
        deep, depth = deep[0], depth + 1
    assert depth == 20_000
    circular = checkpoint.load_file(write_zip(tmp_path / 'a.pth', under(b']q\x00h\x00a')))['w']
    assert circular[0] is circular


# --- files that are cut off, and archives ---


@pytest.mark.parametrize('record', ['DATA.PKL', 'sub/data.pkl', '../other/data.pkl'])
def test_second_pickle_in_an_archive(tmp_path, record):
    refused(write_zip(tmp_path / 'a.pth', under(b'N'), [(record, PROTO + name('os.system') + b'.')]))


def test_every_truncation_of_a_legacy_file(tmp_path):
    torch.save({'w': torch.ones(2), 'n': 70000, 'f': 1.5}, tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    content = (tmp_path / 'a.pth').read_bytes()
    for end in range(1, len(content)):
        (tmp_path / 'b.pth').write_bytes(content[:end])
        with pytest.raises(ValueError) as error:
            checkpoint.check_file(tmp_path / 'b.pth')
        assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(('record', 'content'), [
    ('byteorder', 'middle'), ('byteorder', b'\xff'), ('.storage_alignment', 'x'), ('.storage_alignment', ''),
])
def test_malformed_records(tmp_path, record, content):
    path = write_zip(tmp_path / 'a.pth', under(b'N'), [(record, content)])
    refused(path, readers=(checkpoint.load_file,))


def test_compressed(tmp_path):
    path = write_zip(tmp_path / 'a.pth', under(b'N'), [('data/0', bytes(64 * MIB))], compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < MIB
    refused(path, 'is compressed')


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize('names', [('data/0', 'data/0'), ('data/a', 'data/A'), ('data/0', 'data/0\0x')])
def test_one_name_twice(tmp_path, names):
    refused(write_zip(tmp_path / 'a.pth', under(b'N'), [(record, bytes(4)) for record in names]))


@pytest.mark.parametrize('place, value, match', [
    (8, b'\x01', 'encrypted'), *((place, b'\xfe\xff\xff\x7f', None) for place in (20, 24, 42))])
def test_damaged_directories(tmp_path, place, value, match):
    """The flags of a record, its two sizes, and its place."""
    path = write_zip(tmp_path / 'a.pth', under(b'N'))
    content = bytearray(path.read_bytes())
    start = content.index(b'PK\x01\x02') + place
    content[start:start + len(value)] = value
    path.write_bytes(content)
    refused(path, match)


def test_something_behind_the_end(tmp_path):
    path = write_zip(tmp_path / 'a.pth', under(b'N'))
    path.write_bytes(path.read_bytes() + bytes(30))
    refused(path)


def test_parts_of_two_archives(tmp_path):
    path = tmp_path / 'a.pth'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('other/version', '3\n')
        archive.writestr('archive/data.pkl', PROTO + under(b'N') + b'.')
    refused(path, 'more than one archive')


def end_of(path):
    content = path.read_bytes()
    return content, content.rindex(b'PK\x05\x06')


def test_two_directories(tmp_path):
    """Python takes the one before the end, PyTorch the one that the end points to."""
    path = write_zip(tmp_path / 'a.pth', under(text('good')))
    content, end = end_of(path)
    good = content[:end]
    evil, evil_end = end_of(write_zip(tmp_path / 'b.pth', under(text('evil'))))
    start = int.from_bytes(evil[evil_end + 16:evil_end + 20], 'little')
    assert len(evil) == len(content)
    both = evil[:evil_end] + good + evil[evil_end:]
    path.write_bytes(both)
    with zipfile.ZipFile(path) as archive:
        assert b'good' in archive.read('archive/data.pkl')
    assert torch.load(path) == {'w': 'evil'} and start < evil_end
    refused(path, 'two directories')


def test_two_ends(tmp_path):
    """The same with the 64-bit end that PyTorch writes."""
    torch.save({'w': 'good'}, tmp_path / 'a.pth')
    content = bytearray((tmp_path / 'a.pth').read_bytes())
    assert content[-42:-38] == b'PK\x06\x07'
    content[-34:-26] = (8).to_bytes(8, 'little')
    (tmp_path / 'a.pth').write_bytes(content)
    refused(tmp_path / 'a.pth', 'two ends')


def test_tar_that_starts_like_a_pickle(tmp_path):
    """PyTorch looks for the oldest format first, by reading as much as its header says."""
    header = bytearray(512)
    header[:15] = pickle.dumps(MAGIC, 2)
    header[124:136], header[148:156], header[156:157] = b'77777777777\0', b' ' * 8, b'x'
    header[148:156] = b'%06o\0 ' % sum(header)
    (tmp_path / 'a.pth').write_bytes(header)
    refused(tmp_path / 'a.pth', 'expected a checkpoint')


# --- safetensors ---


def safe(path, header, data=bytes(8), length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(header) if length is None else length) + header + data)
    return path


def entry(shape=(2,), offsets=(0, 8), dtype='F32'):
    return {'dtype': dtype, 'shape': list(shape), 'data_offsets': list(offsets)}


SAFE = {
    'long_header': lambda path: safe(path, b'{}', length=1 << 62),
    'longest_header': lambda path: safe(path, b'{}', length=(1 << 64) - 1),
    'header_beyond': lambda path: safe(path, b'{}', b'', length=99_000_000),
    'huge_shape': lambda path: safe(path, {'a': entry((1 << 62,))}),
    'overflowing_shape': lambda path: safe(path, {'a': entry((1 << 62, 8))}),
    'negative_shape': lambda path: safe(path, {'a': entry((-2,))}),
    'overlap': lambda path: safe(path, {'a': entry(), 'b': entry()}),
    'overlap_partly': lambda path: safe(path, {'a': entry(), 'b': entry(offsets=(4, 12))}, bytes(12)),
    'gap': lambda path: safe(path, {'a': entry(), 'b': entry(offsets=(12, 20))}, bytes(20)),
    'beyond': lambda path: safe(path, {'a': entry(offsets=(8, 16))}),
    'far_beyond': lambda path: safe(path, {'a': entry(offsets=(1 << 62, (1 << 62) + 8))}),
    'reversed': lambda path: safe(path, {'a': entry(offsets=(8, 0))}),
    'rest': lambda path: safe(path, {'a': entry()}, bytes(9)),
    'dtype': lambda path: safe(path, {'a': entry(dtype='F99')}),
    'metadata': lambda path: safe(path, {'__metadata__': {'a': 1}, 'a': entry()}),
    'nested_metadata': lambda path: safe(path, {'__metadata__': {'a': {'b': 'c'}}, 'a': entry()}),
    'utf8': lambda path: safe(path, b'{"\xff\xfe": 1}'),
    'deep': lambda path: safe(path, b'{"a":' + b'[' * 100_000),
    'list': lambda path: safe(path, b'[]'),
    'pickle': lambda path: torch.save({'a': torch.ones(2)}, path),
    'short': lambda path: path.write_bytes(b'12345'),
    'duplicate': lambda path: safe(path, b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
}


@pytest.mark.parametrize('kind', SAFE)
def test_malformed_safetensors(tmp_path, kind):
    path = tmp_path / 'a.safetensors'
    SAFE[kind](path)
    refused(path, 'is there twice' if kind == 'duplicate' else 'not a whole safetensors file')
    if kind == 'duplicate':
        assert set(load_file(path)) == {'a'}  # one of the two, unspecified


def test_large_header_of_safetensors(tmp_path):
    """The format's limit is 100 MB; a larger header is refused before it is read."""
    path = safe(tmp_path / 'a.safetensors', b'{}')
    with open(path, 'r+b') as file:
        file.write(struct.pack('<Q', 100_000_001))
        file.truncate(100_000_100)
    with memory_below(MIB), pytest.raises(ValueError, match='not a whole'):
        checkpoint.check_file(path)


def test_every_dtype_of_safetensors_is_read_or_refused(tmp_path):
    sizes = dict(F64=8, I64=8, U64=8, C64=8, F32=4, F16=2, BF16=2, I8=1, U8=1, BOOL=1, F8_E4M3=1, F8_E5M2=1, F8_E8M0=1)
    for dtype, size in sizes.items():
        path = safe(tmp_path / 'a.safetensors', {'a': entry((8 // size,), dtype=dtype)})
        assert checkpoint.load_file(path)['a'].nbytes == 8
    for dtype in ('F4', 'F6_E2M3', 'F6_E3M2'):
        try:
            checkpoint.load_file(safe(tmp_path / 'a.safetensors', {'a': entry((16,), dtype=dtype)}))
        except ValueError as error:
            assert str(tmp_path) in str(error)


# --- contents ---


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf'), complex(0, float('nan'))])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_that_are_not_finite(value, dtype):
    dtype = torch.complex64 if isinstance(value, complex) else dtype
    weights = torch.ones(5, dtype=dtype)
    checkpoint.check_finite({'a': weights, 'b': torch.ones(2, dtype=torch.int64), 'c': torch.tensor(True)})
    weights[3] = value
    with pytest.raises(ValueError, match='not finite: a'):
        checkpoint.check_finite({'a': weights})


@pytest.mark.parametrize('content, message', [
    ([torch.ones(1)], 'a checkpoint to be a dict, got list'), (None, 'got NoneType'), (torch.ones(1), 'got Tensor'),
    ({'epoch': 3, 'args': None}, r"found the keys \['args', 'epoch'\]"), ({}, ''), ({'state_dict': {}}, ''),
    ({0: torch.ones(1)}, ''), ({'state_dict': None, 'model': {'a': torch.ones(1)}}, ''),
    ({'state_dict': {'a': torch.ones(1)}, 'state_dict_ema': 1}, 'state_dict_ema to be a dictionary of tensors by name'),
    ({'state_dict': {'a': torch.ones(1), 1: torch.ones(1)}}, 'state_dict to be a dictionary of tensors by name')])
def test_no_weights(tmp_path, content, message):
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=f'^expected [^\n]*{message}[^\n]*$'):
        checkpoint.select_state_dict(checkpoint.load_file(tmp_path / 'a.pth'))


@pytest.mark.parametrize('message, line', [
    ('', 'ValueError'), ('a\nb', 'a'), ('\x1b[31m', r'\x1b[31m'), ('\ud800', r'\ud800'), ('a' * 5000, 'a' * 2000)])
def test_messages_of_other_libraries_are_one_printable_line(message, line):
    assert first_line(ValueError(message)) == line


# --- what must be read ---


def same(given, expected):
    assert type(given) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert given.dtype == expected.dtype and given.stride() == expected.stride()
        assert given.requires_grad == expected.requires_grad and torch.equal(given, expected)
    elif isinstance(expected, dict):
        assert list(given) == list(expected)
        for key in expected:
            same(given[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(given) == len(expected)
        for pair in zip(given, expected):
            same(*pair)
    elif isinstance(expected, argparse.Namespace):
        same(vars(given), vars(expected))
    else:
        assert given == expected


def contents():
    base = torch.arange(24.).reshape(4, 6)
    dtypes = (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16,
        torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {
        'dtypes': {str(dtype): torch.tensor([0, 1, 2, 3]).to(dtype) for dtype in dtypes},
        'views': {'whole': base, 'row': base[1], 'column': base[:, 2], 't': base.t(), 'part': base[1:3, 2:4]},
        'steps': {'even': base[::2, ::3], 'permuted': torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)},
        'small': {'empty': torch.empty(0), 'empty2': torch.empty(0, 3), 'scalar': torch.tensor(1.5), 'tail': base[4:]},
        'parameters': OrderedDict(a=torch.nn.Parameter(torch.ones(2)), b=torch.nn.Parameter(base, False)),
        'grad': torch.ones(2, requires_grad=True),
        'conj': torch.tensor([1 + 2j]).conj(),
        'model': model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'saver': {
            'epoch': 3, 'arch': 'x', 'state_dict': model.state_dict(), 'version': 2, 'metric': 81.2,
            'args': argparse.Namespace(lr=.1, mean=None, decay=[1, (2, 3)], nested=argparse.Namespace(a='b')),
            'amp_scaler': {'scale': 65536., '_growth_tracker': 0}},
        'plain': {
            'none': None, 'tuples': ((), (1,), (1, 2, (3, 4, 5, 6))), 'lists': [[], [[1], []]], 1: True, (1, 'a'): 1,
            'large': 1 << 200, 'negative': -5, 'text': 'ü\n' * 300, 'inf': float('inf'), 'size': torch.Size((2, 3))},
        'list': [1, 2], 'tensor': base, 'empty': {}, 'many': {str(i): torch.full((2,), float(i)) for i in range(300)},
    }


@pytest.mark.parametrize('variant', ['zip', 'lazy', 'legacy'])
@pytest.mark.parametrize('kind', contents())
def test_what_is_saved_is_read(tmp_path, kind, variant):
    torch.manual_seed(0)
    content = contents()[kind]
    path = tmp_path / 'a.pth'
    torch.save(content, path, _use_new_zipfile_serialization=variant != 'legacy')
    checkpoint.check_file(path)
    given = checkpoint.load_file(path, lazy=variant == 'lazy')
    same(given, content)
    if kind == 'views':
        assert len({value.untyped_storage().data_ptr() for value in given.values()}) == 1
    if kind == 'model':
        assert given._metadata == content._metadata


def test_safetensors_are_read(tmp_path):
    weights = {**contents()['dtypes'], **contents()['small'], 'ü': torch.ones(2, 3)}
    del weights['torch.complex128'], weights['tail']
    save_file(weights, tmp_path / 'a.safetensors', metadata={'format': 'pt'})
    for lazy in (False, True):
        given = checkpoint.load_file(tmp_path / 'a.safetensors', lazy)
        assert given.keys() == weights.keys()
        for key in weights:
            same(given[key], weights[key])


def test_a_data_type_is_named_and_not_called(tmp_path):
    """Checkpoints of optimizers name data types among their options."""
    path = tmp_path / 'file'
    torch.save({'momentum_dtype': torch.bfloat16}, path)
    assert checkpoint.load_file(path) == {'momentum_dtype': torch.bfloat16}
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in contents.items():
            called = b'\x80\x02ctorch\nbfloat16\n)R.'
            archive.writestr(name, called if name.endswith('data.pkl') else content)
    with pytest.raises(ValueError, match=r'it makes a torch\.bfloat16 of its own'):
        checkpoint.check_file(path)
