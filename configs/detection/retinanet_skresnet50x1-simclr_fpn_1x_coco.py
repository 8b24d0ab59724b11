_base_ = 'retinanet_sknet50_fpn_1x_coco.py'
model = dict(
    data_preprocessor=dict(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0]),
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SKResNetSimCLR',
        depth=50,
        width_factor=1,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='hf-hub:lightly-ai/simclrv2-imagenet1k-r50_1x_sk1'),
    ),
)
