"""The gate: an engine computes a unit only where nobody watches it and nothing in it was replaced, and says so."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from helpers.gate_cases import (
    BACKWARD_WATCHES,
    CLOSE,
    GLOBAL_BACKWARD_WATCHES,
    GLOBAL_WATCHES,
    PLACES,
    PLACES_OF_UNITS,
    WATCHES,
    assert_equal,
    child,
    compiled,
    each_case,
    hook,
    make,
    make_input,
    make_unit,
    replaced,
    run,
)
from helpers.randomised import randomise
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sk_plugins import SelectiveKernel
from sk_plugins.fuse import fold_batch_norm
from sk_plugins.layers import ConvBNAct
from sk_plugins.networks import SKBasicBlock, SKBottleneck
from sk_plugins.ops import BACKENDS, gate, has_hooks, stubbed_launches, ways


@each_case
def test_the_engine_is_taken_where_nothing_is_unusual(engine, training, engine_of):
    module = make(engine, training)
    plain = copy.deepcopy(module)
    for part in plain.modules():
        if hasattr(part, 'backend'):
            part.backend = 'plain'
    engine_of(engine)
    assert_equal(run(module, training), run(plain, training))
    assert ways(module) == {engine: 1}
    assert ways(plain) == {'plain': 1}


@each_case
def test_what_watches_or_replaces_is_honoured(engine, training, engine_of):
    engine_of(engine)
    module = make(engine, training)
    watches = {**WATCHES, **(BACKWARD_WATCHES if training else {})}
    expected = run(module, training)
    for name in [*PLACES, *([] if engine == 'recompute' else PLACES_OF_UNITS)]:
        part = child(module, name)
        if part is None or (name == '' and engine == 'recompute'):
            continue
        for what, watch in watches.items():
            if what.startswith('backward') and name in ('conv2.attn', 'conv3.act', 'drop_path'):
                continue  # torch's backward hooks refuse lists, and sums in place
            with watch(part) as seen:
                got = run(module, training)
                assert module._way == 'plain', (what, name)
                assert any(kept is part for kept in seen), (what, name)
            assert_equal(got, expected)
            run(module, training)
            assert module._way == engine, f'{what} of {name!r} was undone'


@each_case
def test_what_watches_every_module_is_honoured(engine, training, engine_of):
    engine_of(engine)
    module = make(engine, training)
    module = module.conv2 if training and engine == 'triton' else module  # a unit's sum is in place
    expected = run(module, training)
    for what, watch in {**GLOBAL_WATCHES, **(GLOBAL_BACKWARD_WATCHES if training else {})}.items():
        with watch(module) as seen:
            got = run(module, training)
            assert module._way == 'plain', what
            convolutions = {part for part in seen if isinstance(part, nn.Conv2d)}
            assert convolutions == {part for part in module.modules() if isinstance(part, nn.Conv2d)}, what
        assert_equal(got, expected)
        run(module, training)
        assert module._way == engine, what


def compiles_torchs_own():
    """Whether ``compile`` does anything to a module of torch itself: not in 2.7."""
    module = nn.Conv2d(1, 1, 1)
    with compiled(module) as seen:
        module(torch.ones(1, 1, 1, 1))
    return bool(seen)


@each_case
@pytest.mark.parametrize('name', ['', 'conv2.paths.0', 'conv2.attn.fc_select'])
def test_compiled_modules_run_compiled(engine, training, name, engine_of):
    engine_of(engine)
    module = make(engine, training)
    expected = run(module, training)
    part = module if name == '' else child(module, name)
    with compiled(part) as seen:
        got = run(module, training)
        assert module._way == 'plain'
        assert seen or (type(part) is nn.Conv2d and not compiles_torchs_own())
    assert_equal(got, expected)
    run(module, training)
    assert module._way == engine


def freeze(module):
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


def set_momentum(module):
    module.paths[0].bn.momentum = None


def track_nothing(module):
    norm = module.paths[0].bn
    norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = False, None, None, None


def drop_the_scale(module):
    norm = module.paths[0].bn
    norm.affine, norm.weight, norm.bias = False, None, None


def wrap_around(module):
    """As those do who want seamless pictures of a trained network."""
    module.paths[0].conv.padding_mode = 'circular'


def set_method(module):
    """As those do who want them seamless in one direction."""
    conv = module.paths[0].conv
    conv._conv_forward = lambda x, weight, bias: nn.functional.conv2d(
        x, weight * 2, bias, padding=1, groups=conv.groups
    )


def hold_elsewhere(module, name):
    """As an attribute, where whoever learns it computes it."""
    value = getattr(module, name)
    delattr(module, name)
    setattr(module, name, value if value is None else value.detach().clone())


REPLACED = {
    'one norm frozen': lambda sk: sk.paths[0].bn.train(not sk.training),
    "the attention's norm frozen": lambda sk: sk.attn.bn.train(not sk.training),
    'no momentum': set_momentum,
    'no running statistics': track_nothing,
    'no scale': drop_the_scale,
    'another eps': lambda sk: setattr(sk.paths[0].bn, 'eps', 0.1),
    'group norm': lambda sk: setattr(sk.paths[1], 'bn', nn.GroupNorm(2, sk.out_channels).double()),
    'instance norm': lambda sk: setattr(sk.paths[1], 'bn', nn.InstanceNorm2d(sk.out_channels).double()),
    'identity': lambda sk: setattr(sk.paths[1], 'bn', nn.Identity()),
    'leaky': lambda sk: setattr(sk.paths[1], 'act', nn.LeakyReLU()),
    'no activation': lambda sk: setattr(sk.paths[1], 'act', nn.Identity()),
    'sigmoid attention': lambda sk: setattr(sk.attn, 'softmax', nn.Sigmoid()),
    'weight norm': lambda sk: nn.utils.weight_norm(sk.paths[0].conv),
    'parametrized weight norm': lambda sk: parametrizations.weight_norm(sk.paths[0].conv),
    'parametrization': lambda sk: parametrize.register_parametrization(sk.paths[0].conv, 'weight', nn.Tanh()),
    'circular padding': wrap_around,
    'another convolution': set_method,
    'a scale held elsewhere': lambda sk: hold_elsewhere(sk.paths[0].bn, 'weight'),
    "the attention's scale held elsewhere": lambda sk: hold_elsewhere(sk.attn.bn, 'weight'),
    'a running mean held elsewhere': lambda sk: hold_elsewhere(sk.paths[1].bn, 'running_mean'),
    'a bias that is no parameter': lambda sk: hold_elsewhere(sk.paths[0].conv, 'bias'),
    'softmax over channels': lambda sk: setattr(sk.attn.softmax, 'dim', 2),
    'another split': lambda sk: setattr(sk, 'split', lambda x: [x * (i + 1) for i in range(len(sk.paths))]),
    'a module more': lambda sk: sk.paths[0].add_module('more', nn.Identity()),
}


def test_batches_counted_on_another_device(engine_of):
    """torch counts them wherever they are; a kernel would not."""
    engine_of('triton')
    unit = make_unit()
    unit.conv2.paths[0].bn.num_batches_tracked = torch.zeros((), dtype=torch.int64, device='meta')
    run(unit, True)
    assert unit._way == 'plain'


def test_a_convolution_of_another_backend_is_left_to_it(engine_of):
    engine_of('triton')
    for kind, names in ((SKBottleneck, ('conv1', 'conv2', 'conv3')), (SKBasicBlock, ('conv1', 'conv2'))):
        unit = make_unit(kind)
        for name in names:
            part = unit.get_submodule(name)
            part.backend = 'plain'
            run(unit, True)
            assert (unit._way, part._way) == ('plain', 'plain'), name
            part.backend = 'auto'
            run(unit, True)
            assert unit._way == 'triton', name


@pytest.mark.parametrize('training', [True, False], ids=['training', 'eval'])
def test_norms_whose_values_lie_apart(training, engine_of):
    """A kernel takes them one after another, and would read, or write, what is another's."""
    engine_of('triton')
    unit = make_unit(training=training)
    expected = run(unit, True)
    assert unit._way == 'triton'
    norm = unit.conv2.paths[0].bn
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        tensor = getattr(norm, name)
        apart = torch.stack([tensor.detach(), torch.full_like(tensor, 7)], 1)[:, 0]
        kept = tensor.data
        tensor.data = apart
        assert_equal(run(unit, True), expected)
        assert unit._way == 'plain', name
        tensor.data = kept
    run(unit, True)
    assert unit._way == 'triton'


