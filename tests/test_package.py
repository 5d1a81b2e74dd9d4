"""What importing does and doesn't, who imports whom, and the names that people rely on."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import smpconv_models
from smpconv_models import layers, ops

PACKAGE = Path(smpconv_models.__file__).parent


def in_fresh_process(script):
    """Standard output of a script that must succeed."""
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- public names ---


def test_public_names_are_frozen():
    assert smpconv_models.__all__ == [
        'DepthwiseConv2d', 'SMPConvNet', 'SMPDepthwiseConv2d', '__version__', 'available_backends', 'clip_radius_',
        'depthwise_conv2d',
    ]
    assert ops.__all__ == ['available_backends', 'depthwise_conv2d']
    assert layers.__all__ == [
        'ConvFFN', 'ConvNormAct', 'DepthwiseConv2d', 'LargeKernelBlock', 'LargeKernelConv', 'SMPDepthwiseConv2d',
        'clip_radius', 'clip_radius_', 'interpolate', 'sample_kernel', 'sampling_grid', 'tents',
    ]


@pytest.mark.parametrize('module', [smpconv_models, ops, layers], ids=lambda module: module.__name__)
def test_public_names_exist(module):
    assert all(hasattr(module, name) for name in module.__all__)


# --- who imports whom ---


def imports(path):
    """Absolute names of what a file imports, with whether each import is inside a function."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(PACKAGE.parent).with_suffix('').parts[:-1]
    in_functions = {
        id(node) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            module = '.'.join([*base, *([node.module] if node.module else [])])
            # "from . import x" names the module x; "from .x import y" something in it
            names = [f'{module}.{alias.name}' for alias in node.names] if node.module is None else [module]
        else:
            continue
        for name in names:
            yield name, id(node) in in_functions


def is_under(name, *parents):
    return any(name == parent or name.startswith(parent + '.') for parent in parents)


def is_standard(name):
    return name.partition('.')[0] in sys.stdlib_module_names


def outside(folder, *allowed):
    """(file, name) of every import that is neither the standard library's nor allowed."""
    paths = sorted((PACKAGE / folder).rglob('*.py')) if (PACKAGE / folder).is_dir() else [PACKAGE / folder]
    assert paths
    return [
        (path.name, name) for path in paths for name, _ in imports(path)
        if not is_standard(name) and not is_under(name, *allowed)
    ]


OPS, LAYERS, MODELS = 'smpconv_models.ops', 'smpconv_models.layers', 'smpconv_models.models'


def test_ops_import_torch_and_themselves():
    found = outside('ops', 'torch', OPS)
    assert [(file, name) for file, name in found if not is_under(name, 'triton')] == []


def test_triton_is_imported_by_its_backend_only():
    for path in PACKAGE.rglob('*.py'):
        if '_triton' not in path.relative_to(PACKAGE).parts:
            assert not any(is_under(name, 'triton') for name, _ in imports(path)), path


def test_layers_import_ops_public_names():
    assert outside('layers', 'torch', 'timm.layers', LAYERS, OPS) == []
    for path in (PACKAGE / 'layers').glob('*.py'):
        assert not any(name.startswith(f'{OPS}.') for name, _ in imports(path)), path


def test_models_import_what_is_below_them():
    assert outside('models', 'torch', 'timm', MODELS, LAYERS, 'smpconv_models.checkpoint', 'smpconv_models') == []
    for path in (PACKAGE / 'models').glob('*.py'):
        assert not any(is_under(name, OPS, 'smpconv_models.training') for name, _ in imports(path)), path


def test_checkpoint_imports_torch_and_safetensors():
    assert outside('checkpoint.py', 'torch', 'safetensors') == []


def test_backends_do_not_know_each_other():
    backends = {'_reference', '_cpu', '_triton'}
    for name in backends:
        files = [PACKAGE / 'ops' / f'{name}.py', *(PACKAGE / 'ops' / name).rglob('*.py')]
        for path in filter(Path.is_file, files):
            others = [f'{OPS}.{other}' for other in backends - {name}]
            assert not any(is_under(imported, *others, 'timm', LAYERS) for imported, _ in imports(path)), path


def test_the_check_sees_imports(tmp_path, monkeypatch):
    """Otherwise an empty list would prove nothing."""
    monkeypatch.setitem(globals(), 'PACKAGE', tmp_path / 'package')
    (tmp_path / 'package' / 'part').mkdir(parents=True)
    (tmp_path / 'package' / 'part' / 'file.py').write_text(
        'import os, numpy.linalg\nfrom . import a\nfrom .b import c\nfrom .. import d\nfrom ..e import f\n'
        'def g():\n    from timm.layers import h\n')
    assert list(imports(tmp_path / 'package' / 'part' / 'file.py')) == [
        ('os', False), ('numpy.linalg', False), ('package.part.a', False), ('package.part.b', False),
        ('package.d', False), ('package.e', False), ('timm.layers', True)]
    assert outside('part', 'package') == [('file.py', 'numpy.linalg'), ('file.py', 'timm.layers')]


# --- what importing does ---


def test_works_without_triton():
    script = """
import sys
sys.modules['triton'] = None
import torch
import smpconv_models
model = smpconv_models.SMPConvNet(
    depths=(1, 1), dims=(4, 8), kernel_sizes=(15, 5), num_classes=3, small_kernel_size=3)
loss = model(torch.randn(2, 3, 32, 32)).square().sum()
loss.backward()
assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
"""
    assert in_fresh_process(script) == ''


def test_first_call_may_be_compiled():
    """A backend that is loaded on first use must not break the graph that it is first used in."""
    script = """
import torch
import smpconv_models
compiled = torch.compile(smpconv_models.depthwise_conv2d, fullgraph=True, backend='aot_eager')
x, weight = torch.randn(2, 3, 8, 9, requires_grad=True), torch.randn(3, 1, 5, 5, requires_grad=True)
y = compiled(x, weight)
y.sum().backward()
expected = torch.nn.functional.conv2d(x, weight, padding=2, groups=3)
torch.testing.assert_close(y, expected)
"""
    in_fresh_process(script)


def test_importing_changes_nothing():
    """Compared with timm and torch imported alone."""
    script = """
import logging, random, sys, warnings
import safetensors, timm, torch

def state():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return dict(
        dtype=torch.get_default_dtype(), device=torch.get_default_device(), grad=torch.is_grad_enabled(),
        cudnn=(cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        matmul=(matmul.allow_tf32, torch.get_float32_matmul_precision()),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        threads=(torch.get_num_threads(), torch.get_num_interop_threads()),
        filters=list(warnings.filters), level=logging.getLogger().level,
        handlers=[list(logging.getLogger(name).handlers) for name in ('', 'torch', 'timm', 'smpconv_models')],
        random=(torch.random.get_rng_state().tolist(), random.getstate()),
        hook=(sys.excepthook, sys.displayhook), path=list(sys.path), cuda=torch.cuda.is_initialized(),
    )

before, modules = state(), set(sys.modules)
import smpconv_models
after = state()
assert before == after, [key for key in before if before[key] != after[key]]
assert not after['cuda']
print(*sorted(name for name in set(sys.modules) - modules if not name.startswith('smpconv_models')))
print(any(name.partition('.')[0] == 'triton' for name in set(sys.modules) - modules))
"""
    new_modules, has_triton = in_fresh_process(script).splitlines()
    assert has_triton == 'False'
    assert [name for name in new_modules.split() if not is_standard(name) and not is_under(name, 'torch', 'timm')] == []


def test_importing_loads_no_backend_and_no_training_and_prints_nothing():
    script = """
import sys
import smpconv_models
loaded = [name for name in sys.modules if name.startswith('smpconv_models.ops._')]
assert 'smpconv_models.ops._cpu' not in loaded, loaded
assert 'smpconv_models.training' not in sys.modules
"""
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')


def test_importing_registers_the_models():
    script = """
import timm
assert timm.list_models('smpconv*') == []
import smpconv_models
print(*timm.list_models('smpconv*'))
"""
    assert in_fresh_process(script).split() == [
        'smpconv_b', 'smpconv_mobile31', 'smpconv_mobile51', 'smpconv_nano', 'smpconv_t']
