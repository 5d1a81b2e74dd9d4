"""Give damaged and hostile files to every reader of files from outside, and print a summary as JSON.

    python tests/checkpoint/fuzz.py --seed 0 --count 2000

Each case changes bytes or values of a whole file and gives the file to two of the readers of its kind. A reader may
accept a file, raise ValueError, or exit with code 2. The summary counts these outcomes by kind and reader. It lists the
cases with another exception, with a message or log line that is not one short printable line, with too many log lines,
with more memory or time than expected, or with an event that an audit hook must not see: a connection, a program that
is started, or a file outside the folder of the case that is changed or opened.
"""
import os

os.environ.update(HF_ENDPOINT='http://127.0.0.1:9', HF_HUB_OFFLINE='0')  # a download must be attempted to be seen

import argparse
import contextlib
import io
import json
import logging
import random
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = True  # a module that is imported late writes nothing

import train  # noqa: E402
import validate  # noqa: E402
from smpconv_models import checkpoint, hub  # noqa: E402
from smpconv_models.figures import __main__ as figures  # noqa: E402
from smpconv_models.figures import _inputs  # noqa: E402
from smpconv_models.training import build, config, folder, options, set_up  # noqa: E402
from smpconv_models.training import run as running  # noqa: E402
from smpconv_models.training.validate import inherit, measure, series  # noqa: E402

TINY = dict(depths=[1], dims=[4], kernel_sizes=[7], num_classes=10, in_chans=1)
SMALL = dict(depths=[1, 1], dims=[6, 12], num_points=8, kernel_size=9)
MEMORY = 64 << 20  # bytes beside twice the file: arenas of Python and PyTorch
ADDRESSES = 4 << 30  # bytes of address space beside those that the imports take
SECONDS = 30
LENGTH = 3000  # characters of a message
LINES = 20  # of logs and messages, for each reader


def nested(depth):
    return [nested(depth - 1)] if depth else []


HOSTILE = ['\x1b[31m', 'a\0b', 'two\nlines', '\u202ea', '\ud800', 'a' * 5000, '', '__class__', 'args.x', 'module.', '%s {}']
TENSORS = [
    torch.ones(2), torch.ones(()), torch.ones(4, dtype=torch.complex64), torch.ones(4).to_sparse(), torch.ones(3, 0),
    torch.full((4,), float('nan')), torch.tensor(-5.), torch.tensor(float('inf')), torch.tensor(True),
    torch.ones(1).expand(1 << 20), torch.ones(4, dtype=torch.float8_e5m2), torch.ones(2, 2).to_sparse_csr()]
VALUES = [
    None, True, False, -1, -5, 0, 1, 1 << 20, 10 ** 8, 10 ** 30, -10 ** 400, 1e-9, 1e38, float('nan'), float('inf'), 1j,
    'x', 'hf-hub:evil/x', 'local-dir:/etc', 'wds/x', 'hfds/evil/x', 'pipe:touch trap; echo ://', '/etc', '/etc/passwd',
    '../../..', 'https://127.0.0.1:9/x', 'resnet18', 'smpconv_b', 'smpconv_speech', 'digits', [], {}, (), [1], [[1]],
    [0.5] * 3, [10 ** 6] * 4, {'a': 1}, {'pretrained': True}, [None], b'x', nested(150), argparse.Namespace(x=1),
    {1: 2, 'a': 3}, torch.float16, *HOSTILE, *TENSORS]
KEYS = ['pretrained', 'file', 'url', 'x', 'dims', 'img_size', 'step', 'hf_hub_id', 'state_dict_ema', 0, None, (1, 'a'), *HOSTILE]
TOKENS = [  # of YAML and of JSON
    b'!!bool x', b'!!timestamp x', b'!!int x', b'!!float x', b'!!binary x', b'!!set x', b'!!omap x', b'!!pairs x',
    b'!!python/object/apply:os.system ["touch trap"]', b'!!python/name:os.system', b'&a [*a]', b'*a', b'{<<: x}', b'? x',
    b'[' * 5000, b'{"a":' * 5000, b'- ' * 3000, b'9' * 6000, b'"a\\0b"', b'"\\e[31m"', b'"\\ud800"', b'"a\\nb"', b'NaN',
    b'Infinity', b'1e999', b'2001-99-99', b'0:0:61', b'.inf', b'null', b'[1]', b'{}', b'true', b'"' + b'a' * 5000 + b'"',
    b'\x1b[31m', b'\xff\xfe', b'\xef\xbb\xbf', b'\0', b'---', b'%YAML 9.9', b'"local-dir:/etc"', b'"hf-hub:evil/x"', b'-5']


