# From ResNeXt-101 32x8d.
_base_ = './sknet101_warm_in1k.py'

model = dict(
    backbone=dict(
        type='SKResNeXt',
        groups=32,
        width_per_group=8,
        init_cfg=dict(checkpoint='hf-hub:timm/resnext101_32x8d.tv2_in1k'),
    ),
    head=dict(init_cfg=dict(checkpoint='hf-hub:timm/resnext101_32x8d.tv2_in1k')),
)
