# SKNet-101 that starts with the outputs of ResNeXt-101 32x4d: its weights, and true 5x5 kernels, which begin as the 3x3
# with zeros around.
_base_ = [
    '_base_/models/sknet_in1k.py',
    '_base_/datasets/imagenet_bs32.py',
    '_base_/schedules/imagenet_bs256_warm.py',
    '_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        depth=101,
        sk_kwargs=dict(dilated=False),
        init_cfg=dict(type='WarmStart', checkpoint='hf-hub:timm/resnext101_32x4d.gluon_in1k'),
    ),
    head=dict(init_cfg=dict(type='WarmStart', checkpoint='hf-hub:timm/resnext101_32x4d.gluon_in1k')),
)
