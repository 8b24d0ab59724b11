"""tools/run_ablation.py: runs of a few steps on a small set of garments, and rows whose statistics are known."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import torch
from _ablation import networks, running
from _ablation.attention import correlate, differences, measure_missing
from _ablation.comparing import compare
from _ablation.data import Data
from _ablation.networks import SELECTED, build, cost
from _ablation.reporting import markdown
from _ablation.rows import Settings, append_row, read_rows
from _ablation.training import logits_of
from _ablation.weights import check_weights, weights_path
from helpers.small_fashion_mnist import write_blots
from helpers.tolerances import assert_close
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from sk_plugins._resources import ROOT

pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning:mmpretrain'),
    pytest.mark.filterwarnings('ignore:The given NumPy array is not writable:UserWarning'),
]

SHORT = ('--train-images', '32', '--batch-size', '8', '--test-images', '24')
NETWORKS = ('k3', 'k3_k5_selected')
SETTINGS = dict(train_images=9, epochs=1, test_images=9, batch_size=2, learning_rate=0.1, weight_decay=0, scale=[1, 2])


@pytest.fixture(scope='module')
def tool(load_tool):
    yield load_tool('run_ablation')
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope='module')
def garments(tmp_path_factory):
    return write_blots(tmp_path_factory.mktemp('garments') / 'fashion_mnist')


@pytest.fixture
def arguments(garments, tmp_path):
    """Those of a short run of K3 and K5 into ``tmp_path``."""
    return command_line(garments, tmp_path, ('k3', 'k5'))


def command_line(garments, folder, networks=NETWORKS, seeds=('0', '1')):
    places = ['--data', garments, '--out', str(folder / 'out'), '--work-dir', str(folder / 'work')]
    return [*places, *SHORT, '--networks', *networks, '--seeds', *seeds]


@pytest.fixture(scope='module')
def finished(tool, garments, tmp_path_factory):
    """The folder of NETWORKS trained with two seeds. Not to be written into."""
    folder = tmp_path_factory.mktemp('finished')
    tool.main(command_line(garments, folder))
    return folder


def pairs(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row['network'], row['seed']) for row in rows]


def row(network, seed, top1, **more):
    thirds = dict(top1_small=top1 - 1, top1_medium=top1, top1_large=top1 + 1)
    about = dict(
        parameters=1000,
        mflops=2.5,
        device='cpu',
        hardware='a CPU',
        threads=1,
        torch='2',
        seconds=40.0,
        settings=SETTINGS,
    )
    return dict(network=network, seed=seed, top1=top1, **thirds, **about, **more)


# The networks


def test_networks_cost():
    costs = {name: cost(name) for name in networks.NETWORKS}
    assert {name: parameters for name, (parameters, _) in costs.items()} == {
        'k3': 44_926,
        'k5': 44_926,
        'k7': 44_926,
        'k3_k5_summed': 57_246,
        'k3_k5_selected': 68_382,
        'k3_k5_k7_summed': 69_566,
        'k3_k5_k7_selected': 84_286,
        'k3_k5_shared': 61_598,
        'se': 68_920,
        'k3_wider': 61_086,
    }
    assert costs['k3'][1] == costs['k5'][1] == costs['k7'][1]
    assert costs['se'][0] == pytest.approx(costs['k3_k5_selected'][0], rel=0.01)
    assert costs['k3_wider'][1] == pytest.approx(costs['k3_k5_selected'][1], rel=0.01)


def test_networks_are_what_they_are_called():
    for name in networks.NETWORKS:
        if name in ('se', 'k3_wider'):
            continue
        with torch.device('meta'):
            unit = build(name).layer1[0].conv2
        kernels = [f'k{1 + 2 * path.conv.dilation[0]}' for path in unit.paths]
        assert name.removesuffix(f'_{name.split("_")[-1]}' if len(kernels) > 1 else '') == '_'.join(kernels)
        select = {'selected': 'channel', 'shared': 'shared'}.get(name.split('_')[-1], 'sum')
        assert unit.select == select
    with torch.device('meta'):
        assert build('se').layer1[0].se is not None
        assert build('k3_wider').layer1[0].se is None


# Running


def test_rows(finished):
    rows = read_rows(finished / 'out' / 'runs.jsonl')
    assert pairs(finished / 'out' / 'runs.jsonl') == [(name, seed) for seed in (0, 1) for name in NETWORKS]
    for found in rows:
        assert found['top1'] * 24 / 100 == pytest.approx(round(found['top1'] * 24 / 100))
        assert (found['parameters'], found['mflops']) == cost(found['network'])
        assert found['settings']['train_images'] == 32
        assert (found['device'], found['threads']) == ('cpu', torch.get_num_threads())
    losses = [found['loss'] for found in rows]
    assert len(set(losses)) == 4


def test_same_seed_same_figures(tool, finished, garments, capsys):
    where = ['--out', str(finished / 'out'), '--data', garments]
    tool.main([*where, '--verify', 'k3_k5_selected', '1'])
    (line,) = capsys.readouterr().out.splitlines()
    found = read_rows(finished / 'out' / 'runs.jsonl')[3]
    assert f'loss {found["loss"]!r} then, {found["loss"]!r} now' in line


def test_verify_takes_the_rows_device_and_threads(tool, tmp_path, monkeypatch):
    append_row(tmp_path / 'runs.jsonl', {**row('k3', 0, 70.0), 'threads': 3, 'loss': 1.0})
    monkeypatch.setattr(running, 'Data', lambda root, settings: None)
    used, called = [], []
    monkeypatch.setattr(running, 'set_up', used.append)

    def train(name, seed, device, data):
        called.append((name, seed, device))
        return None, read_rows(tmp_path / 'runs.jsonl')[0]

    monkeypatch.setattr(running, 'train', train)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    for words in ([], ['--threads', '2']):
        tool.main(['--out', str(tmp_path), *words, '--verify', 'k3', '0'])
    assert used == [3, 2]
    assert called == [('k3', 0, 'cpu')] * 2


def test_verify_finds_a_difference(tool, finished, garments, tmp_path):
    found = read_rows(finished / 'out' / 'runs.jsonl')[0]
    append_row(tmp_path / 'runs.jsonl', {**found, 'loss': found['loss'] + 1e-6})
    made = rf'the row was made on .* with {found["threads"]} threads and torch .*, this on .* with 1 and torch'
    with pytest.raises(ValueError, match=f'--verify k3 0: loss differ; {made}'):
        tool.main(['--out', str(tmp_path), '--data', garments, '--threads', '1', '--verify', 'k3', '0'])
    with pytest.raises(ValueError, match=r'--verify k5 0: .*runs\.jsonl has no such run'):
        tool.main(['--out', str(tmp_path), '--data', garments, '--verify', 'k5', '0'])


def test_resumes_after_a_kill(tool, arguments, tmp_path, monkeypatch, capsys):
    train, path, calls = running.train, tmp_path / 'out' / 'runs.jsonl', []

    def killed(name, seed, device, data):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((name, seed))
        return train(name, seed, device, data)

    monkeypatch.setattr(running, 'train', killed)
    with pytest.raises(KeyboardInterrupt):
        tool.main(arguments)
    whole = path.read_bytes()
    assert len(whole.splitlines()) == 3
    # As if the kill had come while the third row was written.
    path.write_bytes(whole[:-40])
    assert len(read_rows(path)) == 2
    calls.clear()
    tool.main(arguments)
    assert calls == [('k3', 1), ('k5', 1)]
    assert capsys.readouterr().out.count('2 of 4 runs are done') == 1
    assert path.read_bytes().startswith(b''.join(whole.splitlines(keepends=True)[:2]))
    assert pairs(path) == [('k3', 0), ('k5', 0), ('k3', 1), ('k5', 1)]
    again = json.loads(whole.splitlines()[2])
    assert read_rows(path)[2]['loss'] == again['loss']


def test_skips_what_is_done(tool, finished, garments, monkeypatch, capsys):
    monkeypatch.setattr(running, 'train', None)
    before = {path.name: path.read_bytes() for path in (finished / 'out').glob('*.jsonl')}
    tool.main(command_line(garments, finished))
    assert '4 of 4 runs are done' in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (finished / 'out').glob('*.jsonl')} == before


def test_networks_of_a_seed_see_the_same_images(garments):
    settings = Settings(32, 2, 24, 8)
    data, other = (Data(Path(garments), settings) for _ in range(2))
    images, labels = data.train(0, 0)
    assert data.train(0, 0)[0] is images
    assert torch.equal(images, other.train(0, 0)[0])
    assert torch.equal(labels, other.train(0, 0)[1])
    assert (images.shape, images.dtype) == ((32, 1, 64, 64), torch.uint8)
    # Other places in every epoch, other garments too with another seed.
    assert sorted(labels) == sorted(data.train(0, 1)[1])
    whole = {image.numpy().tobytes() for part in ((0, 0), (0, 1), (1, 0), (1, 1)) for image in data.train(*part)[0]}
    assert len(whole) == 4 * 32


def test_other_settings_are_refused(tool, finished, garments):
    with pytest.raises(ValueError, match=r'has runs of epochs=1, and this is epochs=2: choose another --out'):
        tool.main([*command_line(garments, finished), '--epochs', '2'])


@pytest.mark.slow
def test_killed_process_and_two_processes(garments, tmp_path):
    words = [
        sys.executable,
        str(ROOT / 'tools' / 'run_ablation.py'),
        *command_line(garments, tmp_path),
        '--threads',
        '1',
    ]
    path = tmp_path / 'out' / 'runs.jsonl'
    process = subprocess.Popen(words, env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = path.read_bytes()
    assert 1 <= len(first.splitlines()) < 4
    subprocess.run([*words, '--devices', 'cpu', 'cpu'], check=True)
    assert path.read_bytes().startswith(first)
    assert sorted(pairs(path)) == sorted((name, seed) for seed in (0, 1) for name in NETWORKS)


# The results file


def test_append_and_read(tmp_path):
    path = tmp_path / 'new' / 'runs.jsonl'
    assert read_rows(path) == []
    rows = [row('k3', 0, 70.0), row('k5', 0, 71.5)]
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
    path.write_text(json.dumps(row('k3', 0, 70.0)) + '\n' + line + '\n')
    with pytest.raises(ValueError, match=f'runs.jsonl, {message}'):
        read_rows(path)


# Statistics


KNOWN = [
    *(row('k3', seed, top1) for seed, top1 in enumerate((69.0, 70.0, 74.0))),
    *(row('k3_k5_selected', seed, top1) for seed, top1 in enumerate((70.0, 72.0, 74.0))),
    row('k3_k5_summed', 1, 71.0),
    row('k3_k5_summed', 7, 99.0),
    row('se', 8, 99.0),
]


def test_comparison_by_hand():
    # Differences 1, 2, 0: mean 1, sd 1, t = sqrt(3) with 2 degrees of freedom, where p = 1 - t / sqrt(2 + t^2).
    found = compare(KNOWN, 'k3_k5_selected', 'k3')
    assert (found.n, found.mean) == (3, 1)
    assert found.p == pytest.approx(1 - (3 / 5) ** 0.5)
    half = 4.302653 / 3**0.5
    assert (found.low, found.high) == pytest.approx((1 - half, 1 + half), abs=1e-5)


def test_comparison_pairs_by_seed():
    found = compare(KNOWN, 'k3_k5_selected', 'k3_k5_summed')
    assert (found.n, found.mean, found.p) == (1, 1.0, None)
    assert compare(KNOWN, 'k3_k5_selected', 'se') is None
    assert compare(KNOWN, 'k3_k5_selected', 'k7') is None


def test_table():
    text = markdown(KNOWN, [])
    lines = text.splitlines()
    assert (
        '| `k3` | 1,000 | 2.50 | 3 | 71.00 ± 2.65 | 70.00 | 71.00 | 72.00 | -1.00 (-3.48 to +1.48) | 0.225 |' in lines
    )
    assert '| `k3_k5_selected` | 1,000 | 2.50 | 3 | 72.00 ± 2.00 | 71.00 | 72.00 | 73.00 |  |  |' in lines
    assert '| `se` | 1,000 | 2.50 | 1 | 99.00 | 98.00 | 99.00 | 100.00 |  |  |' in lines
    claim = '| (b) two kernels beat K3 | `k3_k5_selected` - `k3` | 3 | +1.00 (-1.48 to +3.48) | 0.225 |'
    assert claim in lines
    command = (
        'python tools/run_ablation.py --train-images 9 --test-images 9 --batch-size 2 --seeds 0 1 2 7 8 --threads 1'
    )
    assert command in lines
    assert '9 runs, 0.1 hours, on a CPU (cpu, threads: 1), torch 2.' in text
    assert 'Attention' not in text
    less = [{key: value for key, value in found.items() if key != 'top1_small'} for found in KNOWN]
    assert '| `se` | 1,000 | 2.50 | 1 | 99.00 |  | 99.00 | 100.00 |  |  |' in markdown(less, []).splitlines()
    with pytest.raises(ValueError, match='there are no runs yet'):
        markdown([], [])


def test_rank_correlation_by_hand():
    x = np.arange(20.0)
    swapped = x.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    # 1 - 6 sum d^2 / (n (n^2 - 1)).
    for values, rho in ((np.exp(x), 1), (-x, -1), (swapped, 1 - 6 * 2 / (20 * 399))):
        assert correlate(x, values)['rho'] == pytest.approx(rho)


def test_interval_of_the_rank_correlation():
    generator = np.random.default_rng(0)
    x, noise = generator.random(200), generator.random(200)
    apart, along = correlate(x, noise), correlate(x, x + 0.5 * noise)
    assert apart['low'] < 0 < apart['high']
    assert 0.7 < along['low'] < along['rho'] < along['high'] < 1
    # By Fisher's transformation the half width is near 1.96 sqrt((1 + rho^2 / 2) / (n - 3)) (1 - rho^2).
    assert apart['high'] - apart['low'] == pytest.approx(2 * 1.96 / 197**0.5, rel=0.2)
    assert correlate(x, noise) == apart


# Attention, table and plots


def test_attention_is_that_of_the_weights(finished, garments):
    (first, second) = read_rows(finished / 'out' / 'attention.jsonl')
    assert (first['seed'], second['seed']) == (0, 1)
    assert list(first['units']) == ['SK_2_1', 'SK_2_2', 'SK_3_1', 'SK_3_2', 'SK_4_1', 'SK_4_2']
    data = Data(Path(garments), Settings(32, 1, 24, 8))
    model = build(SELECTED).eval()
    model.load_state_dict(load_file(finished / 'work' / 'k3_k5_selected_seed1.safetensors'))
    images, _, scales = data.test()
    # The unit's attention as its module gives it.
    kept = []
    unit = model.layer2[1].conv2
    handle = unit.attn.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits_of(model, images, 'cpu')
    handle.remove()
    expected = (kept[0][:, 1] - kept[0][:, 0]).mean((1, 2, 3)).numpy()
    assert_close(differences(model, images)['SK_3_2'], expected, length=model, dtype=torch.float32, scale=1.0)
    found = second['units']['SK_3_2']
    assert found['rho'] == pytest.approx(spearmanr(scales, expected).statistic, abs=0.05)
    assert found['low'] <= found['rho'] <= found['high']
    assert (len(found['curve']), second['scales'][0], second['scales'][-1]) == (8, 0.6, 2.0)


def test_attention_of_another_runs_weights_is_refused(finished, garments, tmp_path):
    shutil.copytree(finished, tmp_path / 'a')
    folder, data = tmp_path / 'a', Path(garments)
    (folder / 'out' / 'attention.jsonl').unlink()
    weights = weights_path(folder / 'work', 1)
    second = read_rows(folder / 'out' / 'runs.jsonl')[3]
    check_weights(weights, second)
    arguments = (folder / 'out', folder / 'work', data, Settings.of(second))

    other = {**second, 'settings': {**second['settings'], 'epochs': 5}}
    for metadata, differ in (({'run': json.dumps(other)}, 'settings'), (None, 'network, seed, top1, .*settings')):
        save_file(load_file(weights), weights, metadata=metadata)
        message = rf'seed1\.safetensors is not of the run of k3_k5_selected, seed 1, in runs\.jsonl \({differ} differ\)'
        with pytest.raises(ValueError, match=message):
            measure_missing(*arguments)
    assert not (folder / 'out' / 'attention.jsonl').exists()


def test_lost_weights_are_named(tool, finished, garments, tmp_path, capsys):
    shutil.copytree(finished / 'out', tmp_path / 'out')
    (tmp_path / 'out' / 'attention.jsonl').unlink()
    table = (tmp_path / 'out' / 'table.md').read_bytes()
    with pytest.raises(ValueError, match=r'k3_k5_selected, seeds 0 1: there is no .*work/k3_k5_selected_seed0'):
        tool.main(command_line(garments, tmp_path))
    assert (tmp_path / 'out' / 'table.md').read_bytes() == table
    # The report says so, and leaves no picture of what it has no rows of.
    tool.main([*command_line(garments, tmp_path), '--report'])
    assert 'attention of k3_k5_selected, seeds 0 1: not measured yet' in capsys.readouterr().err
    assert 'Attention' not in (tmp_path / 'out' / 'table.md').read_text()
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['accuracy.png', 'runs.jsonl', 'table.md']


def test_report(finished):
    from PIL import Image

    text = (finished / 'out' / 'table.md').read_text()
    assert text.count('\n| SK_') == 6
    assert text.count('\n| `k3') == 2
    for name in ('accuracy.png', 'attention.png'):
        picture = finished / 'out' / name
        assert picture.stat().st_size < 200_000
        with Image.open(picture) as image:
            assert np.asarray(image.convert('L')).std() > 10


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
    ],
)
def test_bad_options(tool, arguments, tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        tool.main([*arguments, *option])
    assert not (tmp_path / 'out').exists()


def test_no_data(tool, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nowhere: no such folder; tools/prepare_fashion_mnist.py fills it'):
        tool.main(['--data', str(tmp_path / 'nowhere'), '--out', str(tmp_path / 'out')])


@pytest.mark.parametrize('option', [['--networks', 'k4'], ['--seeds', '-1'], ['--threads', '0']])
def test_bad_arguments(tool, option, capsys):
    with pytest.raises(SystemExit):
        tool.main(option)
    assert f'argument {option[0]}: ' in capsys.readouterr().err
