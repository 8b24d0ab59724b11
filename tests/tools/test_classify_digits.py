"""tools/classify_digits.py on a checkpoint of a short run."""

import re
import shutil

import pytest

pytest.importorskip('mmpretrain')

import matplotlib.pyplot as plt
import torch
from PIL import Image

from sk_plugins.openmmlab.datasets import Digits
from sk_plugins.weights import CheckpointError


@pytest.fixture(scope='module')
def tool(load_tool):
    yield load_tool('classify_digits')
    plt.close('all')


@pytest.fixture
def checkpoint(digits_run, tmp_path):
    """A copy, since the tool writes beside it."""
    return shutil.copy(digits_run / 'epoch_2.pth', tmp_path / 'epoch_2.pth')


def test_prints_and_draws(tool, load_tool, checkpoint, tmp_path, capsys):
    tool.main([str(checkpoint), '--count', '10'])
    lines = capsys.readouterr().out.splitlines()
    labels = [Digits('test').get_data_info(i)['gt_label'] for i in range(10)]
    for i, (line, label) in enumerate(zip(lines, labels)):
        assert re.fullmatch(rf'held-out image +{i}: label {label}, answer \d \(\d+\.\d%\)', line)
    *wrong, said, drawn = lines[10:]
    assert 0 < len(wrong) <= tool.MOST_WRONG  # after a few steps
    for line in wrong:
        number, label, answer = re.fullmatch(
            r'wrong, image +(\d+): label (\d), answer (\d) \(\d+\.\d%\)', line
        ).groups()
        assert int(number) >= 10
        assert int(label) == Digits('test').get_data_info(int(number))['gt_label'] != int(answer)
    assert drawn == f'drawn: {tmp_path / "digits.png"}'
    with Image.open(tmp_path / 'digits.png') as picture:
        picture.load()
        assert picture.format == 'PNG'
        assert picture.width > picture.height > 100
        assert len(set(picture.convert('L').tobytes())) > 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ['digits.png', 'epoch_2.pth']

    held_out = len(Digits('test'))
    # timm's preprocessing and network count as right what mmpretrain's do.
    words = ['sknet_digits', str(checkpoint), '--work-dir', str(tmp_path / 'run')]
    expected = load_tool('test').main(words)['accuracy/top1']
    assert said == f'top-1 through timm, {held_out} held-out images: {expected:.2f}%'


@pytest.mark.slow
def test_again(tool, checkpoint, tmp_path, capsys):
    """A second run replaces the first one's picture."""
    for count in ('3', '5'):
        tool.main([str(checkpoint), '--count', count])
    assert capsys.readouterr().out.count('held-out image ') == 3 + 5


def test_draw(tool):
    images = [Digits('test').get_data_info(i)['img'] for i in range(3)]
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    figure = tool.draw(images, [0, 1, 1], scores, columns=2)
    titles = [(axis.get_title(), axis.title.get_color()) for axis in figure.axes]
    assert titles == [('0 → 0 (90%)', 'black'), ('1 → 1 (80%)', 'black'), ('1 → 0 (60%)', 'red'), ('', 'black')]


def test_checkpoint_of_another_network(tool, tmp_path):
    torch.save({'stem.weight': torch.zeros(3)}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=r'other\.pth: not recognised: .* 1 tensors \(stem\.weight\)'):
        tool.main([str(tmp_path / 'other.pth')])
    with pytest.raises(FileNotFoundError, match=r'gone\.pth: no such checkpoint file'):
        tool.main([str(tmp_path / 'gone.pth')])


@pytest.mark.parametrize('count', ['0', '-3'])
def test_count(tool, checkpoint, count, capsys):
    with pytest.raises(SystemExit):
        tool.main([str(checkpoint), '--count', count])
    assert f'argument --count: {count} must be at least 1' in capsys.readouterr().err