# --- what is seen of a case ---

REACHING = (
    'socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.gethostbyaddr', 'socket.sendto',
    'socket.sendmsg', 'socket.bind', 'subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.fork',
    'os.forkpty', 'pty.spawn', 'webbrowser.open', 'urllib.Request')
READING = ('os.listdir', 'os.scandir', 'os.chdir')
CHANGING = (
    'os.mkdir', 'os.remove', 'os.rmdir', 'os.rename', 'os.symlink', 'os.link', 'os.chmod', 'os.chown', 'os.truncate',
    'os.utime')
_seen = None  # (event, path, whether it changes a file) while a reader is watched


def watch(event, arguments):
    """Note connections, programs and paths, also those of code that is imported later."""
    if _seen is None:
        return
    if event in REACHING:
        _seen.append((f'{event} {arguments!r:.200}', None, True))
    elif event == 'open' or event in READING or event in CHANGING:
        changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if event == 'open' else event in CHANGING
        for path in arguments[:2 if event in ('os.rename', 'os.symlink', 'os.link') else 1]:
            if isinstance(path, (str, bytes)):
                _seen.append((event, os.path.realpath(os.fsdecode(path)), changes))


def foreign(seen, home, readable):
    """Return the events that no reader may cause."""
    def within(path, root):
        return path == root or path.startswith(root + os.sep)
    return [f'{event} {path or ""}' for event, path, changes in seen if path is None or not (
        within(path, home) or path == os.devnull or not changes and any(within(path, root) for root in readable))]


class Lines(logging.Handler):
    """Collect the lines of the log."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


class TimeLimitError(BaseException):
    """Raised where a reader takes too long; no reader catches it."""


def expire(number, frame):
    raise TimeLimitError


def peak(reset=False):
    """Return the highest resident memory since the last reset, in bytes; None where Linux does not measure it."""
    try:
        if reset:
            Path('/proc/self/clear_refs').write_text('5')
        lines = Path('/proc/self/status').read_text().splitlines()
    except OSError:
        return None
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))


def observe(reader, path, log):
    """Return 'accepted', 'refused' or an exception's name, and the problems as texts."""
    problems, said = [], io.StringIO()
    outcome = 'accepted'
    log.lines.clear()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            reader(path)
    except ValueError as error:
        outcome = 'refused'
        log.lines.append(str(error))
    except SystemExit as end:
        outcome = 'refused' if end.code == 2 else f'exit {end.code}'
    except BaseException as error:  # noqa: BLE001 (any other exception is a finding)
        outcome = type(error).__name__
        problems.append(traceback.format_exc()[-1500:])
    finally:
        signal.alarm(0)
    lines = log.lines + said.getvalue().removesuffix('\n').splitlines()
    problems += [f'not one printable line: {line!r:.1000}' for line in lines if not line.isprintable()]
    problems += [f'{len(line)} characters: {line!r:.300}' for line in lines if len(line) > LENGTH]
    problems += [f'memory was asked for: {line!r:.1000}' for line in lines if 'allocate' in line]
    if len(lines) > LINES:
        problems.append(f'{len(lines)} lines')
    return outcome, problems


# --- changes ---

