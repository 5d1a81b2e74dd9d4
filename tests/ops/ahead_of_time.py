"""Build the kernels that launch.py would launch for a GPU that is not present: registers, spills, instructions.

The Triton wheel carries the assembler and the two tools that read its output.
"""
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from smpconv_models.ops._triton import hopper, kernels, launch

TOOLS = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
TYPES = {torch.float16: '*fp16', torch.bfloat16: '*bf16', torch.float32: '*fp32'}
PRODUCT = re.compile(r'(@\S+ )?(HMMA|HGMMA|UTC\w*MMA)\b')    # mma.sync, wgmma, tcgen05
COPY = re.compile(r'(@\S+ )?LDGSTS\b')
OPTIONS = ('num_warps', 'num_stages')


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of its call."""
    kernel: triton.runtime.JITFunction
    arguments: dict
    options: dict
    grid: tuple


@dataclass(frozen=True)
class Build:
    registers: int
    stack: int             # bytes a thread, where spilled registers go
    shared: int            # bytes a program
    tensor_memory: int     # columns a program
    ptx: str
    total: int             # machine instructions
    loop: list             # machine instructions of the innermost loop with matrix products
    copying: list          # machine instructions of the innermost loop without them that copies to shared memory


class Recorder:
    """Replacement of a module of kernels in launch.py that records the calls."""

    def __init__(self, module, launches):
        self.module, self.launches = module, launches

    def __getattr__(self, name):
        kernel = getattr(self.module, name)

        class _At:
            def __getitem__(_, grid):
                def call(*args, **kwargs):
                    options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
                    named = dict(zip(kernel.arg_names, args))
                    self.launches.append(Launch(kernel, {**named, **kwargs}, options, grid))
                return call
        return _At()


def launches(monkeypatch, function, *args):
    """Return what ``function`` of launch.py launches for these arguments; tensors may be on the meta device."""
    recorded = []
    with monkeypatch.context() as patch:
        patch.setattr(launch, 'kernels', Recorder(kernels, recorded))
        patch.setattr(launch, '_import_hopper', lambda: Recorder(hopper, recorded))
        function(*args)
    return recorded


def build(launched, capability):
    """Compile a launch for a compute capability such as 90."""
    names, values = launched.kernel.arg_names, launched.arguments
    constant = {param.name: param.is_constexpr or values[param.name] is None for param in launched.kernel.params}
    tensors = [name for name in names if isinstance(values[name], torch.Tensor)]
    signature = {
        name: 'constexpr' if constant[name] else TYPES[values[name].dtype] if name in tensors else 'i32'
        for name in names
    }
    source = (GluonASTSource if launched.kernel.is_gluon() else ASTSource)(
        fn=launched.kernel,
        signature=signature,
        constexprs={(names.index(name),): values[name] for name in names if constant[name]},
        attrs={(names.index(name),): [['tt.divisibility', 16]] for name in tensors},
    )
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=launched.options)
    registers, stack, lines = _read(compiled.asm['cubin'])
    total = sum('*/' in line and ';' in line for line in lines)
    tensor_memory = getattr(compiled.metadata, 'tmem_size', None) or 0
    loops = _loops(lines)
    return Build(
        registers, stack, compiled.metadata.shared, tensor_memory, compiled.asm['ptx'], total,
        min((loop for loop in loops if _has(loop, PRODUCT)), key=len, default=[]),
        min((loop for loop in loops if _has(loop, COPY) and not _has(loop, PRODUCT)), key=len, default=[]))


def _read(cubin):
    with NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        usage = _run('cuobjdump', '-res-usage', file.name)
        lines = _run('nvdisasm', '-c', file.name).splitlines()
    registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', usage).groups())
    return registers, stack, lines


def _run(tool, *args):
    return subprocess.run([TOOLS / tool, *args], check=True, capture_output=True, text=True).stdout


def _has(loop, kind):
    return any(kind.match(instruction) for instruction in loop)


def _loops(lines):
    """Return the instructions of every loop, from a label to a branch back to it."""
    labels = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r'\s*(\.L_x_\d+):', line))}
    loops = []
    for number, line in enumerate(lines):
        branch = re.search(r'BRA\S*\s+.*`\((\.L_x_\d+)\)', line)
        if branch and labels.get(branch[1], number) < number:
            loops.append([match[1] for part in lines[labels[branch[1]]:number] if (match := re.search(
                r'/\*[0-9a-f]{4,}\*/\s+(.*?);', part))])
    return loops