@each_case
def test_a_module_is_gone_with_its_last_name(engine, training, engine_of):
    """Without the collector of cycles, which comes when it will: a GPU's memory would be held till then."""
    engine_of(engine)
    module = make(engine, training)
    run(module, training)
    assert module._way == engine
    watched = [weakref.ref(part) for part in module.modules()]
    gc.disable()
    try:
        del module
        assert not any(watch() for watch in watched)
    finally:
        gc.enable()


@pytest.mark.parametrize('engine', ['recompute', 'triton'])
def test_a_checkpoint_computes_again_as_it_did(engine, engine_of):
    """Where somebody watched the first time alone, too, as with a hook around the forward pass."""
    engine_of(engine)
    module, x = make(engine, True), make_input().requires_grad_()
    expected = run(module, True)[2:]
    sk = module if engine == 'recompute' else module.conv2
    module.zero_grad()
    for watched in (True, False):
        if watched:
            with hook(sk.attn, 'register_forward_hook') as seen:
                output = checkpoint(module, x, use_reentrant=False)
        else:
            output = checkpoint(module, x, use_reentrant=False)
        assert module._way == ('plain' if watched else engine)
        grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        found = torch.autograd.grad(output, [p for p in module.parameters() if p.requires_grad], grad)
        assert_equal(found, expected)
        assert len(seen) == 1