def copied(value):
    """Return a copy of the containers, with the same tensors."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def change_value(value, draw):
    """Return a copy with one value, key or entry changed."""
    node = value = copied(value)
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return value
        key = draw.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.8:
            node = node[key]
            continue
        action = draw.random()
        if action < 0.1:
            del node[key]
        elif action < 0.2 and isinstance(node, dict):
            node[draw.choice(KEYS)] = draw.choice(VALUES)
        elif action < 0.3 and isinstance(node, dict):
            node[draw.choice(KEYS)] = node.pop(key)
        elif isinstance(node[key], torch.Tensor) and action < 0.7:
            node[key] = change_tensor(node[key], draw)
        else:
            node[key] = draw.choice(VALUES)
        return value


def change_tensor(tensor, draw):
    """Return a tensor of another type, shape, layout or value."""
    return draw.choice([
        torch.Tensor.double, torch.Tensor.half, torch.Tensor.bool, torch.Tensor.cfloat, torch.Tensor.flatten,
        torch.Tensor.to_sparse, lambda own: own[None], lambda own: own.flatten()[:0], lambda own: own.float() * torch.nan,
        lambda own: own.float() - torch.inf, lambda own: own.float() - 5, torch.Tensor.squeeze])(tensor)


def change_state(state, draw):
    """Return a checkpoint with one or two changes, sometimes in the form of another trainer."""
    for _ in range(draw.choice([1, 1, 2])):
        state = change_value(state, draw)
    if isinstance(state.get('args'), dict) and draw.random() < 0.2 and all(isinstance(key, str) for key in state['args']):
        state['args'] = argparse.Namespace(**state['args'])
    if isinstance(state.get('state_dict'), dict) and draw.random() < 0.3:
        prefix = draw.choice(['module.', '_orig_mod.', 'module._orig_mod.', 'model.'])
        state[draw.choice(['state_dict', 'state_dict_ema', 'model_ema'])] = {
            f'{prefix}{key}': item for key, item in state['state_dict'].items()}
    return state


def change_bytes(content, draw):
    """Return a copy with some bytes changed, left out, repeated or cut off."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        start = draw.randrange(len(content) + 1)
        stop = min(start + draw.choice([1, 1, 4, 8, 64]), len(content))
        action = draw.randrange(4 if draw.random() < 0.9 else 5)
        if action == 0:
            content[start:stop] = bytes(draw.randrange(256) for _ in range(stop - start))
        elif action == 1:
            content[start:stop] = b'\xff' * (stop - start)
        elif action == 2:
            del content[start:stop]
        elif action == 3:
            content[start:start] = content[start:stop]
        else:
            del content[start:]
    return bytes(content)


def change_text(content, draw):
    """Return JSON or YAML with another token as a line's value, as a line or as everything; or with other bytes."""
    action, token = draw.random(), draw.choice(TOKENS)
    if action < 0.3:
        return change_bytes(content, draw)
    if action < 0.4:
        return token
    lines = content.split(b'\n')
    index = draw.randrange(len(lines))
    key, colon, value = lines[index].partition(b': ')
    comma = b',' if value.endswith(b',') else b''
    lines[index] = key + colon + token + comma if colon and action < 0.9 else token
    return b'\n'.join(lines)


