"""Give damaged and hostile files to the readers of files from outside, and print a summary as JSON.

    python tests/checkpoint/fuzz.py --seed 0 --count 2000

Each case changes bytes or values of a whole file and gives the file to one of the readers of its kind. A reader may
accept the file, raise ValueError, or exit with code 2. The summary counts these outcomes by kind, and lists the cases
with another exception, with a message or a line of the log that is long or not printable, with many lines, with more
memory or time than expected, or with an event that an audit hook must not see: a connection, a program that is started,
or a path outside the folder of the cases.
"""
import argparse
import contextlib
import io
import json
import logging.handlers
import os
import random
import resource
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.update(HF_ENDPOINT='http://127.0.0.1:9', HF_HUB_OFFLINE='0')  # a download is attempted, and seen

import timm
import torch
import yaml
from changes import change_bytes, change_state, change_text, change_value, copied, plain
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = True  # an import in a case writes nothing

import train  # noqa: E402
import validate  # noqa: E402
from smpconv_models import checkpoint, hub  # noqa: E402
from smpconv_models.figures import __main__ as figures  # noqa: E402
from smpconv_models.prediction.inputs import ModelSource  # noqa: E402
from smpconv_models.training import (  # noqa: E402
    DataOptions,
    DeviceOptions,
    EvalOptions,
    ModelOptions,
    TrainOptions,
    build_trainer,
    cli,
    evaluate_model,
    expand_model_list,
    factory,
    ineffective_options,
)
from smpconv_models.training.checkpointing import RunDir  # noqa: E402
from smpconv_models.training.validate import fill_from_checkpoint  # noqa: E402

TINY = dict(depths=[1], dims=[4], kernel_sizes=[7], num_classes=10, in_chans=1)
SMALL = dict(depths=[1, 1], dims=[6, 12], num_points=8, kernel_size=9)  # of tests/golden/cifar_tiny.safetensors
RUN = ('last.pth.tar', 'previous.pth.tar')
KINDS = (
    'zip', 'legacy', 'safetensors', 'values', 'legacy values', 'release values', 'run', 'holder', 'config',
    'config bytes', 'yaml', 'yaml bytes')
MEMORY = 64 << 20  # bytes beside twice the file: arenas of Python and PyTorch
ADDRESSES = 4 << 30  # bytes of address space beside those of the imports
SECONDS, LENGTH, LINES = 30, 3000, 20  # of a case, of a line, of all lines

# --- what is seen of a case ---

REACHING = (
    'socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.gethostbyaddr', 'socket.sendto',
    'socket.sendmsg', 'socket.bind', 'subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.spawn',
    'os.fork', 'os.forkpty', 'pty.spawn')
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
READING = ('os.listdir', 'os.scandir', 'os.chdir')
CHANGING = (
    'os.mkdir', 'os.remove', 'os.rmdir', 'os.rename', 'os.symlink', 'os.link', 'os.chmod', 'os.chown', 'os.truncate',
    'os.utime')


class Watch:
    """Audit hook that notes connections, programs, and paths outside the given roots.

    Args:
        home: Folder in which files may be changed.
        readable: Folders in which files may be opened.
    """

    def __init__(self, home, readable):
        self.home, self.readable = str(home), {*map(os.path.realpath, readable), os.devnull}
        self.events = []
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if event in REACHING:
            self.events.append(f'{event} {arguments!r:.200}')
        elif event in ('open', *READING, *CHANGING):
            changes = event in CHANGING or (event == 'open' and arguments[2] & WRITING)
            roots = {self.home, os.devnull} | (set() if changes else self.readable)
            for path in arguments[:2 if event in ('os.rename', 'os.symlink', 'os.link') else 1]:
                real = os.path.realpath(path) if isinstance(path, (str, bytes)) else self.home  # else a descriptor
                if not any(f'{os.fsdecode(real)}/'.startswith(f'{root}/') for root in roots):
                    self.events.append(f'{event} {os.fsdecode(real)}')


