# SimCLRv2's input: RGB in [0, 1], neither shifted nor scaled, and for tests Google's own crop.
_base_ = 'imagenet_bs32.py'

data_preprocessor = dict(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0])

test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='SimCLRCrop', size=224),
    dict(type='PackInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
