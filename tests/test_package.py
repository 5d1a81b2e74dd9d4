"""What importing does and doesn't, who imports whom, and the names that people rely on."""
import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import smpconv_models
from smpconv_models import layers, ops, training

PACKAGE = Path(smpconv_models.__file__).parent


def in_fresh_process(script):
    """Standard output of a script that must succeed."""
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_test_is_skipped_for_a_package_of_the_test_extra():
    """Tests that need such a package are skipped on a machine with a GPU, which may lack it, and nowhere else."""
    tests = Path(__file__).parent
    names = {name for path in tests.rglob('*.py') for name in re.findall(r"importorskip\('([\w.]+)'", path.read_text())}
    missing = {name for name in names if importlib.util.find_spec(name.partition('.')[0]) is None}
    assert len(names) > 9 and missing <= (set() if sys.platform == 'linux' else {'triton'})


# --- public names ---


def test_public_names_are_frozen():
    assert smpconv_models.__all__ == [
        'DepthwiseConv1d', 'DepthwiseConv2d', 'SMPConv1d', 'SMPConv2d', 'SMPConvNet', 'SMPDepthwiseConv2d',
        'SMPResNet', 'SMPSequenceNet', '__version__', 'accelerate_depthwise', 'available_backends', 'clip_radius_',
        'create_sequence_model', 'depthwise_conv1d', 'depthwise_conv2d', 'list_sequence_models', 'predict',
    ]
    assert ops.__all__ == [
        'available_backends', 'depthwise_conv1d', 'depthwise_conv2d', 'has_autocast', 'is_counted', 'is_exporting',
        'validate_options',
    ]
    assert layers.__all__ == [
        'CausalConv1d', 'ConvFFN', 'ConvNormActBlock', 'DepthwiseConv1d', 'DepthwiseConv2d', 'FFTConv2d',
        'LargeKernelBlock', 'ReparamConv', 'ReparamLargeKernelConv', 'ResidualBlock', 'SMPConv1d', 'SMPConv2d',
        'SMPDepthwiseConv2d', 'SMPLayer', 'accelerate_depthwise', 'causal_conv1d', 'clip_radius',
        'clip_radius_', 'evaluate_points', 'fft_conv2d', 'sample_kernel', 'sampling_grid', 'smp_layers',
        'tent_basis',
    ]
    assert training.__all__ == [
        'AugmentationOptions', 'CheckpointOptions', 'DataOptions', 'DebugOptions', 'DeviceOptions', 'Digits',
        'DistributedContext', 'EMAOptions', 'EvalOptions', 'LoggingOptions', 'ModelOptions', 'OptimizerOptions',
        'RunOptions', 'ScheduleOptions', 'TrainOptions', 'Trainer', 'TrainingInterrupted', 'atomic_write',
        'build_trainer', 'cli', 'describe_error', 'evaluate', 'evaluate_model', 'expand_model_list',
        'ineffective_options', 'param_groups', 'save_confusion_matrix', 'save_per_class_results',
        'save_results',
    ]


@pytest.mark.parametrize('module', [smpconv_models, ops, layers, training], ids=lambda module: module.__name__)
def test_public_names_exist(module):
    assert all(hasattr(module, name) for name in module.__all__)


# --- who imports whom ---

