"""What a run of tools/train.py leaves in its work dir."""

import json
from pathlib import Path

from sk_plugins.weights import load_checkpoint


def log_of(work_dir, run=-1):
    """The entries of a run's scalars.json, the newest by default: (of training, of validation)."""
    scalars = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))[run]
    entries = [json.loads(line) for line in scalars.read_text().splitlines()]
    return [e for e in entries if 'loss' in e], [e for e in entries if 'accuracy/top1' in e]


def assert_sane(work_dir, epoch, iteration):
    state_dict, meta = load_checkpoint(Path(work_dir) / f'epoch_{epoch}.pth')
    assert (meta['epoch'], meta['iter']) == (epoch, iteration)
    assert all(tensor.isfinite().all() for tensor in state_dict.values())
