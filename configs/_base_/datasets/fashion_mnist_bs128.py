# data/fashion_mnist is filled from the net where it is missing, or by tools/prepare_fashion_mnist.py.
data_preprocessor = dict(num_classes=10, mean=[72.94], std=[90.02], to_rgb=False)

train_pipeline = [
    dict(type='RandomCrop', crop_size=28, padding=2),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='FashionMNIST', data_root='data/fashion_mnist', split='train', pipeline=train_pipeline),
)

val_dataloader = dict(
    batch_size=500,
    num_workers=2,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    # mmpretrain reads the test files where test_mode is set, whatever `split` says.
    dataset=dict(
        type='FashionMNIST', data_root='data/fashion_mnist', split='test', test_mode=True, pipeline=test_pipeline
    ),
)
val_evaluator = dict(type='Accuracy', topk=(1,))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