def plain(value):
    """Return what JSON and YAML can represent of a value."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


# --- files and their readers ---

def parse(program, *argv):
    return program.create_parser().parse_args([str(argument) for argument in argv])


class Cases:
    """Whole files, their changes and their readers.

    Args:
        home: Empty folder.

    Attributes:
        kinds: Function that writes a file, by kind: whole for None, else changed by a generator.
    """

    def __init__(self, home):
        self.home = home
        for index in range(10):
            path = home / f'images/val/{index}/0.png'
            path.parent.mkdir(parents=True)
            Image.new('L', (8, 8), 20 * index).save(path)
        self.run = set_up(parse(
            train, '--model', 'smpconv_nano', '--dataset', 'digits', '--model-kwargs', 'depths=[1]', 'dims=[4]',
            'kernel_sizes=[7]', '--in-chans', 1, '--img-size', 32, '--mean', 0.3, '--std', 0.4, '--workers', 0, '--device',
            'cpu', '--model-ema', '--epochs', 3, '--warmup-epochs', 0, '--output', home, '--experiment', 'run'))
        for parameter in list(self.run.model.parameters())[:3]:  # which keeps cases small
            parameter.grad = torch.zeros_like(parameter)
        self.run.stepper.optimizer.step()
        self.optimizer = self.run.stepper.optimizer.state_dict()
        self.run.progress.next_epoch(dict(epoch=0, train_loss=1., eval_loss=1., eval_top1=50., eval_top5=100., lr=1e-3))
        self.state = copied(self.run.state())
        del self.state['state_dict_ema']  # change_state adds one
        self.run.close()
        data = load_file(ROOT / 'tests/data/cifar_tiny.safetensors')
        self.release = {'epoch': 3, 'args': {'model': 'smpconv_cifar', 'model_kwargs': SMALL, 'num_classes': 10}, 'model': {
            key.removeprefix('state_dict.'): value for key, value in data.items() if key.startswith('state_dict.')}}
        torch.save(self.state, home / 'whole.zip')
        torch.save(self.state, home / 'whole.legacy', _use_new_zipfile_serialization=False)
        save_file(self.state['state_dict'], home / 'whole.safetensors')
        hub.convert(home / 'whole.zip', home / 'hub')
        self.config = (home / 'hub/config.json').read_bytes()
        self.recipes = [path.read_bytes() for path in sorted((ROOT / 'recipes').glob('[!a]*.yaml'))]
        self.networks = {
            name: timm.create_model(name, **kwargs) for name, kwargs in (('smpconv_nano', TINY), ('smpconv_cifar', SMALL))}
        self.kinds = {
            'zip': lambda draw: self.write_bytes('zip', 'case.pth', draw),
            'legacy': lambda draw: self.write_bytes('legacy', 'case.pth', draw),
            'safetensors': lambda draw: self.write_bytes('safetensors', 'case.safetensors', draw),
            'values': lambda draw: self.write_values(self.state, draw),
            'legacy values': lambda draw: self.write_values(self.state, draw, False),
            'release values': lambda draw: self.write_values(self.release, draw),
            'run': self.write_run,
            'holder': self.write_holder,
            'config': lambda draw: self.write_config(draw, False),
            'config bytes': lambda draw: self.write_config(draw, True),
            'yaml': lambda draw: self.write_recipe(draw, False),
            'yaml bytes': lambda draw: self.write_recipe(draw, True),
        }

    def write_bytes(self, kind, name, draw):
        content = (self.home / f'whole.{kind}').read_bytes()
        path = self.home / name
        path.write_bytes(change_bytes(content, draw) if draw else content)
        return path

    def write_values(self, state, draw, is_zip=True):
        path = self.home / 'case.pth'
        torch.save(change_state(state, draw) if draw else state, path, _use_new_zipfile_serialization=is_zip)
        return path

    def write_run(self, draw):
        """Write a run's last and previous checkpoint, of which one is whole or both are changed."""
        path = self.home / 'case'
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name in ('last.pth.tar', 'previous.pth.tar'):
            is_changed = draw and draw.random() < 0.7
            torch.save(change_state(self.state, draw) if is_changed else self.state, path / name)
            if is_changed and draw.random() < 0.2:
                (path / name).write_bytes(change_bytes((path / name).read_bytes(), draw))
        return path

    def write_holder(self, draw):
        path = self.home / 'case/.run.json'
        path.parent.mkdir(exist_ok=True)
        content = json.dumps({'host': 'a', 'pid': 1, 'since': '2020-01-01'}, indent=1).encode()
        path.write_bytes(change_text(content, draw) if draw else content)
        return path

    def write_config(self, draw, is_text):
        path = self.home / 'hub/config.json'
        content = self.config
        if draw and is_text:
            content = change_text(content, draw)
        elif draw:
            content = json.dumps(plain(change_value(json.loads(content), draw))).encode()
        path.write_bytes(content)
        return path

    def write_recipe(self, draw, is_text):
        path = self.home / 'args.yaml'
        content = draw.choice(self.recipes) if draw else self.recipes[0]
        if draw and is_text:
            content = change_text(content, draw)
        elif draw:
            content = yaml.safe_dump(plain(change_value(yaml.safe_load(content), draw))).encode()
        path.write_bytes(content)
        return path

    def readers(self, kind):
        """Return the functions that read files of a kind, by name."""
        if kind in ('yaml', 'yaml bytes'):
            return {'options': self.read_options}
        if kind in ('config', 'config bytes'):
            return {'load': lambda path: hub.load(path.parent)}
        if kind == 'holder':
            return {'folder': self.read_holder}
        if kind == 'run':
            return {'resume': self.resume_folder}
        name, kwargs = ('smpconv_cifar', SMALL) if kind == 'release values' else ('smpconv_nano', TINY)
        named = ['--model', name, '--model-kwargs', *(f'{key}={value}'.replace(' ', '') for key, value in kwargs.items())]
        argv = named if kind == 'safetensors' else []  # a file without a description
        readers = {
            'inherit': self.inherit,
            'evaluate': lambda path: measure(*series(parse(
                validate, '--checkpoint', path, '--data-dir', self.home / 'images', '--img-size', 32, '--batch-size', 5,
                '--workers', 0, '--device', 'cpu', *argv))),
            'figures': lambda path: _inputs.networks(parse(
                figures, 'kernels', '--checkpoint', path, '--output', self.home / 'kernels.png', *argv)),
            'initial': lambda path: build.load_weights(self.networks[name], checkpoint.read_file(path), str(path)),
            'pretrained': lambda path: timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs),
        }
        if kind != 'safetensors':
            readers['convert'] = self.convert
        if kind not in ('safetensors', 'release values'):
            readers['resume'] = self.resume_file
        return readers

    def inherit(self, path):
        """Read what an evaluation takes over from a checkpoint of images that the user does not name."""
        args, = series(parse(validate, '--checkpoint', path))
        described = checkpoint.describe(checkpoint.read_file(path), path)
        list(map(described.__getattribute__, ('classes', 'epoch', 'seed', 'model', 'model_kwargs')))
        inherit(args, described)

    def convert(self, path):
        shutil.rmtree(self.home / 'converted', ignore_errors=True)
        hub.convert(path, self.home / 'converted', card='{source} {classes}')

    def resume_file(self, path):
        shutil.rmtree(self.home / 'resumed', ignore_errors=True)
        self.resume(self.home / 'resumed', str(path))

    def resume_folder(self, path):
        self.resume(path)

    def resume(self, path, file=None):
        """Resume the one run in a folder, from its checkpoints or from a file, as train.py does."""
        self.run.folder, self.run.args.resume = folder.RunFolder(path), file
        self.run.stepper.optimizer.load_state_dict(self.optimizer)
        running._take_folder(self.run, {})
        self.run.close()

    def read_holder(self, path):
        """Read the name of a run in a folder, as a second run does, and release the folder of another run."""
        held, content = folder.RunFolder(path.parent), path.read_bytes()
        if not held._described().isprintable():
            raise RuntimeError(held._described())
        held.hold()
        path.write_bytes(content)
        held.release()

    def read_options(self, path):
        parser = train.create_parser()
        args = config.parse_args(parser, ['--config', str(path)])
        list(map(logging.warning, options.without_effect(parser, args)))


