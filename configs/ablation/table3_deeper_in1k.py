# ResNeXt-56.
_base_ = '../resnext50_32x4d_in1k.py'

model = dict(backbone=dict(layers=(3, 4, 8, 3)))