def peak(reset=False):
    """Return the highest resident memory since the last reset, in bytes; None if Linux does not measure it."""
    try:
        if reset:
            Path('/proc/self/clear_refs').write_text('5')
        lines = Path('/proc/self/status').read_text().splitlines()
    except OSError:
        return None
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))


def observe(reader, path, log, watch=None):
    """Return 'accepted', 'refused' or an exception's name, and the problems as texts."""
    outcome, problems, said = 'accepted', [], io.StringIO()
    log.buffer.clear()
    before = peak(reset=True)
    signal.alarm(SECONDS)
    if watch:
        watch.events.clear()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            reader(path)
    except ValueError as error:
        outcome = 'refused'
        said.write(str(error).replace('\n', '\0'))
    except SystemExit as end:
        outcome = 'refused' if end.code == 2 else f'exit {end.code}'
    except BaseException as error:  # noqa: BLE001 (any other exception is a finding, also that of the alarm)
        outcome = type(error).__name__
        problems.append(traceback.format_exc()[-1500:])
    signal.alarm(0)
    problems += watch.events[:5] if watch else []
    lines = [record.getMessage() for record in log.buffer] + said.getvalue().removesuffix('\n').split('\n')
    problems += [
        f'{len(line)} characters: {line!r:.600}' for line in lines if len(line) > LENGTH or not line.isprintable()]
    problems += [f'asks for memory: {line!r:.600}' for line in lines if "can't allocate" in line]
    problems += [f'{len(lines)} lines'] * (len(lines) > LINES)
    grown = 0 if before is None else peak() - before - 2 * os.path.getsize(path)
    return outcome, problems + [f'{grown >> 20} MiB'] * (grown > MEMORY)


# --- files and their readers ---

def parse(program, *argv):
    return program.create_parser().parse_args([str(argument) for argument in argv])


def eval_options(path, *argv):
    """Return the options of validate.py for one checkpoint."""
    args = parse(validate, *argv)
    models, args.model = args.model, None
    options, = expand_model_list(
        EvalOptions(*(cli.read_options(args, group) for group in (DataOptions, ModelOptions, DeviceOptions))),
        [str(path)], models)
    return options


