data_preprocessor = dict(num_classes=10, mean=[77.8], std=[95.9], to_rgb=False)

enlarge = dict(type='Resize', scale=16, backend='pillow', interpolation='bicubic')
train_pipeline = [
    enlarge,
    dict(type='Rotate', angle=10.0, prob=0.7, pad_val=0, interpolation='bilinear'),
    dict(type='Shear', magnitude=0.15, prob=0.5, pad_val=0, interpolation='bilinear'),
    dict(type='RandomCrop', crop_size=16, padding=1),
    dict(type='PackInputs'),
]
test_pipeline = [
    enlarge,
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,  # mmpretrain's own train script defaults to True
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='Digits', split='train', pipeline=train_pipeline),
)

val_dataloader = dict(
    batch_size=120,
    num_workers=0,
    persistent_workers=False,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='Digits', split='test', pipeline=test_pipeline),
)
val_evaluator = dict(type='Accuracy', topk=(1,))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