PATCHED_BEFORE = """
import functools
import torch
from torch import nn
owner = nn.OWNER
original = owner.NAME
@functools.wraps(original)
def patched(self, *args, **kwargs):
    seen.append(self)
    return original(self, *args, **kwargs)
seen = []
owner.NAME = patched
import sk_plugins
layer = sk_plugins.SelectiveKernel(8, groups=2).train()
layer(torch.randn(2, 8, 4, 4))
print(layer._way, sum(isinstance(part, nn.Conv2d) for part in seen) >= 4)
"""


@pytest.mark.slow
@pytest.mark.parametrize('patched', ['Conv2d.forward', 'Conv2d._conv_forward', 'Module.__call__'])
def test_what_was_replaced_before_the_package_was_imported(patched):
    owner, name = patched.split('.')
    code = PATCHED_BEFORE.replace('OWNER', owner).replace('NAME', name)
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert result.stdout == 'plain True\n', result.stderr


@each_case
@pytest.mark.parametrize('change', REPLACED.values(), ids=REPLACED.keys())
@pytest.mark.parametrize('ran', [False, True], ids=['new', 'ran before'])
def test_what_is_no_longer_what_the_engine_computes(change, ran, engine, training, engine_of):
    engine_of(engine)
    module = make(engine, training)
    if ran:
        run(module, training)
        assert module._way == engine
    sk = module if engine == 'recompute' else module.conv2
    change(sk)
    got = run(module, training)
    assert sk._way == module._way == 'plain'
    for part in module.modules():
        if hasattr(part, 'backend'):
            part.backend = 'plain'
    assert_equal(got, run(module, training))


@pytest.mark.parametrize('ran', [False, True], ids=['new', 'ran before'])
def test_methods_that_an_engine_repeats(ran, engine_of):
    """Of the unit and of what is inside it, of one module and of a class, before the first call and after it."""
    engine_of('triton')
    for kind in (SKBottleneck, SKBasicBlock):
        unit = make_unit(kind)
        if ran:
            run(unit, True)
        for owner, name in ((SelectiveKernel, 'split'), (kind, '_end')):
            with replaced(owner, name) as seen:
                run(unit, True)
            assert (unit._way, len(seen)) == ('plain', 1), name
            run(unit, True)
            assert unit._way == 'triton'
        calls = []
        unit._end = lambda *args, calls=calls, original=unit._end: calls.append(1) or original(*args)
        run(unit, True)
        assert (unit._way, calls) == ('plain', [1])
        del unit._end
        run(unit, True)
        assert unit._way == 'triton'


def test_pruned_and_no_longer(engine_of):
    """Parameters that were renamed and renamed again: each kind is there as often as before."""
    layer, x = make('recompute', True), make_input()
    engine_of('recompute')
    ways_taken = []
    for change in (
        lambda: None,
        lambda: prune.l1_unstructured(layer.paths[0].conv, 'weight', 1),
        lambda: prune.remove(layer.paths[0].conv, 'weight'),
    ):
        change()
        layer(x)
        ways_taken.append(layer._way)
    assert ways_taken == ['recompute', 'plain', 'recompute']


