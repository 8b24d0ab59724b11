_base_ = './skresnext50_32x4d_in1k.py'

model = dict(backbone=dict(depth=26))
