"""tools/compare_warm_start.py: runs of a few steps on a small set of garments, and rows whose statistics are known."""

import json

import pytest

pytest.importorskip('mmpretrain')

import torch
from _ablation import data as canvases
from _ablation import warm
from _ablation.data import Data
from _ablation.rows import Settings, read_rows
from helpers.small_fashion_mnist import write_blots

pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning:mmpretrain'),
    pytest.mark.filterwarnings('ignore:The given NumPy array is not writable:UserWarning'),
]

SHORT = ['--train-images', '32', '--test-images', '24']
SETTINGS = dict(train_images=9, epochs=1, test_images=9, batch_size=2, learning_rate=0.1, weight_decay=0, scale=[1, 2])


@pytest.fixture(scope='module')
def tool(load_tool):
    yield load_tool('compare_warm_start')
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope='module')
def garments(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvases, 'BACKGROUNDS', 16)
        yield write_blots(tmp_path_factory.mktemp('garments') / 'fashion_mnist')


@pytest.fixture(scope='module')
def finished(tool, garments, tmp_path_factory):
    """The folder of all starts with one seed. Not to be written into."""
    folder = tmp_path_factory.mktemp('finished')
    tool.main(['--data', garments, '--out', str(folder), *SHORT, '--seeds', '3'])
    return folder


def test_rows(finished):
    rows = read_rows(finished / 'runs.jsonl')
    assert [(row['network'], row['seed']) for row in rows] == [(name, 3) for name in warm.STARTS]
    starts = {row['network']: row for row in rows}
    # The selection is among equal maps: before the training the network is the plain one.
    assert starts['warm']['curve'][0] == starts['plain']['curve'][0]
    assert starts['warm']['parameters'] > starts['warm_dilated']['parameters'] > starts['plain']['parameters']
    assert starts['warm']['moved'] <= 1e-5 < 1e-3 < starts['warm_dilated']['moved']
    assert starts['cold']['moved'] is None
    assert starts['cold']['curve'][0] == starts['cold_longer']['curve'][0]
    for name, row in starts.items():
        epochs = 3 if name == 'cold_longer' else 1
        assert [images for images, _ in row['curve']][-1] == 32 * epochs
        assert row['curve'][0][0] == 0
        assert 0 <= row['top1'] <= 100


def test_starts_have_equal_outputs(garments):
    runs = warm.Runs(Data(warm.Path(garments), Settings(32, 1, 24, 8)), 'cpu')
    plain, ours, dilated = (runs.start(name, 0).eval() for name in ('plain', 'warm', 'warm_dilated'))
    images = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        expected = plain(images)
        assert (ours(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (dilated(images) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_what_is_there_is_not_done_again(tool, finished, garments, tmp_path, capsys):
    lines = (finished / 'runs.jsonl').read_text().splitlines(keepends=True)
    (tmp_path / 'runs.jsonl').write_text(''.join(line for line in lines if json.loads(line)['network'] != 'cold'))
    tool.main(['--data', garments, '--out', str(tmp_path), *SHORT, '--seeds', '3'])
    assert '1 of 1: cold, seed 3: top-1' in capsys.readouterr().out
    rows = {row['network']: row for row in read_rows(tmp_path / 'runs.jsonl')}
    before = {row['network']: row for row in map(json.loads, lines)}
    assert rows.keys() == before.keys()
    assert rows['cold']['top1'] == before['cold']['top1']
    assert rows['cold']['curve'] == before['cold']['curve']


def row(network, seed, top1):
    about = dict(parameters=1000, device='cpu', hardware='a CPU', threads=1, torch='2', seconds=40.0)
    curve = [[0, top1 - 50], [9, top1]]
    moved = {'warm': 0.0, 'warm_dilated': 0.25}.get(network)
    return dict(network=network, seed=seed, top1=top1, curve=curve, moved=moved, **about, settings=SETTINGS)


def test_report(tool, tmp_path):
    figures = {'warm': (71, 72, 73), 'warm_dilated': (70, 72, 72), 'cold': (60, 62, 64), 'plain': (70, 70, 70)}
    rows = [row(name, seed, top1) for name, values in figures.items() for seed, top1 in enumerate(values)]
    (tmp_path / 'runs.jsonl').write_text(''.join(json.dumps(one) + '\n' for one in rows))
    tool.main(['--out', str(tmp_path), '--report'])
    lines = (tmp_path / 'table.md').read_text().splitlines()
    assert '| `cold` | SK, true kernels, from random weights | 1,000 | 3 |  | 12.00 ± 2.00 | 62.00 ± 2.00 |' in lines
    dilated = "SK, dilated kernels, from the plain network's weights"
    assert f'| `warm_dilated` | {dilated} | 1,000 | 3 | 25.00 ± 0.00 | 21.33 ± 1.15 | 71.33 ± 1.15 |' in lines
    assert '| a warm start beats a cold one | `warm` - `cold` | 3 | +10.00 (+7.52 to +12.48) | 0.003 |' in lines
    assert (
        '| a warm start beats a cold one that had as many images in all | `warm` - `cold_longer` | 0 |  |  |' in lines
    )
    assert (tmp_path / 'accuracy.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--seeds', '-1'], 'argument --seeds: -1 must be at least 0'),
        (['--threads', '0'], 'argument --threads: 0 must be at least 1'),
    ],
)
def test_errors(tool, arguments, message, capsys):
    with pytest.raises(SystemExit):
        tool.main(arguments)
    assert message in capsys.readouterr().err


def test_no_runs(tool, tmp_path):
    with pytest.raises(ValueError, match='there are no runs yet'):
        tool.main(['--out', str(tmp_path), '--report'])
