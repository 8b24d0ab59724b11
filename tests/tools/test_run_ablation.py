"""tools/run_ablation.py: runs of a few steps on a small set of garments, and rows whose statistics are known."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import timm
import torch
from _ablation import data as canvases
from _ablation import running, timing
from _ablation.attention import differences, measure_attention, replaced_attention
from _ablation.claims import CLAIMS
from _ablation.data import DATA, Data
from _ablation.measuring import logits_of, measure
from _ablation.networks import CORE, NETWORKS, SELECTED, cost, initialise
from _ablation.rows import LENGTHS, Run, Settings, append_row, check_same_settings, find, read_rows
from _ablation.running import plan, plan_variance
from _ablation.together import Alone, Together
from _ablation.training import fit, rate
from helpers.small_fashion_mnist import write_blots
from helpers.tolerances import assert_close
from scipy.stats import spearmanr

from sk_plugins import __version__ as sk_version
from sk_plugins._resources import ROOT
from sk_plugins.analysis import sk_units

pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning:mmpretrain'),
    pytest.mark.filterwarnings('ignore:The given NumPy array is not writable:UserWarning'),
    # functorch's, of the last pooling, which is a thousandth of the work.
    pytest.mark.filterwarnings('ignore:There is a performance drop because:UserWarning'),
]

SHORT = ('--train-images', '32', '--batch-size', '8', '--epochs', '1', '--test-images', '24')
ONE_PLACE = ('--sets', 'scaled', '--sizes', 'narrow')
TINY = Settings(32, 1, 24, 8)


@pytest.fixture(scope='module')
def tool(load_tool):
    yield load_tool('run_ablation')
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope='module')
def garments(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvases, 'BACKGROUNDS', 16)
        yield write_blots(tmp_path_factory.mktemp('garments') / 'fashion_mnist')


@pytest.fixture(scope='module')
def data(garments):
    return Data(Path(garments), TINY)


def command_line(garments, folder, networks, seeds=('0',)):
    places = ['--data', garments, '--out', str(folder / 'out'), '--page', str(folder / 'page.md')]
    return [*places, *SHORT, *ONE_PLACE, '--networks', *networks, '--seeds', *seeds]


@pytest.fixture(scope='module')
def finished(tool, garments, tmp_path_factory):
    """The folder of K3 and of SELECTED, which is trained for twice as long too. Not to be written into."""
    folder = tmp_path_factory.mktemp('finished')
    tool.main(command_line(garments, folder, ('k3', SELECTED)))
    return folder


def runs_of(path):
    return [Run.of(row) for row in read_rows(path)]


# The networks


@pytest.mark.parametrize('size', ['narrow', pytest.param('wide', marks=pytest.mark.slow)])
def test_networks_cost_as_much(size):
    if size == 'narrow':
        assert cost(SELECTED) == (68_382, pytest.approx(2.572, abs=0.001))
    for name, allowed in (('wider', 0.02), ('se', 0.01), ('deeper', 0.05)):
        for ours, selected in zip(cost(name, size), cost(SELECTED, size)):
            assert ours == pytest.approx(selected, rel=allowed), name


@pytest.mark.slow
def test_every_network_runs():
    for size in ('narrow', 'wide'):
        for name in NETWORKS:
            with torch.inference_mode():
                assert initialise(name, size, 0).eval()(torch.randn(2, 1, 64, 64)).shape == (2, 10)


def test_shared_tensors_begin_alike():
    selected, summed, k5 = (initialise(name, 'narrow', 3).state_dict() for name in (SELECTED, 'k3_k5_summed', 'k5'))
    assert all(torch.equal(value, selected[key]) for key, value in summed.items())
    assert selected.keys() - summed.keys() == {key for key in selected if '.attn.' in key}
    assert all(torch.equal(value, selected[key]) for key, value in k5.items())
    for claim in CLAIMS:
        if claim.other:
            one, two = (initialise(name, 'narrow', 3).state_dict() for name in (claim.one, claim.other))
            alike = [key for key in one if key in two and one[key].shape == two[key].shape]
            assert len(alike) > 20
            assert all(torch.equal(one[key], two[key]) for key in alike), claim
    other = initialise(SELECTED, 'narrow', 4).state_dict()
    assert not torch.equal(selected['layer1.0.conv1.conv.weight'], other['layer1.0.conv1.conv.weight'])


def test_plan():
    runs = plan(list(NETWORKS), list(DATA), ('narrow', 'wide'), range(10))
    # Claim (a) first, seed by seed; twice as long for three seeds of its two networks; elsewhere the core, and one.
    assert [(run.network, run.seed) for run in runs[:3]] == [(SELECTED, 0), ('k3_k5_summed', 0), (SELECTED, 1)]
    assert {run.network for run in runs[20:40]} == set(CORE[2:4])
    at_once = plan(list(NETWORKS), ('scaled',), ('narrow',), range(10), together=10)
    assert [run.seed for run in at_once[:10]] == list(range(10))
    assert set(at_once) < set(runs)
    main = [run for run in runs if (run.data, run.size) == ('scaled', 'narrow')]
    assert (len(main), len(runs)) == (180 + 6, 180 + 6 + 4 * (80 + 2))
    assert {(run.network, run.seed) for run in main if run.longer} == {
        (name, seed) for name in (SELECTED, 'k3_k5_summed') for seed in range(3)
    }
    assert len(set(runs)) == len(runs)
    crossed = plan_variance(2, 3, 'digits')
    assert len(crossed) == 12
    assert {run.data for run in crossed} == {'digits'}
    assert {(run.seed, run.images) for run in crossed} == {(i, j) for i in range(2) for j in range(3)}
    assert Run('k3', 4).images == 4


# The data


def test_images_of_a_seed(data, garments):
    alone, beside = (next(data.batches(seeds, 0)) for seeds in ((1,), (0, 1)))
    assert (alone[0].shape, beside[0].shape) == ((1, 8, 1, 64, 64), (2, 8, 1, 64, 64))
    assert torch.equal(alone[0][0], beside[0][1])
    assert torch.equal(alone[1][0], beside[1][1])
    again = next(Data(Path(garments), TINY).batches((1,), 0))
    assert torch.equal(alone[0], again[0])
    # The same garments elsewhere in another epoch.
    epochs = [[torch.cat(part, 1) for part in zip(*data.batches((1,), epoch))] for epoch in (0, 1)]
    assert sorted(epochs[0][1][0].tolist()) == sorted(epochs[1][1][0].tolist())
    assert epochs[0][0].shape == (1, 32, 1, 64, 64)
    assert len({image.numpy().tobytes() for images, _ in epochs for image in images[0]}) == 64
    assert abs(epochs[0][0].mean()) < 1


def test_tests_at_scales(data):
    images, labels, scales = data.test()
    assert (images.shape, images.dtype, labels.tolist()[:3]) == ((24, 1, 64, 64), torch.uint8, [0, 1, 2])
    assert 0.6 <= scales.min() < 0.9 < 1.7 < scales.max() <= 2
    small, large, larger = (data.test(scale) for scale in (0.5, 2.0, 2.5))
    assert torch.equal(small[1], labels)
    assert set(small[2].tolist()) == {0.5}
    # On the same backgrounds, of which a large object hides more; the largest reaches every edge.
    differ = [(one[0].int() - small[0].int()).abs().gt(8).double().mean().item() for one in (large, larger)]
    assert 0.3 < differ[0] < differ[1]
    assert larger[2].tolist() == [2.5] * 24


def test_scaled_garments_differ_in_size_alone(garments):
    data = Data(Path(garments), TINY, name='scaled')
    images, _, scales = data.test(1.0)
    assert set(scales.tolist()) == {1.0}
    inside = images[..., 18:46, 18:46]
    assert torch.equal(inside, data.objects['test'][:24])
    assert images.long().sum() == inside.long().sum() > 0
    sizes = (data.test()[0].amax(2) > 0).sum(-1).flatten()
    assert spearmanr(sizes, data.test()[2]).statistic > 0.8


def test_a_data_set_has_its_own_length(garments):
    assert LENGTHS.keys() == DATA.keys()
    settings = Data(Path(garments), Settings(32, test_images=24), name='scaled').settings
    assert (settings.train_images, settings.epochs) == (32, LENGTHS['scaled'][1])
    rows = [fake_row(Run('k3', 0, name), Settings().on(name)) for name in ('scaled', 'garments')]
    assert [(row['settings']['train_images'], row['settings']['epochs']) for row in rows] == [(6000, 40), (60000, 16)]
    path = Path('runs.jsonl')
    check_same_settings(path, rows, Settings(), DATA)
    # Of a set that is not run, rows may have any settings.
    check_same_settings(path, rows, Settings(epochs=40), {'scaled', 'digits'})
    with pytest.raises(ValueError, match='has runs on garments of epochs=16, and this is epochs=40: choose'):
        check_same_settings(path, rows, Settings(epochs=40), DATA)


def test_digits_come_several_times(garments):
    data = Data(Path('nowhere'), Settings(3000, 1, 400, 8), name='digits')
    assert data.objects['train'].shape == (1437, 1, 8, 8)
    order, _ = data._order(0, 0)
    counts = torch.bincount(order, minlength=1437)
    assert (len(order), counts.min(), counts.max()) == (3000, 2, 3)
    images, labels, _ = data.test()
    assert torch.equal(labels[:40], labels[360:])
    assert not torch.equal(images[:40], images[360:])


def test_scenes_lie_on_other_photographs(garments, monkeypatch):
    pytest.importorskip('skimage')
    import _scenes

    data = Data(Path(garments), TINY, name='scenes')
    train, test = (data.backgrounds[split] for split in ('train', 'test'))
    assert train.shape == test.shape == (16, 1, 64, 64)
    assert not any(torch.equal(one, other) for one in train for other in test)
    asked = []
    monkeypatch.setattr(
        _scenes, 'load_photographs', lambda names: asked.append(names) or {0: np.zeros((99, 99, 3), np.uint8)}
    )
    Data(Path(garments), TINY, name='scenes')
    assert asked == [_scenes.PHOTOGRAPHS['train'], _scenes.PHOTOGRAPHS['val']]
    assert not set(asked[0]) & set(asked[1])
    images, _, _ = data.test(0.6)
    assert images.float().std() > 20


# Several networks at once


def test_together_is_each_alone():
    models = [initialise(SELECTED, 'narrow', seed).double() for seed in range(2)]
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(2, 6, 1, 64, 64, generator=generator).double(), torch.randint(10, (2, 6), generator=generator))
        for _ in range(3)
    ]
    # Adam's first steps are as long whatever the gradient, and so magnify what is near zero: large betas apart, the
    # figures that are compared are those after each network's own gradients and statistics.
    settings = Settings(ema=0.5, learning_rate=1e-4)
    averages = fit(Together(models), batches, 3, settings).unstack()
    for i, average in enumerate(averages):
        own = [(images[i : i + 1], labels[i : i + 1]) for images, labels in batches]
        alone = fit(Alone(initialise(SELECTED, 'narrow', i).double()), own, 3, settings).model
        expected, found = alone.state_dict(), average.state_dict()
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            if 'running' in key:
                assert_close(found[key], value, length=alone, gain=100)
            elif value.is_floating_point():
                # Within a part of a step: where a gradient is rounding alone, so is the sign of its step.
                assert (found[key] - value).abs().max() < 3e-4
                assert (found[key] - value).abs().mean() < 1e-6
    assert not torch.equal(averages[0].fc.weight, averages[1].fc.weight)


def test_rate_ends_at_zero():
    assert [rate(step, 100) for step in (0, 4, 9, 50)] == pytest.approx([0.1, 0.5, 0.98, 0.5], abs=0.01)
    assert rate(100, 100) == 0
    assert rate(99, 100) < 0.001


def test_average_is_of_the_second_half():
    model = Alone(torch.nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model.model.weight.zero_()
    seen = []
    batches = [(torch.ones(1, 4, 2), torch.zeros(1, 4, dtype=torch.long))] * 4
    average = fit(model, batches, 4, Settings(ema=0.5), lambda step: seen.append(model.model.weight.detach().clone()))
    # Time constant 2, so that the decay is 1/2: the mean of the weights after the third step and the fourth.
    assert len(seen) == 5
    torch.testing.assert_close(average.model.weight.detach(), (seen[3] + seen[4]) / 2)
    assert fit(model, batches, 4, Settings(ema=0)) is model


def test_running_statistics_are_averaged_too():
    model = Alone(torch.nn.Sequential(torch.nn.BatchNorm1d(2, momentum=1.0), torch.nn.Linear(2, 2)))
    batches = [(torch.tensor([[[i, 0.0], [i, 2.0]]]), torch.zeros(1, 2, dtype=torch.long)) for i in range(4)]
    average = fit(model, batches, 4, Settings(ema=0.5)).model[0]
    # Those of the third batch and of the fourth; their variances are alike.
    torch.testing.assert_close(average.running_mean, torch.tensor([2.5, 1.0]))
    torch.testing.assert_close(average.running_var, torch.tensor([0.0, 2.0]))
    assert model.model[0].running_mean.tolist() == [3.0, 1.0]


# Attention


@pytest.fixture(scope='module')
def attentive():
    """A network whose attention is far from even, and differs from image to image."""
    model = initialise(SELECTED, 'narrow', 0).eval()
    with torch.no_grad():
        for unit in sk_units(model).values():
            unit.layer.attn.fc_select.weight.normal_(std=3)
            unit.layer.attn.fc_reduce.weight.normal_(std=3)
    return model


def test_attention_is_put_in_another_place(attentive, data):
    images = data.test()[0]
    kept = []
    unit = attentive.layer2[1].conv2
    outputs = {}
    for how in ('own', 'mean', 'shuffled'):
        with replaced_attention(attentive, how, images):
            handle = unit.attn.register_forward_hook(lambda module, inputs, output: kept.append(output))
            outputs[how] = logits_of(attentive, images)
            handle.remove()
    own, mean, shuffled = kept
    assert torch.equal(outputs['own'], logits_of(attentive, images))
    assert not torch.equal(outputs['own'], outputs['mean'])
    assert own.std(0).max() > 0.05
    assert mean.std(0).max() == 0
    assert_close(mean[0], own.mean(0), length=len(images), dtype=torch.float32)
    # The first unit gets what it would have computed for the image before; those behind it see other maps.
    first = attentive.layer1[0].conv2
    own, shuffled = [], []
    for how, found in (('own', own), ('shuffled', shuffled)):
        with replaced_attention(attentive, how, images):
            handle = first.attn.register_forward_hook(lambda module, i, output, found=found: found.append(output))
            logits_of(attentive, images)
            handle.remove()
    assert torch.equal(shuffled[0], own[0].roll(1, 0))
    assert not any(module._forward_hooks for module in attentive.modules())


def test_attention_against_scale(attentive, data):
    found = measure_attention(attentive, data)
    images, _, scales = data.test()
    expected = differences(attentive, images)
    assert list(found['units']) == ['SK_2_1', 'SK_2_2', 'SK_3_1', 'SK_3_2', 'SK_4_1', 'SK_4_2']
    for name, unit in found['units'].items():
        assert unit['rho'] == pytest.approx(spearmanr(scales, expected[name]).statistic)
        assert len(unit['curve']) == 7
    assert found['scales'] == [0.5, 0.6, 0.8, 1.1, 1.5, 2.0, 2.5]
    at = differences(attentive, data.test(1.1)[0])['SK_3_2'].mean()
    assert found['units']['SK_3_2']['curve'][3] == pytest.approx(at, abs=1e-6)
    figures, right = measure(attentive, data)
    assert figures['top1'] == pytest.approx(100 * right.double().mean().item() / 5)
    assert figures['scales']['2.5'] * 24 / 100 == pytest.approx(round(figures['scales']['2.5'] * 24 / 100))


# Runs


def test_rows(finished):
    rows = read_rows(finished / 'out' / 'runs.jsonl')
    runs = [Run.of(row) for row in rows]
    assert runs == [Run(SELECTED, 0), Run('k3', 0), Run(SELECTED, 0, longer=True)]
    git = subprocess.run(['git', '-C', ROOT, 'rev-parse', 'HEAD'], capture_output=True, text=True)
    expected = git.stdout.strip() if git.returncode == 0 else None
    for row in rows:
        inside = [row['scales'][scale] for scale in ('0.6', '0.8', '1.1', '1.5', '2')]
        assert row['top1'] == pytest.approx(np.mean(inside))
        assert (row['parameters'], row['mflops']) == cost(row['network'])
        assert (row['settings']['train_images'], row['together'], row['compiled']) == (32, [0], False)
        assert 2 < row['first'] < 3
        assert (row['torch'], row['timm'], row['sk_plugins']) == (torch.__version__, timm.__version__, sk_version)
        assert row['cpu_capability'] == torch.backends.cpu.get_cpu_capability()
        assert (row['commit'] and row['commit'].removesuffix('-dirty')) == expected
    assert rows[0]['first'] == rows[2]['first']
    assert rows[0]['loss'] != rows[2]['loss']
    assert 'attention' not in rows[1]
    # Before training the attention is even; there are four steps, and eight.
    for row, steps in ((rows[0], [0, 1, 2, 3, 4]), (rows[2], [0, 1, 2, 4, 6, 8])):
        assert [step for step in row['learning']['steps'] if step in steps] == steps
        assert row['learning']['SK_2_1']['entropy'][0] == pytest.approx(np.log(2), abs=1e-3)
    assert find(rows[0], 'attention.top1.own') == rows[0]['mixed']
    assert find(rows[0], 'scales.0.5') == rows[0]['scales']['0.5']
    assert find(rows[1], 'attention.top1.own') is None


def test_page(finished):
    text = (finished / 'page.md').read_text()
    assert '- **Not run**: ' in text
    assert '(b) two kernels, selected, beat K3' in text
    assert 'Not run: garments, narrow; scenes, narrow; digits, narrow; scaled, wide.' in text
    assert '--sets scaled --sizes narrow --networks k3_k5_selected k3 --seeds 0 --train-images 32' in text
    assert text.count('\n| SK_') == 12
    from PIL import Image

    assert not (finished / 'out' / 'places.png').exists()
    for name in ('forest.png', 'attention.png', 'learning.png'):
        with Image.open(finished / 'out' / name) as image:
            assert np.asarray(image.convert('L')).std() > 10


def test_what_is_there_is_not_done_again(tool, finished, garments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(running, 'train', None)
    before = (finished / 'out' / 'runs.jsonl').read_bytes()
    tool.main(command_line(garments, finished, ('k3', SELECTED)))
    assert '3 of 3 runs are done' in capsys.readouterr().out
    assert (finished / 'out' / 'runs.jsonl').read_bytes() == before
    with pytest.raises(ValueError, match=r'has runs on scaled of epochs=1, and this is epochs=2: choose another --out'):
        tool.main([*command_line(garments, finished, ('k3',)), '--epochs', '2'])
    older = [json.loads(line) for line in before.splitlines()]
    for row in older:
        del row['settings']['ema']
    (tmp_path / 'runs.jsonl').write_text(''.join(f'{json.dumps(row)}\n' for row in older))
    with pytest.raises(
        ValueError, match=r'has runs on scaled of ema=None, and this is ema=0\.\d+: choose another --out'
    ):
        tool.main([*command_line(garments, finished, ('k3',)), '--out', str(tmp_path)])


def fake_row(run, settings=TINY, **figures):
    row = {'network': run.network, 'seed': run.seed, 'data': run.data, 'size': run.size, 'order': run.order}
    about = dict(hardware='a CPU', device='cpu', threads=1, torch='2', together=[run.seed], compiled=False)
    figures = {**dict.fromkeys(('top1', 'loss', 'mixed', 'last', 'first'), 1.0), 'seconds': 3600.0, **figures}
    return {**row, 'longer': run.longer, **figures, **about, 'settings': json.loads(json.dumps(vars(settings)))}


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.setattr(running, 'Data', lambda root, settings, device, name: (device, name))


def test_resumes_after_a_kill(tool, tmp_path, monkeypatch, no_data, capsys):
    path, calls = tmp_path / 'runs.jsonl', []

    def killed(runs, device, data, **kwargs):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((runs, data))
        return [fake_row(run) for run in runs]

    monkeypatch.setattr(running, 'train', killed)
    runs = [Run(name, seed, one) for one in ('garments', 'digits') for name in ('k3', 'k5') for seed in range(3)]
    start = (runs, path, tmp_path, TINY, ['cpu'])
    with pytest.raises(KeyboardInterrupt):
        running.run_missing(*start, together=2)
    # Two seeds of a network at once, and then the one that is left.
    assert [[run.seed for run in group] for group, _ in calls] == [[0, 1], [2], [0, 1]]
    whole = path.read_bytes()
    # As if the kill had come while the last row was written.
    path.write_bytes(whole[:-40])
    assert runs_of(path) == runs[:4]
    calls.clear()
    monkeypatch.setattr(running, 'train', lambda group, device, data, **kwargs: [fake_row(run) for run in group])
    running.run_missing(*start, together=2)
    assert '4 of 12 runs are done' in capsys.readouterr().out
    assert path.read_bytes().startswith(b''.join(whole.splitlines(keepends=True)[:4]))
    assert runs_of(path) == runs


def test_stops_after_minutes(tmp_path, monkeypatch, no_data):
    clock = iter([0.0, 10.0, 50.0, 70.0, 80.0])
    monkeypatch.setattr(running.time, 'time', lambda: next(clock))
    monkeypatch.setattr(running, 'train', lambda group, device, data, **kwargs: [fake_row(run) for run in group])
    path = tmp_path / 'runs.jsonl'
    running.run_missing([Run('k3', seed) for seed in range(4)], path, tmp_path, TINY, ['cpu'], minutes=1)
    assert [run.seed for run in runs_of(path)] == [0, 1]


@pytest.fixture
def threads_for_processes(monkeypatch):
    def pool(number, context, start, arguments):
        return ThreadPoolExecutor(number, initializer=start, initargs=arguments)

    monkeypatch.setattr(running, 'ProcessPoolExecutor', pool)
    monkeypatch.setattr(running, '_end_with_command', lambda alive: None)
    monkeypatch.setattr(running, 'set_up', lambda threads: None)
    monkeypatch.setattr(running.signal, 'signal', lambda number, handler: None)


def test_two_devices_share_the_runs(tmp_path, monkeypatch, no_data, threads_for_processes):
    path, both, used = tmp_path / 'runs.jsonl', threading.Barrier(2), set()

    def work(group, device, data, **kwargs):
        both.wait(10)  # two at a time
        used.add(device)
        return [fake_row(run) for run in group]

    monkeypatch.setattr(running, 'train', work)
    runs = [Run('k3', seed) for seed in range(6)]
    running.run_missing(runs, path, tmp_path, TINY, ['cpu', 'cuda:0'])
    assert sorted(runs_of(path), key=lambda run: run.seed) == runs
    assert used == {'cpu', 'cuda:0'}


def test_a_run_that_fails_costs_no_other_its_row(tmp_path, monkeypatch, no_data, threads_for_processes):
    path, begun, both = tmp_path / 'runs.jsonl', [], threading.Barrier(2)

    def work(group, device, data, **kwargs):
        begun.append(group[0].seed)
        both.wait(10)
        if group[0].seed == 0:
            raise MemoryError('of seed 0')
        time.sleep(0.2)  # under way while the other fails
        return [fake_row(run) for run in group]

    monkeypatch.setattr(running, 'train', work)
    with pytest.raises(MemoryError, match='of seed 0'):
        running.run_missing([Run('k3', seed) for seed in range(9)], path, tmp_path, TINY, ['cpu', 'cpu'])
    assert [run.seed for run in runs_of(path)] == [1]
    # None of those that were waiting is begun.
    assert sorted(begun) == [0, 1]


def test_a_row_that_cannot_be_written_ends_the_command(tmp_path, monkeypatch, no_data, threads_for_processes):
    begun, both = [], threading.Barrier(2)

    def work(group, device, data, **kwargs):
        begun.append(group[0].seed)
        both.wait(timeout=60)
        return [fake_row(run) for run in group]

    def full(path, row):
        raise OSError('No space left on device')

    monkeypatch.setattr(running, 'train', work)
    monkeypatch.setattr(running, 'append_row', full)
    path = tmp_path / 'runs.jsonl'
    with pytest.raises(OSError, match='No space left'):
        running.run_missing([Run('k3', seed) for seed in range(9)], path, tmp_path, TINY, ['cpu', 'cpu'])
    assert sorted(begun) == [0, 1]
    assert not path.with_suffix('.lock').exists()


def test_one_command_at_a_time(tmp_path, monkeypatch, no_data):
    path = tmp_path / 'runs.jsonl'

    def work(group, device, data, **kwargs):
        with pytest.raises(FileExistsError, match=r'a run is at work there, process \d+ on .*another --out; if'):
            running.run_missing([Run('k5', 0)], path, tmp_path, TINY, ['cpu'])
        return [fake_row(run) for run in group]

    monkeypatch.setattr(running, 'train', work)
    running.run_missing([Run('k3', 0)], path, tmp_path, TINY, ['cpu'])
    assert runs_of(path) == [Run('k3', 0)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_seed_twice_is_one_run(tool, garments, tmp_path, monkeypatch, no_data):
    monkeypatch.setattr(running, 'train', lambda group, device, data, **kwargs: [fake_row(run) for run in group])
    monkeypatch.setitem(tool.main.__globals__, 'report', lambda out, page: [])
    tool.main(command_line(garments, tmp_path, ('k3',), ('1', '0', '1')))
    assert runs_of(tmp_path / 'out' / 'runs.jsonl') == [Run('k3', 1), Run('k3', 0)]
    tool.main([*command_line(garments, tmp_path, (SELECTED,), ('0',)), '--longer', '1', '1'])
    assert runs_of(tmp_path / 'out' / 'runs.jsonl')[2:] == [Run(SELECTED, 0), Run(SELECTED, 1, longer=True)]


def test_verify_gives_the_row_again(tool, finished, garments, tmp_path, capsys):
    found = read_rows(finished / 'out' / 'runs.jsonl')[1]
    append_row(tmp_path / 'runs.jsonl', found)
    where = ['--data', garments, '--out', str(tmp_path), '--verify', 'k3', '0']
    tool.main(where)
    told = capsys.readouterr().out
    assert f'loss {found["loss"]!r} then, {found["loss"]!r} now' in told
    assert 'the same to the last digit' in told


def test_verify_here_and_elsewhere(tool, tmp_path, monkeypatch, no_data, capsys):
    path, asked = tmp_path / 'runs.jsonl', []
    for seed, top1 in ((0, 70.0), (1, 71.0), (2, 72.0)):
        row = fake_row(Run('k3', seed), top1=top1, cpu_capability='AVX2')
        append_row(path, {**row, 'together': [0, 1, 2]})
    # Another data set, whose spread is not this one's.
    for seed, top1 in ((0, 10.0), (1, 90.0)):
        append_row(path, fake_row(Run('k3', seed, 'garments'), Settings().on('garments'), top1=top1))
    monkeypatch.setattr(running, 'set_up', asked.append)

    def verify(*words, **now):
        def train(runs, device, data, compiled):
            asked.append([run.seed for run in runs])
            return [{**row, **now} for row in read_rows(path) if row['data'] == runs[0].data]

        monkeypatch.setattr(running, 'train', train)
        tool.main(['--out', str(tmp_path), *words, '--verify', 'k3', '1'])
        return capsys.readouterr().out

    # Beside the seeds that it was trained with, and with the row's threads unless others are given.
    assert 'the same to the last digit' in verify()
    verify('--threads', '2')
    assert asked == [1, [0, 1, 2], 2, [0, 1, 2]]
    with pytest.raises(ValueError, match='--verify k3 1: loss differ, all on hardware a CPU'):
        verify(loss=1.0001)
    # The deviation over three seeds is 1 point: sqrt(2) of it, by Student's t of two degrees of freedom.
    assert 'within 25.76 points' in verify(hardware='another', top1=96.7, loss=3.0)
    with pytest.raises(ValueError, match=r'top1 differs by more than 25\.76'):
        verify(hardware='another', top1=96.9)
    assert 'top1 90.0 then, 99.0 now' in verify('--sets', 'garments', hardware='another', top1=99.0)
    with pytest.raises(ValueError, match='the first loss differs by more than rounding'):
        verify(hardware='another', first=1.01)
    there = '--sets garments --sizes narrow, of --sets scaled --sizes narrow'
    with pytest.raises(
        ValueError, match=rf'runs\.jsonl has no run k5, narrow, scaled, seed 1; there are runs of {there}'
    ):
        tool.main(['--out', str(tmp_path), '--verify', 'k5', '1'])


def test_verify_tells_instructions_apart(tool, tmp_path, monkeypatch, no_data, capsys):
    """One name of a CPU stands for many generations."""
    now = {**fake_row(Run('k3', 0)), 'loss': 1.001, 'cpu_capability': 'AVX512'}
    monkeypatch.setattr(running, 'train', lambda runs, *args: [now])
    monkeypatch.setattr(running, 'set_up', lambda threads: None)
    append_row(tmp_path / 'runs.jsonl', {**now, 'loss': 1.0, 'cpu_capability': 'AVX2'})
    tool.main(['--out', str(tmp_path), '--verify', 'k3', '0'])
    told = capsys.readouterr().out
    assert 'no bound on top-1' in told
    assert 'made on hardware a CPU, cpu_capability AVX2, ' in told
    now['cpu_capability'] = 'AVX2'
    with pytest.raises(ValueError, match='loss differ, all on hardware a CPU, cpu_capability AVX2'):
        tool.main(['--out', str(tmp_path), '--verify', 'k3', '0'])
    # An older row does not say, and may be of either.
    (tmp_path / 'runs.jsonl').unlink()
    append_row(tmp_path / 'runs.jsonl', fake_row(Run('k3', 0)))
    capsys.readouterr()
    tool.main(['--out', str(tmp_path), '--verify', 'k3', '0'])
    assert 'the row, of hardware a CPU, device cpu, ' in (told := capsys.readouterr().out)
    assert told.endswith('does not name instructions\n')
    append_row(tmp_path / 'runs.jsonl', fake_row(Run('k5', 0)))
    monkeypatch.setattr(running, 'train', lambda runs, *args: [fake_row(Run('k5', 0))])
    tool.main(['--out', str(tmp_path), '--verify', 'k5', '0'])
    assert 'the same to the last digit' in capsys.readouterr().out


def test_variance_rows(tool, garments, tmp_path, monkeypatch):
    monkeypatch.setitem(tool.main.__globals__, 'report', lambda out, page: [])
    monkeypatch.setitem(
        tool.main.__globals__,
        'plan_variance',
        lambda weights, orders, data: [Run('k3', seed, data, order=1) for seed in (0, 1)],
    )
    words = ['--data', garments, '--sets', 'garments', '--out', str(tmp_path), *SHORT]
    words += ['--variance', '2', '2', '--together', '2']
    tool.main(words)
    first, second = read_rows(tmp_path / 'variance.jsonl')
    assert (first['seed'], first['order'], second['seed'], second['order']) == (0, 1, 1, 1)
    assert first['data'] == second['data'] == 'garments'
    assert first['together'] == second['together'] == [0, 1]
    assert first['first'] != second['first']
    for row in (first, second):
        assert len(row['right']) == 24
        assert sum(map(int, row['right'])) / 24 / 5 * 100 == pytest.approx(row['top1'])
        assert [len(row['steps'][name]) for name in ('middle', 'end')] == [2, 2]
        assert row['steps']['end'][-1] == row['last']


def test_timing(capsys, monkeypatch):
    """By a clock of half a second a step: one step is measured, after two."""
    ticks = itertools.count(0, 0.5)
    monkeypatch.setattr(timing, 'time', SimpleNamespace(perf_counter=lambda: next(ticks)))
    found = timing.time_ways(['cpu'], Settings(batch_size=2), 2, 'narrow', seconds=0.01)
    assert found == [('one by one', 4.0), ('2 at once', 8.0)]
    assert 'one by one: 4 images a second, after 1.0 s for two steps' in capsys.readouterr().out


@pytest.fixture
def command(garments, tmp_path):
    """Begin three seeds of two networks on so many processes, and wait for the first row."""
    path = tmp_path / 'out' / 'runs.jsonl'

    def begin(*devices):
        words = [
            sys.executable,
            str(ROOT / 'tools' / 'run_ablation.py'),
            *command_line(garments, tmp_path, ('k3', 'k5'), ('0', '1', '2')),
            *('--threads', '1', '--devices', *devices),
        ]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process = subprocess.Popen(words, env={**os.environ, 'OMP_NUM_THREADS': '1'}, start_new_session=True, **pipes)
        end = time.monotonic() + 300
        while not path.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        return process, path, words

    return begin


@pytest.mark.slow
@pytest.mark.parametrize('devices', [('cpu',), ('cpu', 'cpu')], ids=len)
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_a_command_that_is_ended(command, devices, how):
    process, path, words = command(*devices)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as Ctrl-C does
    else:
        process.send_signal(how)
    # Until its processes, which write there too, have ended: they do not go on without it.
    process.communicate(timeout=30)
    assert process.returncode != 0
    first = path.read_bytes()
    assert 1 <= len(first.splitlines()) < 6
    subprocess.run(words, check=True)
    assert path.read_bytes().startswith(first)
    runs = sorted((run.network, run.seed) for run in runs_of(path))
    assert runs == [(name, seed) for name in ('k3', 'k5') for seed in range(3)]
    assert not path.with_suffix('.lock').exists()


@pytest.mark.slow
def test_a_process_that_is_ended(command):
    """As the system does where memory runs out: the other one's row is kept, and the command says what to do."""
    process, path, _ = command('cpu', 'cpu')
    before = len(path.read_bytes().splitlines())
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    # The resource tracker is a child too.
    workers = [child for child in children if b'spawn_main' in Path(f'/proc/{child}/cmdline').read_bytes()]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    error, _ = errors.splitlines()[-2:]
    assert error.startswith(
        'run_ablation.py: error: a process of --devices cpu cpu ended without a word, as where memory runs out'
    )
    assert before <= len(runs_of(path)) < 6


