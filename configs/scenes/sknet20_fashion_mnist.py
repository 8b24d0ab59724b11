# SKNet-20, a quarter as wide as SKNet-50, on garments of three channels at 56x56: the detector and the classifier of
# tools/prepare_scenes.py's scenes start from it. 0.84M parameters; some minutes on a CPU core.
_base_ = [
    '../_base_/models/sknet_small.py',
    '../_base_/models/sknet20.py',
    '../_base_/datasets/fashion_mnist_bs128.py',
    '../_base_/schedules/cosine_20e.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(**_base_.pop('sknet20'), in_channels=3, small_stem=False))
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
three_channels = [
    dict(type='NumpyToPIL'),
    dict(type='torchvision/Grayscale', num_output_channels=3),
    dict(type='torchvision/Resize', size=56),
]
train_pipeline = [
    *three_channels,
    # A garment of a scene is no more in the middle of its receptive field.
    dict(type='torchvision/RandomAffine', degrees=0, translate=(0.2, 0.2), scale=(0.6, 1.2)),
    dict(type='PILToNumpy'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [*three_channels, dict(type='PILToNumpy'), dict(type='PackInputs')]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

max_epochs = 2
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=max_epochs)
auto_scale_lr = dict(base_batch_size=128)