def test_a_reentrant_checkpoint_that_was_watched_once(engine_of):
    engine_of('recompute')
    layer, x = make('recompute', True), make_input().requires_grad_()
    with hook(layer.attn, 'register_forward_hook'):
        checkpoint(layer, x, use_reentrant=True).sum().backward()
    for _ in range(2):
        output = checkpoint(layer, x, use_reentrant=True)
        output.sum().backward()
        assert layer._way == 'recompute'


def test_ways_of_a_compiled_layer():
    layer = make('recompute', True)
    layer.backend = 'triton'
    torch.compile(layer, backend='eager', fullgraph=True)(make_input())
    assert ways(layer) == {'operators': 1}
    layer.attn.register_forward_hook(lambda *args: None)
    torch.compiler.reset()
    torch.compile(layer, backend='eager')(make_input())
    assert ways(layer) == {'plain': 1}


def test_every_child_may_change_and_change_back(engine_of):
    """What was found is looked up anew after each change, and after it was undone."""
    engine_of('triton')
    unit = make_unit()
    names = [name for name, _ in unit.named_modules() if name]
    for name in names:
        parent, _, last = name.rpartition('.')
        parent, original = unit.get_submodule(parent), unit.get_submodule(name)
        run(unit, True)
        assert unit._way == 'triton', name
        calls = []

        class Calls(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, *args):
                calls.append(name)  # noqa: B023
                return self.inner(*args)

        if isinstance(original, nn.ModuleList):
            continue
        parent._modules[last] = Calls(original)
        run(unit, True)
        assert unit._way == 'plain', name
        assert calls == [name], name
        parent._modules[last] = original
        run(unit, True)
        assert unit._way == 'triton', name


def test_backend_mode_and_norms_are_asked_at_every_call(engine_of):
    engine_of('triton')
    unit = make_unit()
    expected = ['triton', 'plain', 'triton', 'triton', 'plain', 'triton', 'plain', 'triton']
    changes = [
        lambda: None,
        lambda: setattr(unit, 'backend', 'plain'),
        lambda: setattr(unit, 'backend', 'auto'),
        lambda: freeze(unit),
        lambda: unit.conv2.attn.bn.train(),
        lambda: unit.train() and unit.drop_path.eval(),
        lambda: setattr(unit.conv2, 'backend', 'recompute'),
        lambda: setattr(unit.conv2, 'backend', 'auto'),
    ]
    found = []
    for change in changes:
        change()
        run(unit, True)
        found.append(unit._way)
    assert found == expected
    unit.drop_path.train()
    run(unit, True)
    assert unit._way == 'plain'


@pytest.mark.parametrize('kind', [SKBottleneck, SKBasicBlock])
def test_norms_all_frozen_and_parameters_without_gradients(kind, engine_of):
    unit = make_unit(kind)
    plain = copy.deepcopy(unit)
    for part in plain.modules():
        if hasattr(part, 'backend'):
            part.backend = 'plain'
    for module in (unit, plain):
        freeze(module)
    engine_of('triton')
    assert_equal(run(unit, True), run(plain, True))
    assert unit._way == 'triton'
    sk = 'conv2' if kind is SKBottleneck else 'conv1'
    for name in ('downsample', f'{sk}.paths.0.bn', f'{sk}.attn', sk):
        for module in (unit, plain):
            module.train().get_submodule(name).requires_grad_(False)
            module.drop_path.eval()
        assert_equal(run(unit, True), run(plain, True))
        assert unit._way == 'triton', name


