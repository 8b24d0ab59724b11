"""tools/benchmark.py: its command line, its sets of figures, and what it writes."""

import json
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _benchmark import measuring
from _benchmark.choosing import choose_runs
from _benchmark.drawing import bars, draw
from _benchmark.models import Variant, parse_arguments
from _benchmark.reporting import make_report, markdown, summarise
from _benchmark.sets import SETS, Figure, Set
from _benchmark.settings import Run, Settings

RESULTS = Path(__file__).resolve().parents[2] / 'results'
TINY = 'sknet26[layers=[1,1,1,1],cardinality=4,base_width=8,num_classes=10]'
THEIRS = 'torchvision:shufflenet_v2_x0_5[num_classes=10]'
TINY_PLAIN = 'resnet18[layers=[1,1,1,1],channels=[8,8,16,16],num_classes=10]'
SMALL = ['--size', '32', '--batch-size', '2', '--threads', '1']


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('benchmark')


@pytest.fixture
def clock(monkeypatch):
    """A CPU timer that runs a step once and then says what ``clock.seconds`` has next, by default 0.25 s a step."""
    clock = SimpleNamespace(seconds=[], steps=[])

    def timer(step, iterations):
        step()
        clock.steps.append((step, iterations))
        return clock.seconds.pop(0) if clock.seconds else 0.25 * iterations

    monkeypatch.setattr(measuring, 'cpu_timer', timer)
    return clock


FAULTS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from _benchmark import machine

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        [torch.ones(2**22) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

handed_back = faults()
assert not machine.describe_machine('cpu')['keeps_freed_memory']
machine.keep_freed_memory()
assert machine.describe_machine('cpu')['keeps_freed_memory']
faults()
print(handed_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries have no such switch')
@pytest.mark.slow
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
        ('sknet50:stub', ('sknet50', 'timm', '', False, False, True)),
        ('resnet50.a1_in1k:compile', ('resnet50.a1_in1k', 'timm', '', False, True)),
        ('torchvision:resnet50', ('resnet50', 'torchvision', '', False, False)),
        ('sknet50[sk_kwargs.reduction=32]:fuse', ('sknet50', 'timm', 'sk_kwargs.reduction=32', True, False)),
    ],
)
def test_variant(text, expected):
    variant = Variant.parse(text)
    assert variant == Variant(*expected)
    assert variant.label == text


def test_flags_go_for_every_model():
    assert Variant.parse('sknet50', fuse=True).label == 'sknet50:fuse'
    assert Variant.parse('sknet50:fuse', compile=True).label == 'sknet50:fuse:compile'


def test_model_arguments():
    text = 'num_classes=10,drop_rate=0.5,layers=[1,2,3],act_layer=silu,zero_init_last=False,sk_kwargs.split_input=true'
    assert parse_arguments(text + ',sk_kwargs.reduction=8,output_stride=None') == {
        'num_classes': 10,
        'drop_rate': 0.5,
        'layers': [1, 2, 3],
        'act_layer': 'silu',
        'zero_init_last': False,
        'sk_kwargs': {'split_input': True, 'reduction': 8},
        'output_stride': None,
    }
    assert parse_arguments('kernel_sizes=(3,5,7),a=1e,b=3)') == {'kernel_sizes': (3, 5, 7), 'a': '1e', 'b': '3)'}
    assert parse_arguments('') == {}


def test_model_arguments_reach_the_model():
    model = Variant.parse('sknet26[num_classes=7,sk_kwargs.select=sum]').build()
    assert model.fc.out_features == 7
    assert all(module.attn is None for module in model.modules() if hasattr(module, 'paths'))
    assert Variant.parse('torchvision:resnet18[num_classes=7]').build().fc.out_features == 7


