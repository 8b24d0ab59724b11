"""What `make train` promises: a minute or two of training, and at least 97 % of the held-out digits right."""

import re

import pytest

pytest.importorskip('mmpretrain')
pytest.importorskip('sklearn')

pytestmark = pytest.mark.slow


def test_sknet_digits_reaches_97_percent_through_timm(python_tool, tmp_path):
    python_tool('train', 'configs/sknet_digits.py', '--work-dir', tmp_path, cwd=tmp_path)
    checkpoint = (tmp_path / 'last_checkpoint').read_text()
    printed = python_tool('classify_digits', checkpoint, cwd=tmp_path).stdout
    (accuracy,) = re.findall(r'top-1 through timm, 360 held-out images: ([\d.]+)%', printed)
    assert float(accuracy) >= 97.0
    assert (tmp_path / 'digits.png').is_file()