@pytest.mark.parametrize('kind', [SKBottleneck, SKBasicBlock])
def test_folded_units_in_inference(kind, engine_of):
    unit = fold_batch_norm(make_unit(kind, training=False))
    plain = copy.deepcopy(unit)
    for part in plain.modules():
        if hasattr(part, 'backend'):
            part.backend = 'plain'
    expected = run(plain, False)
    assert plain._way == 'plain'
    engine_of('triton')
    assert_equal(run(unit, False), expected)
    assert unit._way == 'triton'
    torch.testing.assert_close(unit(make_input()).detach(), expected[0], **CLOSE)
    assert unit._way == 'plain'  # whoever wants gradients of it
    sk = unit.conv2 if kind is SKBottleneck else unit.conv1
    for norm in ('paths.0.bn', 'attn.bn'):  # one that was not folded
        parent = sk.get_submodule(norm.rpartition('.')[0])
        conv = parent.conv if norm.startswith('paths') else parent.fc_reduce
        kept, parent.bn = parent.bn, nn.BatchNorm2d(conv.out_channels).double().eval()
        run(unit, False)
        assert unit._way == 'plain', norm
        parent.bn = kept
        run(unit, False)
        assert unit._way == 'triton'
        bias, conv.bias = conv.bias, None
        run(unit, False)
        assert unit._way == 'plain', norm
        conv.bias = bias
    with hook(sk.paths[1].conv, 'register_forward_hook') as seen:
        assert_equal(run(unit, False), expected)
        assert seen


def test_converters(engine_of):
    engine_of('triton')
    unit = make_unit(training=False)
    expected = run(unit, False)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(unit)
    assert_equal(run(converted, False), expected)
    assert converted._way == 'plain'


class Tagged(torch.Tensor):
    pass


class Counts(TorchFunctionMode):
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.conv2d or func is nn.functional.conv2d
        return func(*args, **(kwargs or {}))


@each_case
def test_transforms_modes_and_subclasses(engine, training, engine_of):
    engine_of(engine)
    module, x = make(engine, training), make_input()
    freeze(module)  # vmap refuses norms that update
    with torch.set_grad_enabled(training):
        expected = module(x).detach()
        assert module._way == engine
        parameters = dict(module.named_parameters())

        def plainly(got):
            assert module._way == 'plain'
            torch.testing.assert_close(got.detach(), expected, **CLOSE)
            module(x)
            assert module._way == engine

        plainly(torch.func.vmap(module)(torch.stack([x, 2 * x]))[0])
        plainly(torch.func.vjp(module, x)[0])
        plainly(torch.func.jvp(module, (x,), (x,))[0])
        plainly(torch.func.functionalize(module)(x))
        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(module(forward_ad.make_dual(x, x))).primal.clone()
        plainly(got)
        with FlopCounterMode(display=False) as counter:
            got = module(x)
        plainly(got)
        assert torch.ops.aten.convolution in counter.get_flop_counts()['Global']
        with Counts() as counts:
            got = module(x)
        plainly(got)
        assert counts.count == sum(isinstance(part, nn.Conv2d) for part in module.modules())
        tagged = module(x.as_subclass(Tagged))
        assert type(tagged) is Tagged
        plainly(tagged.as_subclass(torch.Tensor))
        plainly(torch.jit.trace(module, x, check_trace=False)(x))
        # A call with others' parameters is an ordinary one.
        halves = {name: parameter / 2 for name, parameter in parameters.items()}
        changed = torch.func.functional_call(module, halves, (x,))
        assert module._way == engine
        other = copy.deepcopy(module)
        other.load_state_dict(halves, strict=False)
        torch.testing.assert_close(changed, other(x), **CLOSE)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert module(mode.from_tensor(x)).shape == expected.shape
        assert module._way == 'plain'


@each_case
def test_graphs(engine, training, engine_of):
    """Tracers and exporters see the plain modules."""
    engine_of(engine)
    module, x = make(engine, training), make_input()
    freeze(module)
    expected = run(module, training)
    traced = torch.fx.symbolic_trace(module)
    convolutions = sum(isinstance(part, nn.Conv2d) for part in module.modules())
    leaves = [node.target for node in traced.graph.nodes if node.op == 'call_module']
    assert sum(isinstance(module.get_submodule(name), nn.Conv2d) for name in leaves) == convolutions
    assert_equal(run(traced, training), expected)
    exported = torch.export.export(module, (x,))
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.aten.conv2d.default) == convolutions
    torch.testing.assert_close(exported.module()(x), expected[0], **CLOSE)
    scripted = torch.jit.script(module)
    torch.testing.assert_close(scripted(x), expected[0], **CLOSE)


