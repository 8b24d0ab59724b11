# A linear classifier that starts at zero, on the mean of the last map.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SKResNetSimCLR',
        depth=50,
        width_factor=1,
        init_cfg=dict(type='Pretrained', checkpoint='hf-hub:lightly-ai/simclrv2-imagenet1k-r50_1x_sk1'),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2048,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1, 5),
        init_cfg=dict(type='Constant', layer='Linear', val=0.0, bias=0.0),
    ),
)

# For several GPUs: sync_bn = 'torch'
