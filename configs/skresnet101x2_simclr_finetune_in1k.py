_base_ = './skresnet50x1_simclr_finetune_in1k.py'

model = dict(
    backbone=dict(
        depth=101, width_factor=2, init_cfg=dict(checkpoint='hf-hub:lightly-ai/simclrv2-imagenet1k-r101_2x_sk1')
    ),
    head=dict(in_channels=4096),
)
