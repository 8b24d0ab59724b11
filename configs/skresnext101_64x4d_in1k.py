_base_ = './skresnext50_32x4d_in1k.py'

model = dict(backbone=dict(depth=101, groups=64, width_per_group=4))
