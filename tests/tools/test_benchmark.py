"""tools/benchmark.py: timing with a clock of our own, saved bytes counted by hand, and what is written."""

import copy
import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tolerances import tolerance
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

RESULTS = Path(__file__).resolve().parents[2] / 'results'
TINY = 'sknet26[layers=[1,1,1,1],cardinality=4,base_width=8,num_classes=10]'
THEIRS = 'torchvision:shufflenet_v2_x0_5[num_classes=10]'
TINY_PLAIN = 'resnet18[layers=[1,1,1,1],channels=[8,8,16,16],num_classes=10]'
SMALL = ['--size', '32', '--batch-size', '2', '--threads', '1']


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('benchmark')


@pytest.fixture
def clock(tool, monkeypatch):
    """A CPU timer that runs a step once and then says what ``clock.seconds`` has next, by default 0.25 s a step."""
    clock = SimpleNamespace(seconds=[], steps=[])

    def timer(step, iterations):
        step()
        clock.steps.append((step, iterations))
        return clock.seconds.pop(0) if clock.seconds else 0.25 * iterations

    monkeypatch.setattr(tool, 'cpu_timer', timer)
    return clock


# What the process is like


FAULTS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import benchmark, torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        [torch.ones(2**22) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

handed_back = faults()
assert not benchmark.describe_machine('cpu')['keeps_freed_memory']
benchmark.keep_freed_memory()
assert benchmark.describe_machine('cpu')['keeps_freed_memory']
faults()
print(handed_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries have no such switch')
def test_freed_memory_is_kept(tool):
    command = [sys.executable, '-c', FAULTS, str(Path(tool.__file__).parent)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    handed_back, kept = map(int, output.split())
    assert handed_back > 1000  # for 256 MiB: tens of thousands of pages of 4 KiB, fewer of larger ones
    assert kept < 100


# The models' names


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('sknet50', ('sknet50', 'timm', '', False, False)),
        ('sknet50:fuse', ('sknet50', 'timm', '', True, False)),
        ('sknet50:fuse:compile', ('sknet50', 'timm', '', True, True)),
        ('resnet50.a1_in1k:compile', ('resnet50.a1_in1k', 'timm', '', False, True)),
        ('torchvision:resnet50', ('resnet50', 'torchvision', '', False, False)),
        ('sknet50[sk_kwargs.reduction=32]:fuse', ('sknet50', 'timm', 'sk_kwargs.reduction=32', True, False)),
    ],
)
def test_variant(tool, text, expected):
    variant = tool.Variant.parse(text)
    assert variant == tool.Variant(*expected)
    assert variant.label == text


def test_flags_go_for_every_model(tool):
    assert tool.Variant.parse('sknet50', fuse=True).label == 'sknet50:fuse'
    assert tool.Variant.parse('sknet50:fuse', compile=True).label == 'sknet50:fuse:compile'


def test_model_arguments(tool):
    text = 'num_classes=10,drop_rate=0.5,layers=[1,2,3],act_layer=silu,zero_init_last=False,sk_kwargs.split_input=true'
    assert tool.parse_arguments(text + ',sk_kwargs.reduction=8,output_stride=None') == {
        'num_classes': 10,
        'drop_rate': 0.5,
        'layers': [1, 2, 3],
        'act_layer': 'silu',
        'zero_init_last': False,
        'sk_kwargs': {'split_input': True, 'reduction': 8},
        'output_stride': None,
    }
    assert tool.parse_arguments('kernel_sizes=(3,5,7),a=1e,b=3)') == {'kernel_sizes': (3, 5, 7), 'a': '1e', 'b': '3)'}
    assert tool.parse_arguments('') == {}


def test_model_arguments_reach_the_model(tool):
    model = tool.Variant.parse('sknet26[num_classes=7,sk_kwargs.select=sum]').build()
    assert model.fc.out_features == 7
    assert all(module.attn is None for module in model.modules() if hasattr(module, 'paths'))
    assert tool.Variant.parse('torchvision:resnet18[num_classes=7]').build().fc.out_features == 7


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['sknet51'], r"model='sknet51' is unknown to timm: did you mean .*sknet50"),
        (['torchvision:sknet50'], r"model='torchvision:sknet50' is unknown to torchvision"),
        (['sknet50:fast'], r"model='sknet50:fast' has ':fast': there are :fuse and :compile"),
        (['sknet50[reduction]'], r"model argument 'reduction' is not of the form key=value"),
        (['sknet50[a=1,a.b=2]'], r"model argument 'a.b=2': a already has a value"),
        (['sk net'], r"model='sk net' is not of the form"),
        (['sknet26[colour=3]'], r"model='sknet26\[colour=3\]' cannot be built: .*colour"),
        (['sknet26[sk_kwargs.groups=7]'], r'cannot be built: .*groups'),
        (['sknet26', 'sknet26'], r"model='sknet26' is given twice"),
        (['sknet26', '--baseline', 'sknet50'], r'--baseline sknet50 is not one of the models: sknet26'),
        (['sknet26:fuse', '--mode', 'train'], r"model='sknet26:fuse': fuse is for inference, got --mode train"),
        (['sknet26', '--fuse', '--mode', 'both'], r'fuse is for inference, got --mode both'),
        (['sknet26', '--repeats', '0'], r'--repeats 0: must be at least 1'),
        (['sknet26', '--batch-size', '0'], r'--batch-size 0: must be at least 1'),
        (['sknet26', '--threads', '-1'], r'--threads -1: must be at least 1'),
        (['sknet26', '--size', '0'], r'--size 0: must be at least 1'),
        (['sknet26', '--mode', 'train', '--batch-size', '1'], r'--batch-size 1: a training step needs two images'),
        (['sknet26', '--plot', 'plot.txt'], r'--plot plot.txt: the name must end in .png, .svg or .pdf'),
        (['sknet26', '--json', '.'], r'\. is a folder'),
        (['sknet26', '--set', 'standard'], r'--set standard brings its own models and modes: leave models out'),
        (['--set', 'standard', '--compile'], r'--set standard brings its own .* leave --compile out'),
        (['sknet26', '--blank'], r'--blank is for a --set'),
        ([], r'name the models to compare, or a --set of them'),
    ],
)
def test_bad_arguments(tool, clock, arguments, message):
    with pytest.raises(ValueError, match=message):
        tool.main(arguments)
    assert not clock.steps


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize('arguments', [['sknet26', '--device', 'cuda'], ['--set', 'gpu']])
def test_a_gpu_that_is_not_there(tool, arguments):
    with pytest.raises(ValueError, match=r'--device cuda: torch finds no CUDA device'):
        tool.main(arguments)


