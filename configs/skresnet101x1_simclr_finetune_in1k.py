_base_ = './skresnet50x1_simclr_finetune_in1k.py'

model = dict(
    backbone=dict(depth=101, init_cfg=dict(checkpoint='hf-hub:lightly-ai/simclrv2-imagenet1k-r101_1x_sk1')),
)