class Cases:
    """Whole files in an empty folder, their changes and their readers."""

    def __init__(self, home):
        self.home = home
        for index in range(10):
            (home / f'images/val/{index}').mkdir(parents=True)
            Image.new('L', (8, 8), 20 * index).save(home / f'images/val/{index}/0.png')
        self.trainer = build_trainer(TrainOptions.from_args(parse(
            train, '--model', 'smpconv_nano', '--dataset', 'digits', '--model-kwargs', 'depths=[1]', 'dims=[4]',
            'kernel_sizes=[7]', '--in-chans', 1, '--img-size', 32, '--mean', 0.3, '--std', 0.4, '--workers', 0,
            '--device', 'cpu', '--model-ema', '--epochs', 3, '--warmup-epochs', 0, '--output', home, '--experiment',
            'run')))
        for parameter in list(self.trainer.model.parameters())[:3]:  # which keeps cases small
            parameter.grad = torch.zeros_like(parameter)
        optimizer = self.trainer.train_step.optimizer
        optimizer.step()
        self.optimizer = optimizer.state_dict()
        self.trainer.state.finish_epoch(
            dict(epoch=0, train_loss=1., eval_loss=1., eval_top1=50., eval_top5=100., lr=1e-3))
        self.trainer._save()
        self.state = copied(torch.load(self.trainer.run_dir.last, weights_only=True))
        del self.state['state_dict_ema']  # change_state adds one
        self.saved = {}
        for kind, name in (('zip', 'case.pth'), ('legacy', 'case.pth'), *((name, name) for name in RUN)):
            torch.save(self.state, home / name, _use_new_zipfile_serialization=kind != 'legacy')
            self.saved[kind] = (home / name).read_bytes()
        self.trainer.close()
        data = load_file(ROOT / 'tests/golden/cifar_tiny.safetensors')
        self.release = {
            'args': {'model': 'smpconv_cifar', 'model_kwargs': SMALL, 'num_classes': 10}, 'epoch': 3, 'model': {
                key.removeprefix('state_dict.'): data[key] for key in data if key.startswith('state_dict.')}}
        self.networks = {
            'smpconv_nano': timm.create_model('smpconv_nano', **TINY),
            'smpconv_cifar': timm.create_model('smpconv_cifar', **SMALL)}
        save_file(self.state['state_dict'], home / 'whole.safetensors')
        hub.convert(self.write('values', None), home / 'hub')
        self.config = (home / 'hub/config.json').read_bytes()
        self.recipes = [path.read_bytes() for path in sorted((ROOT / 'recipes').glob('*.yaml'))]

    def write(self, kind, draw):
        """Return the path of a whole file, or of one that is changed by a generator."""
        changed = (lambda change, content: change(content, draw)) if draw else (lambda change, content: content)
        path = self.home / 'case.pth'
        if kind.endswith('values'):
            state = changed(change_state, self.release if kind == 'release values' else self.state)
            torch.save(state, path, _use_new_zipfile_serialization=kind != 'legacy values')
        elif kind in ('zip', 'legacy'):
            path.write_bytes(changed(change_bytes, self.saved[kind]))
        elif kind == 'safetensors':
            path = self.home / 'case.safetensors'
            path.write_bytes(changed(change_bytes, (self.home / 'whole.safetensors').read_bytes()))
        elif kind == 'run':
            path = self.home / 'case'
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            for name in RUN:
                if draw and draw.random() < 0.7:
                    torch.save(change_state(self.state, draw), path / name)
                else:
                    (path / name).write_bytes(self.saved[name])
                if draw and draw.random() < 0.2:
                    (path / name).write_bytes(change_bytes((path / name).read_bytes(), draw))
        elif kind == 'holder':
            path = self.home / '.run.json'
            path.write_bytes(changed(change_text, b'{\n"pid": 1,\n"host": "a",\n"since": "2020-01-01"\n}'))
        else:
            is_json = kind.startswith('config')
            path = self.home / ('hub/config.json' if is_json else 'args.yaml')
            content = self.config if is_json else draw.choice(self.recipes) if draw else self.recipes[0]
            if kind.endswith('bytes'):
                content = changed(change_text, content)
            else:
                content = json.dumps(plain(changed(change_value, yaml.safe_load(content)))).encode()  # YAML, too
            path.write_bytes(content)
        return path

    def readers(self, kind):
        """Return the functions that read files of a kind, by name."""
        if kind.startswith('yaml'):
            return {'options': self.read_options}
        if kind.startswith('config'):
            return {'load': lambda path: hub.load(path.parent)}
        if kind == 'holder':
            return {'holder': self.read_holder}
        if kind == 'run':
            return {'resume': self.resume}
        name, kwargs = ('smpconv_cifar', SMALL) if kind == 'release values' else ('smpconv_nano', TINY)
        argv = []
        if kind == 'safetensors':  # a file without a description
            argv = ['--model', name, '--model-kwargs', *(f'{key}={value}' for key, value in kwargs.items())]
        readers = {
            'inherit': self.inherit,
            'evaluate': lambda path: evaluate_model(eval_options(
                path, '--data-dir', self.home / 'images', '--img-size', 32, '--batch-size', 5, '--workers', 0,
                '--device', 'cpu', *argv)),
            'figures': lambda path: ModelSource(
                cli.read_options(parse(figures, 'kernels', '--output', 'kernels.png', *argv), ModelOptions),
                [str(path)]).load(),
            'initial': lambda path: factory.load_weights(
                self.networks[name], factory.select_weights(checkpoint.load_file(path), path)[0], path),
            'pretrained': lambda path: timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)}
        if kind != 'safetensors':  # of which only registered sizes are known by their shapes
            readers['convert'] = self.convert
        if kind not in ('safetensors', 'release values'):
            readers['resume'] = lambda path: self.resume(self.home / 'resumed', str(path))
        return readers

    def inherit(self, path):
        """Read what an evaluation takes over from a checkpoint if the user names no images."""
        options = eval_options(path)
        described = checkpoint.describe(checkpoint.load_file(path), path)
        list(map(described.__getattribute__, ('classes', 'epoch', 'seed', 'model', 'model_kwargs')))
        fill_from_checkpoint(options, described)

    def convert(self, path):
        shutil.rmtree(self.home / 'converted', ignore_errors=True)
        hub.convert(path, self.home / 'converted', card='{source} {classes}')

    def resume(self, path, file=None):
        """Resume the one run in a folder, from its checkpoints or from a file, as train.py does."""
        self.trainer.run_dir = RunDir(path)
        self.trainer.options = self.trainer.options.with_values('checkpointing', resume=file)
        self.trainer.train_step.optimizer.load_state_dict(self.optimizer)
        self.trainer._acquire_run_dir({}, resumes=False)
        self.trainer.close()

    def read_holder(self, path):
        """Read which run holds a folder, as a second run does, and release the folder of another run."""
        held, content = RunDir(path.parent), path.read_bytes()
        print(held._describe_owner())
        held.acquire()
        path.write_bytes(content)
        held.release()

    def read_options(self, path):
        parser = train.create_parser()
        args = cli.parse_args(parser, ['--config', str(path)])
        list(map(logging.warning, ineffective_options(parser, args)))