def test_a_model_that_does_not_run_is_named(tool, clock):
    with pytest.raises(ValueError, match=r"model='resnet18\[in_chans=1\]' in inference: .*channels"):
        tool.main(['resnet18[in_chans=1]', *SMALL])
    with pytest.raises(ValueError, match=r"model='resnet18\[num_classes=0,global_pool=\]' in training step: .*classes"):
        tool.main(['resnet18[num_classes=0,global_pool=]', '--mode', 'train', *SMALL])


def test_the_command_needs_no_openmmlab_and_errs_in_one_line(tool, command):
    code = (
        'import runpy, sys\n'
        "sys.modules.update(dict.fromkeys(['mmengine', 'mmcv', 'mmpretrain', 'matplotlib']))\n"
        "sys.argv = ['tools/benchmark.py', 'sknet51']\n"
        f"runpy.run_path({tool.__file__!r}, run_name='__main__')\n"
    )
    done = command(sys.executable, '-c', code, status=1)
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert error.startswith("benchmark.py: error: model='sknet51' is unknown to timm: did you mean ")
    assert hint == '(set SK_PLUGINS_TRACEBACK=1 for the traceback)'
    assert 'Traceback' not in done.stderr
    assert done.stdout == ''


# Time


def test_repeats_are_interleaved(tool):
    calls = []

    def timer(step, iterations):
        calls.append((step, iterations))
        return {'A': 0.125, 'B': 2.0, 'C': 1e-6}[step] * iterations

    samples = tool.interleave('ABC', 3, timer, min_seconds=0.5)
    # One round to see how long each takes, then A B C A B C A B C, each for half a second but no more than 100 times.
    assert calls == [('A', 1), ('B', 1), ('C', 1)] + 3 * [('A', 4), ('B', 1), ('C', 100)]
    assert samples == [[0.125] * 3, [2.0] * 3, [pytest.approx(1e-6)] * 3]


def test_cpu_timer_runs_all_iterations(tool, monkeypatch):
    now = iter([10.0, 17.5])
    monkeypatch.setattr(tool.time, 'perf_counter', lambda: next(now))
    ran = []
    assert tool.cpu_timer(lambda: ran.append(1), 5) == 7.5
    assert len(ran) == 5


