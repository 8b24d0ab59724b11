# Fine-tuning the whole network on all labels, from the pretrained features.
_base_ = [
    '_base_/models/simclr_in1k.py',
    '_base_/datasets/imagenet_simclr.py',
    '_base_/schedules/imagenet_fine_tuning.py',
    '_base_/default_runtime.py',
]

# 8 GPUs x 128 images.
train_dataloader = dict(batch_size=128)