PLANTED = {  # what must be seen
    'connect': lambda path: socket.create_connection(('127.0.0.1', 9)), 'system': lambda path: os.system('true'),
    'open': lambda path: open('/etc/passwd').close(), 'leave': lambda path: os.listdir(path.parent / '../..'),
    'change': lambda path: Path('/etc/passwd/x').mkdir(), 'print': lambda path: print('\x1b[31m'),
    'log': lambda path: logging.warning('a\nb'), 'lines': lambda path: print('a\n' * 100),
    'memory': lambda path: torch.ones(1 << 25), 'addresses': lambda path: torch.empty(1 << 40),
    'message': lambda path: checkpoint.check_plain('a\nb', b'x')}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--count', type=int, default=2000)
    args = parser.parse_args()
    log = logging.handlers.BufferingHandler(1 << 20)
    logging.basicConfig(level=logging.INFO, handlers=[log])
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    os.fsync = lambda descriptor: None  # files of a case need not outlast a power failure
    draw = random.Random(args.seed)
    outcomes, seconds, bad = Counter(), Counter(), []
    with tempfile.TemporaryDirectory() as home:
        home = Path(home).resolve()
        os.chdir(home)  # so that relative paths of a file are seen, too
        cases = Cases(home)
        for kind in KINDS:  # everything is imported before the first event counts
            for name, reader in cases.readers(kind).items():
                outcome, problems = observe(reader, cases.write(kind, None), log)
                assert outcome == 'accepted', (kind, name, outcome, problems)
        watch = Watch(home, [
            sys.prefix, sys.base_prefix, ROOT, sysconfig.get_path('stdlib'), f'/proc/{os.getpid()}'])
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, resource.RLIM_INFINITY))
        for name, reader in PLANTED.items():
            assert observe(reader, home / 'args.yaml', log, watch)[1] or (name == 'memory' and not peak(True)), name
        for number in range(args.count):
            kind, start = KINDS[number % len(KINDS)], time.perf_counter()
            path, readers = cases.write(kind, draw), cases.readers(kind)
            name = draw.choice(sorted(readers))
            outcome, problems = observe(readers[name], path, log, watch)
            outcomes[f'{kind}: {outcome}'] += 1
            seconds[kind] += time.perf_counter() - start
            if problems or (home / 'trap').exists():
                bad.append(dict(number=number, kind=kind, reader=name, problems=problems))
        os.chdir(ROOT)
    rounded = {kind: round(value, 1) for kind, value in seconds.items()}
    print(json.dumps(dict(outcomes=dict(sorted(outcomes.items())), seconds=rounded, bad=bad), indent=1))
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
