_base_ = [
    '_base_/models/deeplabv3plus_skshufflenetv2-x1.0-d16.py',
    '_base_/datasets/cityscapes.py',
    '_base_/schedules/schedule_160k.py',
    '_base_/default_runtime.py',
]

model = dict(data_preprocessor=dict(size=(512, 1024)))
train_dataloader = dict(batch_size=4, num_workers=4)
auto_scale_lr = dict(base_batch_size=16)  # 4 GPUs x 4 images