# The page's commands


def test_the_pages_commands_make_its_rows(tool, monkeypatch):
    made = []
    monkeypatch.setitem(tool.main.__globals__, 'run_missing', lambda runs, *args, **kwargs: made.extend(runs))
    monkeypatch.setitem(tool.main.__globals__, 'report', lambda out, page: [])
    page = (ROOT / 'docs' / 'reproduction.md').read_text(encoding='utf-8')
    for command in re.findall(r'^python tools/run_ablation.py (--.*)$', page, flags=re.MULTILINE):
        tool.main(command.split())
    rows = [row for name in ('runs', 'variance') for row in read_rows(ROOT / 'results' / 'ablation' / f'{name}.jsonl')]
    assert len(made) == len(set(made))
    assert set(made) == set(map(Run.of, rows))


def test_which_seeds_are_trained_twice_as_long():
    def longer(*args, **kwargs):
        return [(run.network, run.seed) for run in plan([SELECTED, 'k3'], *args, **kwargs) if run.longer]

    assert longer(['scaled'], ['narrow'], [4, 5, 6, 7]) == [(SELECTED, 4), (SELECTED, 5), (SELECTED, 6)]
    assert longer(['scaled'], ['wide'], [4, 5]) == [(SELECTED, 4)]
    assert longer(['scaled'], ['narrow'], [4, 5], longer=[8]) == [(SELECTED, 8)]
    assert longer(['scaled'], ['narrow'], [4, 5], longer=[]) == []


