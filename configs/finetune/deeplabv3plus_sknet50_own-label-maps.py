# DeepLabV3+ on SKNet-50, fine-tuned on one GPU on label maps of one's own: docs/own_boxes_and_masks.md.
_base_ = '../segmentation/deeplabv3plus_sknet50-d16_4xb4-80k_ade20k-512x512.py'

data_root = '{{$DATA:data/own}}/'
# A name a line; the first is label 0.
classes = tuple(__import__('pathlib').Path(data_root, 'classes.txt').read_text(encoding='utf-8').splitlines())
batch_size, iterations = 4, 8000

# One process: no statistics to be shared with others.
norm_cfg = dict(type='BN', requires_grad=True)
sync_bn = None
model = dict(
    decode_head=dict(num_classes=len(classes), norm_cfg=norm_cfg),
    auxiliary_head=dict(num_classes=len(classes), norm_cfg=norm_cfg),
)

# Label 0 is a class, and 255 is none.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=batch_size,
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        data_prefix=dict(img_path='images/train', seg_map_path='labels/train'),
        metainfo=dict(classes=classes),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        data_prefix=dict(img_path='images/val', seg_map_path='labels/val'),
        metainfo=dict(classes=classes),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

# The recipe's 0.01 is for 16 images a step.
optim_wrapper = dict(optimizer=dict(lr=0.01 * batch_size / 16), clip_grad=dict(_delete_=True, max_norm=10.0))
auto_scale_lr = dict(base_batch_size=batch_size)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='PolyLR', eta_min=1e-5, power=0.9, begin=200, end=iterations, by_epoch=False),
]
train_cfg = dict(max_iters=iterations, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=1000, max_keep_ckpts=1, save_best='mIoU'))
