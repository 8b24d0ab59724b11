# sknet20_fashion_mnist.py's network on the garments as tools/prepare_scenes.py's scenes show them: tinted, over other
# things, half hidden. The segmentor starts from it.
_base_ = 'sknet20_fashion_mnist.py'
load_from = 'work_dirs/sknet20_fashion_mnist/epoch_2.pth'

data_preprocessor = dict(to_rgb=True)
train_dataloader = dict(
    batch_size=64,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root='data/scenes',
        ann_file='annotations/garments_train.txt',
        data_prefix='garments/train',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomCrop', crop_size=64, padding=6),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root='data/scenes',
        ann_file='annotations/garments_val.txt',
        data_prefix='garments/val',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
        test_mode=True,
    ),
)
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=3e-3, weight_decay=0.05), clip_grad=dict(max_norm=5.0)
)
max_epochs = 3
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=100),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=max_epochs)
auto_scale_lr = dict(base_batch_size=64)