# The results file


def test_append_and_read(tmp_path):
    path = tmp_path / 'new' / 'runs.jsonl'
    assert read_rows(path) == []
    rows = [fake_row(Run('k3', 0)), fake_row(Run('k5', 0))]
    append_row(path, rows[0])
    with open(path, 'a') as file:
        file.write('{"network": "k7", "se')
    assert read_rows(path) == rows[:1]
    append_row(path, rows[1])
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ('line', 'message'),
    [('{"network": "k3"', 'line 2: not JSON'), ('[1]', 'line 2: not a run'), ('{"seed": 1}', 'line 2: not a run')],
)
def test_damaged_rows_are_named(tmp_path, line, message):
    path = tmp_path / 'runs.jsonl'
    path.write_text(json.dumps(fake_row(Run('k3', 0))) + '\n' + line + '\n')
    with pytest.raises(ValueError, match=f'runs.jsonl, {message}'):
        read_rows(path)


# Bad input


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (['--train-images', '0'], '--train-images 0: must be at least 1'),
        (['--batch-size', '1'], '--batch-size 1: must be from 2 to --train-images 32'),
        (['--batch-size', '64'], '--batch-size 64: must be from 2 to --train-images 32'),
        (['--train-images', '49'], '--train-images 49: .* has 48, which must be enough'),
        (['--test-images', '25'], '--test-images 25: .* has 24, which must be enough'),
        (['--devices', 'tpu'], '--devices tpu: must be cpu, cuda or cuda:NUMBER'),
        (['--devices', 'cuda:99'], '--devices cuda:99: torch finds .* CUDA devices here'),
        (['--report'], 'out: there are no runs yet'),
    ],
)
def test_bad_options(tool, garments, tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        tool.main([*command_line(garments, tmp_path, ('k3',)), *option])
    assert not (tmp_path / 'out').exists()


def test_no_data(tool, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nowhere: no such folder; tools/prepare_fashion_mnist.py fills it'):
        tool.main(['--data', str(tmp_path / 'nowhere'), '--out', str(tmp_path / 'out')])


@pytest.mark.parametrize(
    'option',
    [
        ['--networks', 'k4'],
        ['--sets', 'faces'],
        ['--seeds', '-1'],
        ['--longer', '0', '-1'],
        ['--threads', '0'],
        ['--together', '0'],
        ['--variance', '1', '3'],
        ['--minutes', '-5'],
        ['--minutes', 'nan'],
        ['--verify', 'k3', 'one'],
    ],
)
def test_bad_arguments(tool, option, capsys):
    with pytest.raises(SystemExit):
        tool.main(option)
    assert f'argument {option[0]}: ' in capsys.readouterr().err
