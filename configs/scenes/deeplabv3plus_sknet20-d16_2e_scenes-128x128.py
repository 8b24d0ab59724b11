# A small DeepLabV3+ for one CPU core, on the backbone of sknet20_scenes.py: 2 epochs of the scenes that
# tools/prepare_scenes.py makes, by the garments' kinds. Commands, figures and pictures: results/scenes.
_base_ = [
    # Why not by mmseg::, see ../segmentation/_base_/default_runtime.py.
    *(
        f'{__import__("mmseg").__path__[0]}/.mim/configs/_base_/{name}.py'
        for name in ('models/deeplabv3plus_r50-d8', 'default_runtime')
    ),
    '../_base_/models/sknet20.py',
]
custom_imports = dict(imports=['sk_plugins.mmpretrain_models'], allow_failed_imports=False)

norm_cfg = dict(type='BN')
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SKNet',
        **_base_.pop('sknet20'),
        out_indices=(0, 1, 2, 3),
        output_stride=16,
        init_cfg=dict(type='Pretrained', checkpoint='work_dirs/sknet20_scenes/epoch_3.pth'),
    ),
    decode_head=dict(
        in_channels=512,
        channels=64,
        dilations=(1, 2, 3, 4),  # of maps of 8x8
        c1_in_channels=64,
        c1_channels=24,
        num_classes=6,
        norm_cfg=norm_cfg,
    ),
    # A linear classifier of the last stage: what the backbone learns the classes from, sooner than through the head.
    auxiliary_head=dict(
        in_channels=512,
        in_index=3,
        channels=512,
        num_convs=0,
        num_classes=6,
        norm_cfg=norm_cfg,
        loss_decode=dict(loss_weight=1.0),
    ),
)

metainfo = dict(
    classes=('background', 'top', 'trousers', 'dress', 'shoe', 'bag'),
    # matplotlib's tab10.
    palette=[[0, 0, 0], [31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189]],
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),  # the photographs to train on are few
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]

train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        data_root='data/scenes',
        data_prefix=dict(img_path='images/train', seg_map_path='kinds/train'),
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        data_root='data/scenes',
        data_prefix=dict(img_path='images/val', seg_map_path='kinds/val'),
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

max_epochs = 2
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=200),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(
    logger=dict(type='LoggerHook', interval=100),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1),
    visualization=dict(type='SegVisualizationHook'),
)
log_processor = dict(by_epoch=True)
randomness = dict(seed=0)
auto_scale_lr = dict(base_batch_size=8)