def main():
    global _seen
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--count', type=int, default=2000)
    args = parser.parse_args()
    log = Lines()
    logging.basicConfig(level=logging.INFO, handlers=[log])
    signal.signal(signal.SIGALRM, expire)
    draw = random.Random(args.seed)
    outcomes, seconds, bad = Counter(), Counter(), []
    with tempfile.TemporaryDirectory() as home:
        home = Path(home).resolve()
        os.chdir(home)  # relative paths of files are seen, too
        cases = Cases(home)
        for kind, write in cases.kinds.items():  # everything is imported before the first event counts
            for name, reader in cases.readers(kind).items():
                outcome, problems = observe(reader, write(None), log)
                if (outcome, problems) != ('accepted', []): print((kind, name, outcome, problems, log.lines), file=sys.stderr)
        readable = {os.path.realpath(path) for path in (
            sys.prefix, sys.base_prefix, ROOT, sysconfig.get_path('stdlib'), f'/proc/{os.getpid()}')}
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, resource.RLIM_INFINITY))
        sys.addaudithook(watch)
        for number in range(args.count):
            kind = list(cases.kinds)[number % len(cases.kinds)]
            start = time.perf_counter()
            path = cases.kinds[kind](draw)
            size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
            readers = cases.readers(kind)
            for name in draw.sample(sorted(readers), min(2, len(readers))):
                before, _seen = peak(reset=True), []
                outcome, problems = observe(readers[name], path, log)
                seen, _seen = _seen, None
                grown = 0 if before is None else peak() - before - 2 * size
                problems += foreign(seen, str(home), readable)[:5]
                problems += [f'{grown >> 20} MiB'] * (grown > MEMORY) + ['trap'] * (home / 'trap').exists()
                outcomes[f'{kind}, {name}: {outcome}'] += 1
                if problems:
                    bad.append(dict(number=number, kind=kind, reader=name, problems=problems))
            seconds[kind] += time.perf_counter() - start
    rounded = {kind: round(value, 1) for kind, value in seconds.items()}
    print(json.dumps(dict(outcomes=dict(sorted(outcomes.items())), seconds=rounded, bad=bad), indent=1))
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
