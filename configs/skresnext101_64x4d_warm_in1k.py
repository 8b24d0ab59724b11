# From ResNeXt-101 64x4d.
_base_ = './sknet101_warm_in1k.py'

model = dict(
    backbone=dict(
        type='SKResNeXt',
        groups=64,
        width_per_group=4,
        init_cfg=dict(checkpoint='hf-hub:timm/resnext101_64x4d.c1_in1k'),
    ),
    head=dict(init_cfg=dict(checkpoint='hf-hub:timm/resnext101_64x4d.c1_in1k')),
)
