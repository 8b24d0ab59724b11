# Linear evaluation: a classifier on the frozen network. The published weights have such a classifier.
_base_ = [
    '_base_/models/simclr_in1k.py',
    '_base_/datasets/imagenet_simclr.py',
    '_base_/schedules/imagenet_linear_evaluation.py',
    '_base_/default_runtime.py',
]

model = dict(backbone=dict(frozen_stages=4, norm_eval=True))

# 8 GPUs x 512 images.
train_dataloader = dict(batch_size=512)
