_base_ = 'retinanet_sknet50_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        type='mmpretrain.SKResNet',
        depth=18,
        init_cfg=dict(checkpoint='hf-hub:timm/skresnet18.ra_in1k'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