# The table of CONTRIBUTING.md: part -> what it may import besides the standard library and itself.
OPS, LAYERS, MODELS = 'smpconv_models.ops', 'smpconv_models.layers', 'smpconv_models.models'
CHECKPOINT, HUB, UTILS = 'smpconv_models.checkpoint', 'smpconv_models.hub', 'smpconv_models.utils'
FIGURES, TRAINING = 'smpconv_models.figures', 'smpconv_models.training'
DETECTION, DATA, PREDICTION = 'smpconv_models.detection', 'smpconv_models.data', 'smpconv_models.prediction'
STREAMS = f'{UTILS}.streams'
PUBLIC_OPS = tuple(f'{OPS}.{name}' for name in ops.__all__)
PUBLIC_TRAINING = tuple(f'{TRAINING}.{name}' for name in training.__all__)
BENCHMARKS = tuple(path.stem for path in (PACKAGE.parent / 'benchmarks').glob('*.py'))  # scripts see their neighbours
EXAMPLES = tuple(path.stem for path in (PACKAGE.parent / 'examples').glob('*.py'))
EXPERIMENTS = tuple(path.stem for path in (PACKAGE.parent / 'experiments').glob('*.py'))
MAY_IMPORT = {
    'smpconv_models/ops': ('torch',),
    'smpconv_models/ops/_triton': (
        'torch', 'triton', f'{OPS}._backends', f'{OPS}._problem', f'{OPS}._transforms'),
    'smpconv_models/layers': ('torch', 'timm.layers', *PUBLIC_OPS),
    'smpconv_models/models': ('torch', 'timm', LAYERS, CHECKPOINT, UTILS),
    'smpconv_models/checkpoint': ('torch', 'safetensors', UTILS),
    'smpconv_models/utils': ('tqdm', 'filelock'),
    'smpconv_models/utils/hub_download.py': ('huggingface_hub', UTILS),
    'smpconv_models/data': (
        'torch', 'torchvision', 'numpy', 'scipy', 'sklearn', 'safetensors', 'tqdm', 'PIL', UTILS),
    'smpconv_models/hub': (
        'torch', 'timm', 'huggingface_hub', 'safetensors', MODELS, CHECKPOINT, UTILS),
    'smpconv_models/figures': ('torch', 'numpy', 'matplotlib', 'PIL', 'tqdm', 'pytorch_grad_cam', LAYERS, UTILS),
    'smpconv_models/figures/_inputs.py': (
        'torch', DATA, PREDICTION, TRAINING, UTILS, 'smpconv_models.figures.kernels'),
    'smpconv_models/figures/__main__.py': (
        'torch', 'numpy', 'tqdm', 'smpconv_models', FIGURES, PREDICTION, TRAINING, UTILS),
    'smpconv_models/prediction': (
        'torch', 'timm', 'numpy', 'PIL', 'tqdm', 'smpconv_models', CHECKPOINT, FIGURES, TRAINING, UTILS),
    'smpconv_models/predict.py': (PREDICTION, UTILS),
    'smpconv_models/demo.py': ('numpy', 'PIL', 'smpconv_models', FIGURES, LAYERS, PREDICTION, TRAINING, UTILS),
    'smpconv_models/run.py': (),
    'smpconv_models/_startup': ('smpconv_models',),
    'smpconv_models/training': (
        'torch', 'torchvision', 'timm', 'PIL', 'numpy', 'datasets', 'filelock', 'tqdm', 'wandb', 'yaml', LAYERS,
        MODELS, CHECKPOINT, DATA, FIGURES, UTILS, 'smpconv_models.__version__'),
    'smpconv_models/__main__.py': ('torch', 'timm', 'smpconv_models', STREAMS),
    'smpconv_models/__init__.py': (LAYERS, MODELS, f'{PREDICTION}.predict', *PUBLIC_OPS),
    'train.py': ('smpconv_models', STREAMS, *PUBLIC_TRAINING),
    'validate.py': ('smpconv_models', STREAMS, f'{UTILS}.atomic_io', *PUBLIC_TRAINING),
    'hub': ('smpconv_models', HUB, CHECKPOINT, UTILS),
    'smpconv_models/detection.py': ('torch', 'torchvision', 'timm'),
    'examples': (
        'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'matplotlib', 'safetensors', 'segmentation_models_pytorch',
        'mlxtend', 'pycocotools', 'tqdm', 'smpconv_models', CHECKPOINT, HUB, DETECTION, UTILS, f'{FIGURES}.drawable',
        *PUBLIC_TRAINING, *EXAMPLES),
    'experiments': (
        'torch', 'timm', 'numpy', 'matplotlib', 'tqdm', 'smpconv_models', LAYERS, UTILS, *PUBLIC_TRAINING,
        *EXPERIMENTS),
    'benchmarks': (
        'torch', 'timm', 'huggingface_hub', 'safetensors', 'tqdm', 'torchvision', 'matplotlib',
        'smpconv_models', LAYERS, CHECKPOINT, DETECTION, UTILS, *PUBLIC_TRAINING, *BENCHMARKS),
    **{f'benchmarks/{name}.py': ('torch', 'triton', 'tqdm', 'smpconv_models', f'{OPS}._triton', UTILS, *BENCHMARKS)
       for name in ('gpu_check', 'gpu_tiles', 'tile_configs')},
    'benchmarks/networks.py': ('torch', 'timm', 'transformers'),
}


def files(part):
    """The files of a part, but for those of a part within it."""
    path = PACKAGE.parent / part
    within = [PACKAGE.parent / other for other in MAY_IMPORT if other.startswith(part + '/')]
    found = sorted(path.rglob('*.py')) if path.is_dir() else [path]
    return [file for file in found if not any(file.is_relative_to(other) for other in within)]


