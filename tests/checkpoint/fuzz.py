"""Damaged and hostile files for every reader of files from outside; prints a summary as JSON.

    python tests/checkpoint/fuzz.py --seed 0 --count 2000

Each case changes bytes or values of a whole file and gives it to what reads such files. A reader may accept a file or
raise ValueError (at the command line: exit with code 2). The summary counts these, and lists cases with another
exception, with more memory than expected, or with an event that an audit hook must not see: a connection, a program
that is started, or a file that is opened although the case does not name it.
"""
import argparse
import copy
import json
import logging
import random
import sys
import sysconfig
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import timm
import torch
import yaml
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from smpconv_models import checkpoint, hub  # noqa: E402
from smpconv_models.hub import conversion  # noqa: E402
from smpconv_models.training import config, resume  # noqa: E402
from smpconv_models.training.build import choose_model, create_for_checkpoint  # noqa: E402
from smpconv_models.training.folder import RunFolder  # noqa: E402
from smpconv_models.training.validate import inherit  # noqa: E402

TINY = dict(depths=(1,), dims=(4,), kernel_sizes=(7,), num_classes=2)
MEMORY = 64 << 20  # bytes beside twice the file: arenas of Python and PyTorch
VALUES = [
    None, True, False, -1, 0, 1, 1 << 20, 10 ** 30, -10 ** 400, 1e-9, 1e38, float('nan'), float('inf'), 1j, '', 'x',
    '\n', 'a' * 5000, 'hf-hub:evil/x', 'local-dir:/etc', 'wds/x', 'hfds/evil/x', 'pipe:touch trap; echo ://', '/etc',
    '/etc/passwd', '../../..', 'https://127.0.0.1:9/x', 'resnet18', 'smpconv_b', 'smpconv_speech', 'digits', [], {}, (),
    [1], [[1]], [0.5] * 3, [10 ** 6] * 4, {'a': 1}, {'pretrained': True}, [None], torch.ones(2), torch.ones(()), b'x']

_opened = []


def watch(event, arguments):
    """Note connections, programs and opened files, by everything that is loaded after this."""
    if event in ('socket.connect', 'socket.getaddrinfo', 'subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn',
                 'os.fork', 'pty.spawn'):
        _opened.append(f'{event} {arguments!r:.200}')
    elif event == 'open' and isinstance(arguments[0], (str, bytes)):
        _opened.append(str(arguments[0]))


def whole(model):
    """A checkpoint that a run resumes from."""
    optimizer = torch.optim.AdamW(list(model.parameters())[:4])  # which keeps cases small
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    row = dict(epoch=0, train_loss=1., eval_loss=1., eval_top1=50., eval_top5=100., lr=1e-3)
    return {
        'arch': 'smpconv_nano', 'model_kwargs': dict(TINY), 'state_dict': dict(model.state_dict()),
        'classes': ['a', 'b'],
        'args': dict(
            model='smpconv_nano', dataset='', data_dir='/etc', val_split='validation', img_size=32, input_size=None,
            mean=[0.5] * 3, std=[0.5] * 3, interpolation='bicubic', crop_pct=1., seed=3, batch_size=4,
            global_batch_size=8, model_kwargs=dict(TINY), num_classes=2, in_chans=3, opt='adamw', layer_decay=None),
        'optimizer': optimizer.state_dict(), 'amp_scaler': {}, 'images': 100, 'epoch': 0,
        'progress': dict(epoch=1, step=0, loss_sum=0., loss_count=0, refused=0, unreadable=0, best_epoch=0, rows=[row])}


def change_value(value, draw):
    """A copy with one value, key or entry changed."""
    value = copy.deepcopy(value)
    node = value
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
            node[draw.choice(['pretrained', 'file', 'url', 'x', 'dims', 'img_size', 0])] = draw.choice(VALUES)
        else:
            node[key] = draw.choice(VALUES)
        return value


def change_bytes(content, draw):
    """A copy with some bytes changed, left out, repeated or cut off."""
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