def test_median_and_spread(tool):
    found = tool.summarise([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    assert found.spread == pytest.approx(100 * 2 / 3)
    assert tool.summarise([2.0]) == tool.Ratio(2.0)
    assert tool.summarise([2.0]).spread is None


def test_ratios_are_taken_within_a_repeat(tool):
    # The machine is twice as slow in the second repeat and ten times in the third: the ratio is 0.5 all the same.
    ours = tool.Result('infer', 'ours', [1.0, 2.0, 10.0, 0.6])
    theirs = tool.Result('infer', 'theirs', [2.0, 4.0, 20.0, 1.0])
    found = tool.ratio(ours, theirs)
    assert (found.median, found.low, found.high) == (0.5, 0.5, pytest.approx(0.525))
    assert found.spread == pytest.approx(5)
    assert tool.ratio(ours, None) is None


def test_ratios_of_memory(tool):
    ours = tool.Result('train', 'ours', saved_mib=120.0)
    assert tool.ratio(ours, tool.Result('train', 'theirs', saved_mib=160.0), 'saved_mib') == tool.Ratio(0.75)
    assert tool.ratio(ours, tool.Result('train', 'theirs', peak_mib=160.0), 'peak_mib') is None


def test_infer_step(tool):
    seen = []
    model = nn.Linear(3, 2)
    model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    tool.infer_step(model, torch.ones(1, 3), tool.Settings())()
    tool.infer_step(model, torch.ones(1, 3), tool.Settings(dtype='bfloat16'))()
    assert [output.dtype for output in seen] == [torch.float32, torch.bfloat16]
    assert all(output.is_inference() for output in seen)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_train_step_is_a_step_of_sgd(tool, dtype):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    reference = copy.deepcopy(model)
    images = torch.randn(4, 6)
    before = model.weight.detach().clone()
    step = tool.train_step(model, images, tool.Settings(dtype=dtype))
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        step()
        nn.functional.cross_entropy(reference(images), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (model.weight - before).abs().max()
    assert moved > 0
    # Sums of six products and four images round in the low precision, and so does what is added to the weight.
    explained = (
        tolerance(getattr(torch, dtype), length=10) * moved + tolerance(torch.float32) * model.weight.abs().max()
    )
    assert (model.weight - reference.weight).abs().max() <= explained
    assert model.weight.grad is None


def test_residual_branches_are_woken(tool):
    model = tool.Variant.parse(TINY).build()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    asleep = [norm for norm in norms if not norm.weight.any()]
    tool._wake_residual_branches(model)
    assert all(norm.weight.eq(0.2 if norm in asleep else 1).all() for norm in norms)
    plain = tool.Variant.parse(TINY_PLAIN).build()  # timm's start at zero
    assert not plain.layer1[0].bn2.weight.any()
    tool._wake_residual_branches(plain)
    assert plain.layer1[0].bn2.weight.eq(0.2).all()


def test_measure(tool, clock, monkeypatch):
    built = []
    monkeypatch.setattr(tool, 'infer_step', lambda model, *_: built.append(model) or (lambda: None))
    settings = tool.Settings(batch_size=2, size=32, repeats=3, threads=1)
    clock.seconds = [0.1, 0.2, 0.5, *[1.0, 2.0, 4.0] * 3]
    labels = [TINY, f'{TINY}:fuse', f'{TINY}:compile']
    results = tool.measure([tool.Variant.parse(label) for label in labels], 'infer', settings)
    assert [result.model for result in results] == labels
    # 5, 3 and 1 iterations last half a second.
    assert [result.seconds for result in results] == pytest.approx([1 / 5, 2 / 3, 4])
    assert all(result.saved_mib is None and result.peak_mib is None for result in results)
    plain, fused, compiled = built
    assert any(isinstance(module, _BatchNorm) for module in plain.modules())
    assert not any(isinstance(module, _BatchNorm) for module in fused.modules())
    assert isinstance(compiled, torch._dynamo.eval_frame.OptimizedModule)
    for model in built:
        assert not model.training
        assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_environment_is_put_back(tool, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    threads = torch.get_num_threads()
    limit = torch._dynamo.config.recompile_limit
    with tool._environment(tool.Settings(threads=threads + 1)):
        assert torch.get_num_threads() == threads + 1
        assert torch.backends.cudnn.benchmark
        # Past the limit torch would time the eager model in the compiled one's place.
        assert torch._dynamo.config.recompile_limit == 64
        assert torch._dynamo.config.fail_on_recompile_limit_hit
    assert torch.get_num_threads() == threads
    assert not torch.backends.cudnn.benchmark
    assert torch._dynamo.config.recompile_limit == limit


# Bytes


class Shared(nn.Module):
    """What autograd keeps, by hand: the input, the ReLU's output once for its two readers, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4, bias=False), nn.Linear(4, 5, bias=False)
        self.register_buffer('scale', torch.full((4,), 2.0))

    def forward(self, x):
        hidden = self.first(x.flatten(1)).relu() * self.scale.sqrt().detach()
        torch.exp(hidden)  # keeps its output, but its graph is gone before the forward pass ends
        return self.second(hidden)


def test_saved_bytes_of_a_small_network(tool):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    images = torch.randn(2, 3, 8, 8)
    # The images, the convolution's output for the norm, the ReLU's output, which is also the linear layer's input,
    # and the norm's mean and inverse deviation.
    expected = 4 * (2 * 3 * 64 + 2 * 4 * 64 + 2 * 4 * 64 + 4 + 4)
    assert tool.saved_bytes(model, images) == expected
    # As views of a larger batch the images keep all of its storage.
    assert tool.saved_bytes(model, torch.randn(6, 3, 8, 8)[2:4]) == expected + 4 * 4 * 3 * 64


def test_saved_bytes_are_those_at_the_end_of_the_forward_pass(tool):
    # The images, the ReLU's output, the scale's root, and the product, which the last layer reads.
    assert tool.saved_bytes(Shared(), torch.randn(3, 6, 1, 1)) == 4 * (3 * 6 + 3 * 4 + 4 + 3 * 4)


def test_saved_bytes_per_image(tool):
    settings = tool.Settings(size=8, memory_format='contiguous')
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    # The image, five log-probabilities, and the label, an int64.
    assert tool.saved_mib_per_image(model, settings) * 2**20 == 4 * 192 + 4 * 5 + 8
    # bfloat16's copies of the image and of the weights are kept; only the former grows with the batch.
    settings = tool.Settings(size=8, memory_format='contiguous', dtype='bfloat16')
    assert tool.saved_mib_per_image(model, settings) * 2**20 == 2 * 192 + 4 * 5 + 8


def test_sknet50_keeps_as_little_as_the_set_asks_for(tool):
    # This figure needs no quiet machine, and the ratios hardly depend on the size.
    (figure,) = [figure for figure in tool.SETS['standard'].figures if figure.quantity == 'saved_mib']
    saved = {
        model: tool.saved_mib_per_image(tool.Variant.parse(model).build().train(), tool.Settings(size=64))
        for model in figure.models()
    }
    for model, goal in figure.against:
        assert saved['sknet50'] / saved[model] <= goal
    assert saved['skresnext50_32x4d'] / saved['resnext50_32x4d'] == pytest.approx(1.5, abs=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu(tool):
    settings = tool.Settings(device='cuda', dtype='bfloat16', batch_size=8, size=64, repeats=2, min_seconds=0)
    once, again = tool.measure([tool.Variant.parse(TINY), tool.Variant.parse(TINY_PLAIN)], 'train', settings)
    [alone] = tool.measure([tool.Variant.parse(TINY_PLAIN)], 'train', settings)
    assert once.seconds > 0
    # What the first model holds isn't counted as the second's.
    assert again.peak_mib == pytest.approx(alone.peak_mib, rel=0.05)
    assert once.peak_mib > again.peak_mib > again.saved_mib * 8


# What is written


def test_the_command_writes_what_it_measured(tool, clock, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    files = {kind: tmp_path / 'new' / f'out.{kind}' for kind in ('json', 'md', 'png')}
    arguments = [TINY, TINY_PLAIN, '--baseline', TINY_PLAIN, '--mode', 'both', '--repeats', '3', *SMALL]
    arguments += ['--json', str(files['json']), '--markdown', str(files['md']), '--plot', str(files['png'])]
    # Two warm-up rounds and three repeats of two models, for inference and for training.
    clock.seconds = [1, 1, *[0.6, 0.5, 0.5, 0.5, 0.7, 0.5], 1, 1, *[1.5, 1.0] * 3]
    tool.main(arguments)
    printed = capsys.readouterr().out
    assert files['md'].read_text(encoding='utf-8') == printed
    report = json.loads(files['json'].read_text(encoding='utf-8'))
    assert report['baseline'] == TINY_PLAIN
    assert report['settings'] == {
        'device': 'cpu',
        'dtype': 'float32',
        'memory_format': 'channels_last',
        'batch_size': 2,
        'size': 32,
        'repeats': 3,
        'threads': 1,
        'min_seconds': 0.5,
    }
    assert report['machine']['torch'] == torch.__version__
    assert report['machine']['threads'] == 1
    assert report['machine']['gpu'] is None
    assert report['machine']['cores'] >= 1
    assert report['machine']['cpu']
    infer, infer_plain, train, train_plain = report['results']
    assert [row['mode'] for row in report['results']] == ['infer', 'infer', 'train', 'train']
    assert infer['samples'] == [0.6, 0.5, 0.7]
    assert infer['seconds'] == 0.6
    assert infer['images_per_second'] == pytest.approx(2 / 0.6)
    assert infer['ratios']['seconds'] == pytest.approx(
        {'median': 1.2, 'low': 1.1, 'high': 1.3, 'spread_percent': 100 / 6}
    )
    assert infer_plain['ratios']['seconds']['median'] == 1
    assert train['ratios']['seconds']['median'] == 1.5
    assert train['ratios']['saved_mib']['median'] == train['saved_mib'] / train_plain['saved_mib']
    assert train['ratios']['peak_mib'] is None
    assert f'| `{TINY}` | 600.0 | 16.7 % | 3.3 | 1.200 (spread 16.7 %) |\n' in printed
    assert f'| `{TINY_PLAIN}` | 500.0 | 0.0 % | 4.0 | 1 |\n' in printed
    assert '## Inference' in printed
    assert '## Training step' in printed
    assert 'peak' not in printed  # a CPU has none
    assert tool.markdown(report) == printed
    assert files['png'].read_bytes().startswith(b'\x89PNG')


@pytest.fixture
def tiny_set(tool, monkeypatch):
    figures = (
        tool.Figure('inference', 'infer', 'seconds', TINY, ((TINY_PLAIN, 0.8), None)),
        tool.Figure('training step', 'train', 'seconds', TINY, ((TINY_PLAIN, 1.6), (THEIRS, None))),
        tool.Figure('saved bytes', 'train', 'saved_mib', TINY, ((TINY_PLAIN, 1e-3), None)),
        tool.Figure('peak memory', 'train', 'peak_mib', TINY, ((TINY_PLAIN, 0.75), (THEIRS, None))),
    )
    settings = tool.Settings(batch_size=2, size=32, repeats=2, threads=1)
    tiny = tool.Set('A tiny set', settings, TINY_PLAIN, ('`plain` = 1', 'theirs = 1'), figures)
    monkeypatch.setitem(tool.SETS, 'standard', tiny)
    return tiny


def test_a_set(tool, clock, tiny_set, tmp_path, capsys):
    clock.seconds = [1, 1, *[0.9, 1.0] * 2, 1, 1, 1, *[1.5, 1.0, 3.0, 1.5, 1.0, 2.0]]
    file = tmp_path / 'set.json'
    tool.main(['--set', 'standard', '--json', str(file)])
    report = json.loads(file.read_text(encoding='utf-8'))
    rows = [(row['mode'], row['model']) for row in report['results']]
    three = [TINY, TINY_PLAIN, THEIRS]
    assert rows == [('infer', model) for model in three[:2]] + [('train', model) for model in three]
    saved = {row['model']: row['saved_mib'] for row in report['results'] if row['mode'] == 'train'}
    assert capsys.readouterr().out.startswith(
        '# A tiny set\n\n'
        '|  | `plain` = 1 | theirs = 1 |\n'
        '| --- | --- | --- |\n'
        '| inference | **0.900** (spread 0.0 %, goal 0.80: missed) |  |\n'
        '| training step | **1.500** (spread 0.0 %, goal 1.60: met) | **0.625** (spread 20.0 %) |\n'
        f'| saved bytes | **{saved[TINY] / saved[TINY_PLAIN]:.3f}** (goal 0.00: missed) |  |\n'
        '| peak memory | not measured yet (goal 0.75) | not measured yet |\n\n'
        'Batch 2, 32 x 32, float32, channels_last; medians of 2 interleaved repeats'
    )
    panels = tool.bars(report)
    assert {title: [(bar.label, bar.ratio.median, bar.goal) for bar in panel] for title, panel in panels.items()} == {
        'plain = 1': [
            ('inference', 0.9, 0.8),
            ('training step', 1.5, 1.6),
            ('saved bytes', saved[TINY] / saved[TINY_PLAIN], 0.001),
        ],
        'theirs = 1': [('training step', 0.625, None)],
    }


def test_a_sets_settings_can_be_overridden(tool, clock, tiny_set, capsys):
    tool.main(['--set', 'standard', '--repeats', '1', '--batch-size', '3', '--dtype', 'bfloat16'])
    printed = capsys.readouterr().out
    assert 'Batch 3, 32 x 32, bfloat16 autocast, channels_last; medians of 1 interleaved repeats' in printed
    assert '| inference | **1.000** (goal 0.80: missed) |  |' in printed  # one repeat has no spread


def test_nothing_is_filled_in(tool, clock, capsys):
    tool.main(['--set', 'gpu', '--blank'])
    printed = capsys.readouterr().out
    assert not clock.steps
    assert '| training step, eager | not measured yet (goal 0.65) | not measured yet |' in printed
    assert '| inference, compiled | not measured yet | not measured yet |' in printed
    assert printed.count('not measured yet') == 2 * len(tool.SETS['gpu'].figures)
    assert 'Batch 128, 224 x 224, bfloat16 autocast, channels_last' in printed
    assert 'Measured on no machine so far.' in printed


def test_plot_of_nothing(tool, tmp_path):
    pytest.importorskip('matplotlib')
    chosen = tool.SETS['gpu']
    report = tool.make_report(chosen.title, chosen.settings, [], chosen.baseline, None, chosen)
    tool.draw(report, tmp_path / 'blank.svg')
    assert '<svg' in (tmp_path / 'blank.svg').read_text(encoding='utf-8')


def test_the_sets_are_the_figures_to_show(tool):
    standard, gpu = tool.SETS['standard'], tool.SETS['gpu']

    def goals(chosen):
        return {figure.label: tuple(cell and cell[1] for cell in figure.against) for figure in chosen.figures}

    assert goals(standard) == {
        'eager inference, unfused': (0.66, 1.20),
        'eager inference, `fuse` on both': (None, 1.15),
        'compiled inference': (0.95, 1.10),
        'training step, eager': (0.80, 1.20),
        'bytes saved for backward': (0.76, 1.13),
    }
    assert goals(gpu) == {
        'training step, eager': (0.65, None),
        'training step, compiled': (0.95, None),
        'inference, eager': (0.55, None),
        'inference, compiled': (None, None),
        'peak memory of a training step, eager': (0.75, None),
        'peak memory of a training step, compiled': (None, None),
    }
    three = ['sknet50', 'skresnext50_32x4d', 'resnext50_32x4d']
    compiled = [f'{name}:compile' for name in three]
    runs = {mode: [variant.label for variant in variants] for mode, variants in standard.runs().items()}
    assert runs == {'infer': [*three, 'sknet50:fuse', 'resnext50_32x4d:fuse', *compiled], 'train': three}
    runs = {mode: [variant.label for variant in variants] for mode, variants in gpu.runs().items()}
    assert runs == {'train': three + compiled, 'infer': three + compiled}
    assert standard.settings == tool.Settings('cpu', 'float32', 'channels_last', 8, 224, threads=2)
    assert gpu.settings == tool.Settings('cuda', 'bfloat16', 'channels_last', 128, 224)


@pytest.mark.parametrize('name', ['cpu', 'gpu'])
def test_results_are_what_was_measured(tool, name):
    """results/*.md is made of results/*.json, or says that nothing was measured."""
    chosen = tool.SETS['gpu' if name == 'gpu' else 'standard']
    file = RESULTS / f'benchmark_{name}.json'
    if file.exists():
        report = json.loads(file.read_text(encoding='utf-8'))
        assert report['settings']['device'] == chosen.settings.device
        for row in report['results']:
            assert len(row['samples']) == report['settings']['repeats']
            assert row['seconds'] == pytest.approx(tool.summarise(row['samples']).median)
    else:
        report = tool.make_report(chosen.title, chosen.settings, [], chosen.baseline, None, chosen)
    assert (RESULTS / f'benchmark_{name}.md').read_text(encoding='utf-8') == tool.markdown(report)


def test_readme_shows_the_figures(tool):
    """`make bench` writes results/; the table in README.md is copied from there."""
    report = json.loads((RESULTS / 'benchmark_cpu.json').read_text(encoding='utf-8'))
    readme = (RESULTS.parent / 'README.md').read_text(encoding='utf-8')
    assert tool.figures_table(report) in readme, 'copy the first table of results/benchmark_cpu.md into README.md'
