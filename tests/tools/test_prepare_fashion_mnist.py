"""tools/prepare_fashion_mnist.py on small files in the same format, and on the real ones where they are."""

import gzip
import math
import re
import struct

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

from mmpretrain.datasets import FashionMNIST

# One of mmpretrain's for every image it reads.
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:mmpretrain')

NAMES = [name for name, _ in FashionMNIST.train_list + FashionMNIST.test_list]


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('prepare_fashion_mnist')


@pytest.fixture
def source(tool, tmp_path, monkeypatch):
    """The four files of a set of 6 + 4 images, which the tool is told to expect."""
    folder = tmp_path / 'source'
    folder.mkdir()
    small = {name: (header[0], 6 if 'train' in name else 4, *header[2:]) for name, header in tool.HEADERS.items()}
    monkeypatch.setattr(tool, 'HEADERS', small)
    for name, header in small.items():
        (folder / name).write_bytes(gzip.compress(idx(header)))
    return folder


def idx(header):
    values = np.random.default_rng(len(header)).integers(0, 10, math.prod(header[1:]), np.uint8)
    return struct.pack(f'>{len(header)}I', *header) + values.tobytes()


def test_real_headers(tool):
    assert list(tool.HEADERS) == NAMES
    assert list(tool.HEADERS.values()) == [(2051, 60000, 28, 28), (2049, 60000), (2051, 10000, 28, 28), (2049, 10000)]


def test_unpacks(tool, source, tmp_path, capsys):
    out = tmp_path / 'data' / 'fashion_mnist'
    tool.main(['--source', str(source), '--out', str(out)])
    expected = {name.removesuffix('.gz'): gzip.decompress((source / name).read_bytes()) for name in NAMES}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
    assert capsys.readouterr().out.splitlines() == [str(out / name) for name in expected]
    for split, size in (('train', 6), ('test', 4)):
        data = FashionMNIST(data_root=str(out), split=split, test_mode=split == 'test', download=False)
        assert len(data) == size
        assert data.get_data_info(0)['img'].shape == (28, 28)
    # Again, over what is there.
    assert [path.name for path in tool.prepare(source, out)] == list(expected)
    assert len(list(out.iterdir())) == 4


def test_defaults(tool, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(tool, 'prepare', lambda source, out: calls.append((str(source), str(out))) or [])
    tool.main([])
    assert calls == [('/usr/share/datasets/fashion-mnist', 'data/fashion_mnist')]


@pytest.mark.parametrize('damaged', NAMES)
@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (lambda packed: gzip.compress(gzip.decompress(packed)[:-1]), r'is not Fashion-MNIST: expected \d+ bytes'),
        (lambda packed: gzip.compress(gzip.decompress(packed) + b'\0'), r'is not Fashion-MNIST: expected \d+ bytes'),
        (lambda packed: gzip.compress(b'\1' + gzip.decompress(packed)[1:]), r'is not Fashion-MNIST: .* header \(20'),
        (lambda packed: gzip.compress(b''), r'is not Fashion-MNIST: expected \d+ bytes'),
        (lambda packed: packed[:-6], 'is not a whole gzip file'),
        (lambda packed: packed[:20] + b'\xff' * 8 + packed[28:], 'is not a whole gzip file'),
        (lambda packed: b'<html>', 'is not a whole gzip file'),
    ],
    ids=['short', 'long', 'header', 'empty', 'truncated', 'damaged', 'text'],
)
def test_wrong_file(tool, source, tmp_path, damaged, damage, said):
    path = source / damaged
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f'{re.escape(str(path))} {said}'):
        tool.prepare(source, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_missing_files(tool, source, tmp_path):
    (source / NAMES[1]).unlink()
    (source / NAMES[3]).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf'--source .*: no {NAMES[1]}, {NAMES[3]} there; .*dataset-fashion-mnist'
    ):
        tool.prepare(source, tmp_path / 'out')
    with pytest.raises(FileNotFoundError, match=NAMES[0]):
        tool.prepare(tmp_path / 'nowhere', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_real_files(tool, tmp_path):
    if not all((tool.DEBIAN / name).is_file() for name in NAMES):
        pytest.skip(f'no Fashion-MNIST in {tool.DEBIAN}: install the package dataset-fashion-mnist')
    out = tmp_path / 'fashion_mnist'
    tool.main(['--out', str(out)])
    # Headers of 16 and 8 bytes before 28 x 28 pixels and one label each.
    assert {path.name: path.stat().st_size for path in out.iterdir()} == {
        'train-images-idx3-ubyte': 16 + 60000 * 784,
        'train-labels-idx1-ubyte': 8 + 60000,
        't10k-images-idx3-ubyte': 16 + 10000 * 784,
        't10k-labels-idx1-ubyte': 8 + 10000,
    }
    test = FashionMNIST(data_root=str(out), split='test', test_mode=True, download=False)
    assert len(test) == 10000
    assert test.CLASSES[int(test.get_data_info(0)['gt_label'])] == 'Ankle boot'
    for path in out.iterdir():  # 55 MB, and pytest keeps tmp_path of three runs
        path.unlink()
