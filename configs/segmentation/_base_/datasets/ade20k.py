# By its path: see ../default_runtime.py.
_base_ = f'{__import__("mmseg").__path__[0]}/.mim/configs/_base_/datasets/ade20k.py'

auto_scale_lr = dict(base_batch_size=16)  # 4 GPUs x 4 images