# The command line


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['sknet51'], r"model='sknet51' is unknown to timm: did you mean .*sknet50"),
        (['torchvision:sknet50'], r"model='torchvision:sknet50' is unknown to torchvision"),
        (['sknet50:fast'], r"model='sknet50:fast' has ':fast': there are :fuse, :compile and :stub"),
        (['sknet50:stub:compile'], r"model='sknet50:stub:compile': :stub is for eager models"),
        (['sknet50:stub', '--compile'], r"model='sknet50:stub': :stub is for eager models"),
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
        (['--set', 'host', '--blank', '--threads', '-5'], r'--threads -5: must be at least 1'),
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


def test_stubs_are_for_a_cpu(tool, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with pytest.raises(ValueError, match=r"model='sknet26:stub': :stub stands for a GPU on a CPU, got --device cuda"):
        tool.main(['sknet26:stub', '--device', 'cuda'])


def test_a_model_that_does_not_run_is_named(tool, clock):
    with pytest.raises(ValueError, match=r"model='resnet18\[in_chans=1\]' in inference: .*channels"):
        tool.main(['resnet18[in_chans=1]', *SMALL])
    with pytest.raises(ValueError, match=r"model='resnet18\[num_classes=0,global_pool=\]' in training step: .*classes"):
        tool.main(['resnet18[num_classes=0,global_pool=]', '--mode', 'train', *SMALL])


def test_what_was_measured_is_kept_where_the_rest_fails(tool, clock, tmp_path):
    file = tmp_path / 'report.json'
    model = 'resnet18[num_classes=0,global_pool=]'
    with pytest.raises(ValueError, match='in training step'):
        tool.main([model, '--mode', 'both', '--json', str(file), *SMALL])
    (result,) = json.loads(file.read_text())['results']
    assert (result['model'], result['mode']) == (model, 'infer')


def test_the_command_needs_no_openmmlab_and_errs_in_one_line(tool, command):
    code = (
        'import runpy, sys\n'
        "sys.modules.update(dict.fromkeys(['mmengine', 'mmcv', 'mmpretrain', 'matplotlib']))\n"
        "sys.argv = ['benchmark.py', 'sknet51']\n"
        f'sys.path.insert(0, {str(Path(tool.__file__).parent)!r})\n'
        f"runpy.run_path({tool.__file__!r}, run_name='__main__')\n"
    )
    done = command(sys.executable, '-c', code, status=1)
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert error.startswith("benchmark.py: error: model='sknet51' is unknown to timm: did you mean ")
    assert hint == '(set SK_PLUGINS_TRACEBACK=1 for the traceback)'
    assert 'Traceback' not in done.stderr
    assert done.stdout == ''


def test_small_images_are_timed_too(tool):
    """On a CPU and for eager models, unless the images are small already."""
    args = tool.parse_args(['sknet26', '--mode', 'both'])
    eager, compiled = Variant.parse('sknet26'), Variant.parse('sknet26:compile')
    host = dict(batch_size=2, size=32, threads=1)
    assert choose_runs(args, [eager, compiled], Settings()) == {
        Run('infer'): [eager, compiled],
        Run('train'): [eager, compiled],
        Run('infer', **host): [eager],
        Run('train', **host): [eager],
    }
    big = {Run('infer'): [eager, compiled], Run('train'): [eager, compiled]}
    assert choose_runs(args, [eager, compiled], Settings(size=32)) == big
    assert choose_runs(args, [eager, compiled], Settings(device='cuda')) == big
    assert choose_runs(args, [compiled], Settings()) == {run: [compiled] for run in big}


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
    for quantity in ('python_calls', 'operator_calls'):
        assert train[quantity] > train_plain[quantity] > infer_plain[quantity] > 20
        assert train['ratios'][quantity]['median'] == train[quantity] / train_plain[quantity]
    assert infer['ways'] is not None
    assert sum(infer['ways'].values()) == 4
    assert infer_plain['ways'] is None
    assert f'| `{TINY}` | 600.0 | 16.7 % | 3.3 | 1.200 (spread 16.7 %) |\n' in printed
    assert f'| `{TINY_PLAIN}` | 500.0 | 0.0 % | 4.0 | 1 |\n' in printed
    calls = f'| {train["python_calls"]:,} ({train["ratios"]["python_calls"]["median"]:.2f}) |'
    assert calls in printed
    assert '## Inference' in printed
    assert '## Training step' in printed
    assert 'peak' not in printed  # a CPU has none
    assert 'CUDA' not in printed
    assert files['png'].read_bytes().startswith(b'\x89PNG')


@pytest.fixture
def tiny_set(monkeypatch):
    figures = (
        Figure('inference', 'infer', 'seconds', TINY, ((TINY_PLAIN, 0.8), None)),
        Figure('training step', 'train', 'seconds', TINY, ((TINY_PLAIN, 1.6), (THEIRS, None))),
        Figure('saved bytes', 'train', 'saved_mib', TINY, ((TINY_PLAIN, 1e-3), None)),
        Figure('peak memory', 'train', 'peak_mib', TINY, ((TINY_PLAIN, 0.75), (THEIRS, None))),
        Figure('Python calls', 'infer', 'python_calls', TINY, ((TINY_PLAIN, 99), None), batch_size=1, size=48),
        Figure('GPU path', 'train', 'seconds', f'{TINY}:stub', ((TINY_PLAIN, 0.75), (THEIRS, None))),
    )
    settings = Settings(batch_size=2, size=32, repeats=2, threads=1)
    tiny = Set('A tiny set', settings, TINY_PLAIN, ('`plain` = 1', 'theirs = 1'), figures)
    monkeypatch.setitem(SETS, 'standard', tiny)
    return tiny


def test_a_set(tool, clock, tiny_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measuring.gpu, 'HAS_TRITON', False)
    clock.seconds = [1, 1, *[0.9, 1.0] * 2, 1, 1, 1, *[1.5, 1.0, 3.0, 1.5, 1.0, 2.0]]
    file = tmp_path / 'set.json'
    tool.main(['--set', 'standard', '--json', str(file)])
    report = json.loads(file.read_text(encoding='utf-8'))
    rows = [(row['mode'], row['batch_size'], row['model']) for row in report['results']]
    three = [TINY, TINY_PLAIN, THEIRS]
    assert rows == [
        *(('infer', None, model) for model in three[:2]),
        *(('train', None, model) for model in [*three, f'{TINY}:stub']),
        *(('infer', 1, model) for model in three[:2]),
    ]
    assert [row['images_per_second'] for row in report['results'][-2:]] == [4, 4]
    saved = {row['model']: row['saved_mib'] for row in report['results'] if row['mode'] == 'train'}
    calls = {row['model']: row['python_calls'] for row in report['results'] if row['batch_size'] == 1}
    printed = capsys.readouterr().out
    assert printed.startswith(
        '# A tiny set\n\n'
        '|  | `plain` = 1 | theirs = 1 |\n'
        '| --- | --- | --- |\n'
        '| inference | **0.900** (spread 0.0 %, goal 0.80: missed) |  |\n'
        '| training step | **1.500** (spread 0.0 %, goal 1.60: met) | **0.625** (spread 20.0 %) |\n'
        f'| saved bytes | **{saved[TINY] / saved[TINY_PLAIN]:.3f}** (goal 0.00: missed) |  |\n'
        '| peak memory | not measured yet (goal 0.75) | not measured yet |\n'
        f'| Python calls | **{calls[TINY] / calls[TINY_PLAIN]:.3f}** (goal 99.00: met) |  |\n'
        '| GPU path | not available (goal 0.75) | not available |\n\n'
        'Batch 2, 32 x 32, float32, channels_last; medians of 2 interleaved repeats'
    )
    titles = [line for line in printed.splitlines() if line.startswith('## ')]
    assert titles == ['## Inference', '## Inference, batch 1, 48 x 48', '## Training step']
    assert f'\n- Not available (triton is not installed): `{TINY}:stub`.\n' in printed
    panels = bars(report)
    assert {title: [(bar.label, bar.ratio.median, bar.goal) for bar in panel] for title, panel in panels.items()} == {
        'plain = 1': [
            ('inference', 0.9, 0.8),
            ('training step', 1.5, 1.6),
            ('saved bytes', saved[TINY] / saved[TINY_PLAIN], 0.001),
            ('Python calls', calls[TINY] / calls[TINY_PLAIN], 99),
        ],
        'theirs = 1': [('training step', 0.625, None)],
    }


def test_a_model_that_fails_costs_a_set_no_other(tool, clock, tiny_set, tmp_path, capsys, monkeypatch):
    train_step = measuring.train_step

    def failing(model, *args):
        if type(model).__name__ == 'ShuffleNetV2':
            raise RuntimeError('out of memory')
        return train_step(model, *args)

    monkeypatch.setattr(measuring, 'train_step', failing)
    monkeypatch.setitem(SETS, 'standard', replace(tiny_set, figures=tiny_set.figures[:2]))
    file = tmp_path / 'set.json'
    why = f"model='{THEIRS}' in training step: out of memory"
    with pytest.raises(ValueError, match='not measured') as error:
        tool.main(['--set', 'standard', '--json', str(file)])
    assert str(error.value) == f'not measured, as the report says: {why}'
    printed = capsys.readouterr().out
    assert '| training step | **1.000** (spread 0.0 %, goal 1.60: met) | not available |' in printed
    assert f'- Not available ({why}): `{THEIRS}`.' in printed
    report = json.loads(file.read_text(encoding='utf-8'))
    assert [bool(row['samples']) for row in report['results']] == [True, True, True, True, False]
    # What fails once the times are known costs none of them. Compilers have errors that are no RuntimeError.
    monkeypatch.setattr(measuring, 'train_step', train_step)
    count = measuring.count

    def failing_count(task, *args):
        if task.result.model == TINY and task.result.run.mode == 'train':
            raise ArithmeticError('of a compiler')
        count(task, *args)

    monkeypatch.setattr(measuring, 'count', failing_count)
    with pytest.raises(ValueError, match=re.escape(f'{TINY!r} in training step: ArithmeticError: of a compiler')):
        tool.main(['--set', 'standard', '--json', str(file)])
    report = json.loads(file.read_text(encoding='utf-8'))
    assert all(row['samples'] for row in report['results'])
    assert [row['python_calls'] is None for row in report['results']] == [False, False, True, False, False]
    monkeypatch.setattr(measuring, 'train_step', failing)
    # One that was asked for by name is an error, as ever.
    with pytest.raises(ValueError, match='out of memory'):
        tool.main([THEIRS, '--mode', 'train', *SMALL, '--json', str(tmp_path / 'none.json')])
    assert not (tmp_path / 'none.json').exists()


def test_a_sets_settings_can_be_overridden(tool, clock, tiny_set, capsys, monkeypatch):
    # Training in bfloat16 takes seconds on a CPU without it.
    monkeypatch.setitem(SETS, 'standard', replace(tiny_set, figures=tiny_set.figures[:1]))
    tool.main(['--set', 'standard', '--repeats', '1', '--batch-size', '3', '--dtype', 'bfloat16'])
    printed = capsys.readouterr().out
    assert 'Batch 3, 32 x 32, bfloat16 autocast, channels_last; medians of 1 interleaved repeats' in printed
    assert '| inference | **1.000** (goal 0.80: missed) |  |' in printed  # one repeat has no spread


def test_nothing_is_filled_in(tool, clock, capsys):
    tool.main(['--set', 'gpu', '--blank'])
    printed = capsys.readouterr().out
    assert not clock.steps
    assert '| training step, eager | not measured yet (goal 0.45) | not measured yet (goal 1.05) |' in printed
    assert '| inference as a CUDA graph | not measured yet | not measured yet |' in printed
    compared = [cell for figure in SETS['gpu'].figures for cell in figure.against if cell is not None]
    assert printed.count('not measured yet') == len(compared) > 40
    assert 'Batch 128, 224 x 224, bfloat16 autocast, channels_last' in printed
    assert 'Measured on no machine so far.' in printed


def test_plot_of_nothing(tmp_path):
    pytest.importorskip('matplotlib')

    chosen = SETS['gpu']
    report = make_report(chosen.title, chosen.settings, [], chosen.baseline, None, chosen)
    draw(report, tmp_path / 'blank.svg')
    assert '<svg' in (tmp_path / 'blank.svg').read_text(encoding='utf-8')


def test_the_sets_are_the_figures_to_show():
    def goals(name):
        found = {f.label: tuple(cell and cell[1] for cell in f.against) for f in SETS[name].figures}
        return {label: goals for label, goals in found.items() if any(goals)}

    def runs(name):
        return {run: [variant.label for variant in variants] for run, variants in SETS[name].runs().items()}

    assert goals('standard') == {
        'eager inference, unfused': (0.66, 1.20),
        'eager inference, `fuse` on both': (None, 1.15),
        'compiled inference': (0.95, 1.10),
        'training step, eager': (0.80, 1.20),
        'bytes saved for backward': (0.76, 1.13),
    }
    assert goals('host') == {
        'Python calls, inference, GPU path': (1.0, 1.3),
        'Python calls, training step, GPU path': (1.0, 1.3),
    }
    assert goals('gpu') == {
        'training step, eager': (0.45, 1.05),
        'training step, compiled': (0.75, 1.30),
        'inference, eager': (0.40, 1.25),
        'inference, compiled': (0.85, 1.25),
        'inference, batch 1, eager': (0.80, 1.50),
        'peak memory of a training step, eager': (0.72, 1.08),
        'host time of a training step, eager, 4 x 64 x 64': (0.60, 1.20),
    }
    three = ['sknet50', 'skresnext50_32x4d', 'resnext50_32x4d']
    compiled = [f'{name}:compile' for name in three]
    plain, triton = (f'sknet50[sk_kwargs.backend={backend}]' for backend in ('plain', 'triton'))
    host = dict(batch_size=2, size=32, threads=1)
    assert runs('standard') == {
        Run('infer'): [*three, 'sknet50:fuse', 'resnext50_32x4d:fuse', *compiled],
        Run('train'): three,
        Run('infer', **host): three,
        Run('train', **host): three,
    }
    all_paths = ['sknet50:stub', *three[1:], 'sknet50', plain]
    assert runs('host') == {Run('infer'): all_paths, Run('train'): all_paths}
    eager_and_compiled = [*three, plain, *compiled, f'{plain}:compile', f'{triton}:compile']
    assert runs('gpu') == {
        Run('train'): eager_and_compiled,
        Run('infer'): [*three, plain, 'sknet50:fuse', 'resnext50_32x4d:fuse', *eager_and_compiled[4:]],
        Run('infer', batch_size=1): [*three, plain],
        Run('infer', batch_size=8): [*three, plain],
        Run('train', batch_size=4, size=64): three,
        Run('infer', batch_size=4, size=64): three,
    }
    assert SETS['standard'].settings == Settings('cpu', 'float32', 'channels_last', 8, 224, threads=2)
    assert SETS['host'].settings == Settings('cpu', 'float32', 'channels_last', 2, 32, threads=1)
    assert SETS['gpu'].settings == Settings('cuda', 'bfloat16', 'channels_last', 128, 224)


@pytest.mark.parametrize(('name', 'chosen'), [('cpu', 'standard'), ('gpu', 'gpu'), ('host', 'host')])
def test_results_are_what_was_measured(name, chosen):
    """results/*.md is made of results/*.json, or says that nothing was measured."""
    chosen = SETS[chosen]
    file = RESULTS / f'benchmark_{name}.json'
    if file.exists():
        report = json.loads(file.read_text(encoding='utf-8'))
        assert report['settings']['device'] == chosen.settings.device
        for row in report['results']:
            if row.get('unavailable') is None:
                assert len(row['samples']) == report['settings']['repeats']
                assert row['seconds'] == pytest.approx(summarise(row['samples']).median)
    else:
        report = make_report(chosen.title, chosen.settings, [], chosen.baseline, None, chosen)
    assert (RESULTS / f'benchmark_{name}.md').read_text(encoding='utf-8') == markdown(report)