@each_case
def test_replicas_of_data_parallel(engine, training, engine_of):
    """Their parameters are plain attributes, as ``torch.nn.parallel.replicate`` sets them."""
    engine_of(engine)
    module = make(engine, training)
    freeze(module)
    expected = run(module, training)
    modules = list(module.modules())
    copies = {part: part._replicate_for_data_parallel() for part in modules}
    for part, replica in copies.items():
        for name, inner in part._modules.items():
            replica._modules[name] = None if inner is None else copies[inner]
        for name, parameter in part._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter * 1)
        for name, buffer in part._buffers.items():
            replica._buffers[name] = buffer
    replica = copies[module]
    with torch.set_grad_enabled(training):
        output = replica(make_input())
    assert replica._way == 'plain'
    torch.testing.assert_close(output.detach(), expected[0], **CLOSE)
    if training:
        module.zero_grad()
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
        assert_equal([parameter.grad for parameter in module.parameters()], expected[2:])
    assert_equal(run(module, training), expected)
    assert module._way == engine


@each_case
def test_copies(engine, training, engine_of):
    engine_of(engine)
    module = make(engine, training)
    expected = run(module, training)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert_equal(run(twin, training), expected)
        assert twin._way == engine
        # A hook on the copy is one on the copy alone.
        part = next(part for part in twin.modules() if isinstance(part, nn.Conv2d))
        with hook(part, 'register_forward_hook') as seen:
            run(module, training)
            assert not seen
            run(twin, training)
            assert seen


@pytest.mark.parametrize('shape', [(8, 6, 5), (0, 8, 6, 5)], ids=str)
def test_maps_that_are_none(shape, engine_of):
    """One image without a batch, and a batch of none."""
    engine_of('triton')
    layer = ConvBNAct(8, 4, 3).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    if len(shape) == 4:
        assert layer(x).shape == (0, 4, 6, 5)
    else:
        with pytest.raises(ValueError, match='expected 4D input'):
            layer(x)
    assert layer._way == 'plain'


def test_ways_counts_sk_convolutions(engine_of):
    units = nn.Sequential(make_unit(), make_unit(), make_unit())[:1]
    assert ways(units) == {'plain': 1}
    units(make_input())
    assert ways(units) == {'recompute': 1}
    engine_of('triton')
    units(make_input())
    assert ways(units) == {'triton': 1}
    assert ways(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize('backend', BACKENDS)
def test_backends(backend):
    layer = randomise(SelectiveKernel(8, groups=2, backend=backend)).double().train()
    with torch.no_grad():
        layer(make_input())
    assert layer._way == 'plain'  # a CPU has no engine for inference
    layer(make_input())
    assert layer._way == ('plain' if backend == 'plain' else 'recompute')


def test_more_branches_than_a_kernel_takes(engine_of):
    """They are the GPU's limit alone."""
    layer = randomise(SelectiveKernel(8, groups=2, kernel_sizes=(1, 3, 5, 7, 9))).double().train()
    plain = copy.deepcopy(layer)
    plain.backend = 'plain'
    expected = run(plain, True)
    assert_equal(run(layer, True), expected)
    assert (plain._way, layer._way) == ('plain', 'recompute')
    engine_of('triton')
    assert_equal(run(layer, True), expected)
    assert layer._way == 'recompute'


@pytest.mark.parametrize('kind', [SKBottleneck, SKBasicBlock])
def test_stubbed_launches_go_the_gpus_way(kind):
    pytest.importorskip('triton')
    unit = make_unit(kind).float()
    with stubbed_launches():
        output = unit(make_input().float().requires_grad_())
        output.backward(torch.ones_like(output))
        assert unit._way == 'triton'
        assert output.shape == (3, 4 * kind.expansion, 6, 5)
        with torch.no_grad():
            assert unit.eval()(make_input().float()).shape == output.shape
        assert unit._way == 'triton'
    unit(make_input().float())
    assert (unit._way, ways(unit)) == ('plain', {'recompute': 1})
    assert not gate._stubbed


def test_has_hooks():
    layer = ConvBNAct(4, 4)
    assert not has_hooks(layer)
    handle = layer.register_full_backward_hook(lambda *args: None)
    assert has_hooks(layer)
    handle.remove()
    assert not has_hooks(layer)
    layer.forward = layer.forward
    assert has_hooks(layer)
    layer.conv._conv_forward = layer.conv._conv_forward
    assert has_hooks(layer.conv)