def plain(value):
    """What JSON and YAML can say of a value."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def read_checkpoint(path):
    """All that evaluation, resuming, conversion and figures take from a checkpoint."""
    loaded = checkpoint.read_file(path)
    described = checkpoint.describe(loaded, path)
    state_dict, _ = checkpoint.select_state_dict(loaded)
    name, kwargs = choose_model(None, described, state_dict, str(path))
    create_for_checkpoint(name, kwargs, described, state_dict, str(path))
    resume.check_content(loaded)
    network = conversion._create(*conversion._described(described, state_dict, None))
    conversion._adapted(state_dict, network)
    conversion._data(network, described.preparation())
    conversion._labels(network, described.classes)
    list(map(described.__getattribute__, ('epoch', 'seed')))
    inherit(argparse.Namespace(
        checkpoint=str(path), dataset=None, data_dir=None, split=None, img_size=None, input_size=None, mean=None,
        std=None, interpolation=None, crop_pct=None, exif_orientation=None), described)


def read_run(path):
    """What a run takes from the folder that it finds."""
    RunFolder(path.parent).newest(resume.check_content)


def read_yaml(path):
    config.parse_args(train.create_parser(), ['--config', str(path)])


class Cases:
    """Files by kind, each as (how it is written, what reads it)."""

    def __init__(self, folder):
        self.folder = folder
        torch.manual_seed(0)
        model = timm.create_model('smpconv_nano', **TINY)
        self.state = whole(model)
        torch.save(self.state, folder / 'whole.pth')
        hub.convert(folder / 'whole.pth', folder / 'hub')
        self.config = json.loads((folder / 'hub/config.json').read_text())
        self.arguments = yaml.safe_load((ROOT / 'recipes/digits.yaml').read_text())
        self.files = {}
        for kind, new_format in (('zip', True), ('legacy', False)):
            torch.save(self.state, folder / f'whole.{kind}', _use_new_zipfile_serialization=new_format)
            self.files[kind] = (folder / f'whole.{kind}').read_bytes()
        save_file(self.state['state_dict'], folder / 'whole.safetensors')
        self.files['safetensors'] = (folder / 'whole.safetensors').read_bytes()
        self.kinds = ('zip', 'legacy', 'safetensors', 'values', 'legacy values', 'config', 'yaml', 'run')

    def write(self, kind, draw):
        """A changed file and its reader."""
        path = self.folder / 'case.pth'
        if kind in self.files:
            path = path.with_suffix('.safetensors' if kind == 'safetensors' else '.pth')
            path.write_bytes(change_bytes(self.files[kind], draw))
            return path, read_checkpoint
        if kind in ('values', 'legacy values'):
            torch.save(change_value(self.state, draw), path, _use_new_zipfile_serialization=kind == 'values')
            return path, read_checkpoint
        if kind == 'config':
            path = self.folder / 'hub/config.json'
            path.write_text(json.dumps(plain(change_value(self.config, draw))))
            return path, lambda path: hub.load(path.parent)
        if kind == 'run':
            path = self.folder / 'run/last.pth.tar'
            path.parent.mkdir(exist_ok=True)
            torch.save(change_value(self.state, draw), path)
            return path, read_run
        path = self.folder / 'args.yaml'
        path.write_text(yaml.safe_dump(plain(change_value(self.arguments, draw))))
        return path, read_yaml


def peak(reset=False):
    """The highest resident memory since the last reset, in bytes; 0 where Linux does not tell."""
    try:
        if reset:
            Path('/proc/self/clear_refs').write_text('5')
        lines = Path('/proc/self/status').read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--count', type=int, default=2000)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    draw = random.Random(args.seed)
    outcomes, bad = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        cases = Cases(folder)
        for kind in cases.kinds:  # everything is imported before the first event counts
            run_case(*cases.write(kind, random.Random(0)))
        allowed = (
            str(folder), sys.prefix, sys.base_prefix, str(ROOT), sysconfig.get_path('stdlib'), '/proc/', '/dev/null')
        sys.addaudithook(watch)
        for number in range(args.count):
            kind = cases.kinds[number % len(cases.kinds)]
            path, reader = cases.write(kind, draw)
            _opened.clear()
            before = peak(reset=True)
            outcome, trace = run_case(path, reader)
            grown = peak() - before - 2 * path.stat().st_size
            outcomes[f'{kind}: {outcome}'] += 1
            foreign = [name for name in _opened if not name.startswith(allowed)]
            if trace or foreign or grown > MEMORY or (folder / 'trap').exists():
                bad.append(dict(number=number, kind=kind, trace=trace, events=foreign[:5], megabytes=grown >> 20))
    print(json.dumps(dict(outcomes=dict(sorted(outcomes.items())), bad=bad), indent=1))
    return 1 if bad else 0


def run_case(path, reader):
    """('accepted' or 'refused' or the exception's name, the traceback of one that is no refusal)."""
    try:
        reader(path)
    except ValueError as error:
        if len(str(error).splitlines()) > 1 or len(str(error)) > 3000:
            return 'long message', str(error)[:3000]
        return 'refused', ''
    except SystemExit as end:
        return ('refused', '') if end.code == 2 else (f'exit {end.code}', 'exit')
    except BaseException as error:  # noqa: BLE001 (any other exception is a finding)
        return type(error).__name__, traceback.format_exc()[-1500:]
    return 'accepted', ''


if __name__ == '__main__':
    sys.exit(main())