def imports(path):
    """Absolute names of all that a file imports, ``from a import b`` as a.b."""
    package = path.relative_to(PACKAGE.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            module = '.'.join([*base, *([node.module] if node.module else [])])
            yield from (f'{module}.{alias.name}' for alias in node.names)


def is_allowed(name, part):
    """Whether a part may import a name: of itself, of the standard library, or under an allowed one.

    The bare package is no permission for its modules: ``import smpconv_models`` registers the models, that is all.
    """
    if name == 'smpconv_models':
        return name in MAY_IMPORT[part]
    itself = part.removesuffix('.py').replace('/', '.')
    parents = {itself, *MAY_IMPORT[part], *sys.stdlib_module_names} - {'smpconv_models'}
    return any(name == parent or name.startswith(parent + '.') for parent in parents)


@pytest.mark.parametrize('part', MAY_IMPORT)
def test_imports_keep_their_direction(part):
    paths = files(part)
    assert paths
    assert [(path.name, name) for path in paths for name in imports(path) if not is_allowed(name, part)] == []


def test_every_file_has_its_rule():
    ruled = {path for part in MAY_IMPORT for path in files(part)}
    assert set(PACKAGE.rglob('*.py')) <= ruled


def test_backends_do_not_know_each_other():
    backends = {'_reference', '_cpu', '_triton'}
    for name in backends:
        paths = [*(PACKAGE / 'ops').glob(f'{name}.py'), *(PACKAGE / 'ops').glob(f'{name}/*.py')]
        others = tuple(f'{OPS}.{other}' for other in backends - {name})
        assert not [(path.name, found) for path in paths for found in imports(path) if found.startswith(others)]


@pytest.mark.parametrize(('part', 'line'), [
    ('smpconv_models/models', 'from smpconv_models import training'),
    ('smpconv_models/models', 'import smpconv_models.figures'),
    ('smpconv_models/models', 'from smpconv_models.ops import depthwise_conv2d'),
    ('smpconv_models/layers', 'from smpconv_models.ops import _cpu'),
    ('smpconv_models/layers', 'from ..ops._cpu import forward'),
    ('smpconv_models/layers', 'from timm.models import create_model'),
    ('smpconv_models/ops', 'def f():\n    import timm'),
    ('smpconv_models/ops', 'def f():\n    import triton'),
    ('smpconv_models/figures', 'import smpconv_models.models.smpconv'),
    ('smpconv_models/checkpoint', 'from smpconv_models import layers'),
    ('smpconv_models/utils', 'import torch'),
    ('smpconv_models/utils', 'from smpconv_models import checkpoint'),
    ('smpconv_models/data', 'from smpconv_models.checkpoint import load_file'),
    ('smpconv_models/data', 'import smpconv_models.training'),
    ('train.py', 'import smpconv_models.ops._cpu'),
    ('validate.py', 'from smpconv_models.training.train_step import TrainStep'),
])
def test_the_check_sees_what_is_forbidden(tmp_path, monkeypatch, part, line):
    """Otherwise an empty list would prove nothing."""
    monkeypatch.setitem(globals(), 'PACKAGE', tmp_path / 'smpconv_models')
    path = tmp_path / part if part.endswith('.py') else tmp_path / part / 'file.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    found = [name for path in files(part) for name in imports(path)]
    assert found and not all(is_allowed(name, part) for name in found)


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


@pytest.mark.slow  # 12 s of compiling
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


def test_importing_registers_the_models_and_does_nothing_else():
    """The state of the process is compared with that after importing timm and torch alone."""
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

assert timm.list_models('smpconv*') == []
sys.stderr = sys.stdout  # two lines are expected there
before, modules = state(), set(sys.modules)
import smpconv_models
after = state()
assert before == after, [key for key in before if before[key] != after[key]]
assert not after['cuda']
print(*timm.list_models('smpconv*'))
print(*set(sys.modules) - modules)
"""
    models, new_modules = map(str.split, in_fresh_process(script).splitlines())
    assert models == ['smpconv_b', 'smpconv_cifar', 'smpconv_mobile31', 'smpconv_mobile51', 'smpconv_nano', 'smpconv_t']
    expected = {*sys.stdlib_module_names, 'torch', 'timm', 'smpconv_models'}
    assert {name.partition('.')[0] for name in new_modules} <= expected
    assert not {f'{OPS}._cpu', f'{OPS}._triton', TRAINING, DATA} & set(new_modules)
