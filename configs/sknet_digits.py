# A small SKNet on scikit-learn's digits: a minute or two on two CPU cores, nothing to download.
_base_ = [
    '_base_/models/sknet_small.py',
    '_base_/datasets/digits.py',
    '_base_/schedules/cosine_20e.py',
    '_base_/default_runtime.py',
]

auto_scale_lr = dict(base_batch_size=64)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=1))
