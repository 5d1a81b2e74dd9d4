"""Whole networks through TorchScript, fx, the compiler and export."""
import pytest
import timm
import torch
from common import randomize_
from nets import network, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

SIZES = ((2, 3, 32, 48), (3, 3, 64, 40), (1, 3, 33, 33))


# two stages, of which one has a downsampling: compiling takes seconds for each block
SHORT = dict(depths=(1, 1), dims=(8, 12), kernel_sizes=(15, 5))


def assert_same(convert, sizes=SIZES, **kwargs):
    model = network(**kwargs)
    converted = convert(model)
    for size in sizes:
        x = torch.randn(size)
        expected = model(x)
        # another order of summing at most
        torch.testing.assert_close(converted(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    'kwargs', [{}, dict(output_stride=8), dict(small_kernel_size=0, **SHORT), dict(drop_path_rate=0.1, **SHORT)],
    ids=str)
def test_script(kwargs):
    assert_same(torch.jit.script, **kwargs)


def test_scripted_network_is_saved_and_trains(tmp_path):
    scripted = torch.jit.script(tiny().train())
    torch.jit.save(scripted, tmp_path / 'model.pt')
    loaded = torch.jit.load(tmp_path / 'model.pt')
    loaded(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_trace():
    """The graph must not have kept the size that it was traced with."""
    assert_same(lambda model: torch.jit.trace(model, torch.randn(2, 3, 40, 40)))


@pytest.mark.parametrize('kwargs', [{}, dict(output_stride=16), dict(drop_path_rate=0.1)], ids=str)
def test_fx(kwargs):
    assert_same(torch.fx.symbolic_trace, **kwargs)


def test_the_fx_graph_can_be_scripted():
    assert_same(lambda model: torch.jit.script(torch.fx.symbolic_trace(model)), **SHORT)


def test_fx_has_one_leaf_for_each_kernel_and_convolution():
    from smpconv_models.layers import points
    traced = torch.fx.symbolic_trace(network())
    targets = [node.target for node in traced.graph.nodes if node.op == 'call_function']
    assert targets.count(points.sample_kernel) == 5
    assert sum(getattr(target, '__name__', '') == '_depthwise_conv2d' for target in targets) == 10


def shallow(name):
    """A registered model with one block in each stage, which has every layer of the whole one."""
    return timm.create_model(name, depths=(1,) * (3 if name == 'smpconv_cifar' else 4), device='meta')


@pytest.mark.parametrize(('name', 'is_folded'), [
    pytest.param(name, is_folded, marks=() if name == 'smpconv_cifar' or (name, is_folded) == (
        'smpconv_nano', False) else pytest.mark.slow)   # 4 s each, and much the same
    for name in timm.list_models('smpconv*') for is_folded in (False, True)])
def test_a_step_can_be_captured_in_a_cuda_graph(monkeypatch, name, is_folded):
    """No operator depends on values, for which the CPU would wait, or copies from the CPU."""
    model = shallow(name).train()
    if is_folded:
        model = timm.utils.reparameterize_model(model.eval())
    devices, dispatch = set(), FakeTensorMode.dispatch

    def watched(mode, func, types, args=(), kwargs=None):
        result = dispatch(mode, func, types, args, kwargs)
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        devices.update(leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result

    monkeypatch.setattr(FakeTensorMode, 'dispatch', watched)
    for device in ('cuda', 'cpu'):  # autograd runs on existing devices only
        with FakeTensorMode():
            state = {
                key: torch.empty(value.shape, dtype=value.dtype, device=device, requires_grad=value.requires_grad)
                for key, value in [*model.named_parameters(), *model.named_buffers()]}
            devices.clear()
            images = torch.empty(2, *model.pretrained_cfg['input_size'], device=device)
            logits = torch.func.functional_call(model, state, images)
            if device == 'cpu':
                logits.sum().backward()
        assert devices == {device}
    assert all(value.grad is not None for value in state.values() if value.requires_grad)


@pytest.mark.parametrize(('name', 'is_training'), [
    pytest.param(name, is_training, marks=() if (name, is_training) == ('smpconv_nano', True) else pytest.mark.slow)
    for name in timm.list_models('smpconv*') for is_training in (True, False)])  # 10 s each, and much the same
def test_one_graph_serves_every_batch(name, is_training):
    torch.compiler.reset()
    model = randomize_(shallow(name).to_empty(device='cpu')).train(is_training)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    for batch in (4, 3, 7):
        images = torch.randn(batch, model.in_chans, 32, 32)
        torch._dynamo.mark_dynamic(images, 0)
        compiled(images).sum().backward()
    assert len(graphs) == 1
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow  # 24 s of compiling
def test_compile_with_gradients():
    """One graph with dynamic sizes gives eager's outputs and gradients at two sizes."""
    torch.compiler.reset()
    model = network(drop_path_rate=0., **SHORT)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend='aot_eager')
    for size in SIZES[:2]:
        x = torch.randn(size)
        results = []
        for function in (model, compiled):
            y = function(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))))
        for got, expected in zip(results[1], results[0]):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.slow  # inductor compiles C++ for minutes
@pytest.mark.timeout(900)
def test_inductor():
    torch.compiler.reset()
    assert_same(lambda model: torch.compile(model, fullgraph=True, dynamic=True), SIZES[:2])


@pytest.mark.parametrize('strict', [pytest.param(True, marks=pytest.mark.slow), False])  # 17 s
def test_export_with_dynamic_sizes(strict):
    """Batch, height and width are free, and the graph has no operator of this package in it."""
    model = network(**SHORT)
    # from 33 on, where the last map has more than one pixel in each direction: a size of 1 is a case of its own
    height, width = (torch.export.Dim(name, min=33, max=256) for name in ('height', 'width'))
    dims = {0: torch.export.Dim('batch', max=256), 2: height, 3: width}
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(dims,), strict=strict)
    assert not any('smpconv_models' in str(node.target) for node in exported.graph.nodes)
    converted = exported.module()
    for size in ((1, 3, 64, 96), (3, 3, 40, 64), (4, 3, 33, 47)):
        x = torch.randn(size)
        expected = model(x)
        torch.testing.assert_close(converted(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
