_base_ = './skresnet50x1_simclr_in1k.py'

model = dict(
    backbone=dict(
        depth=152, width_factor=3, init_cfg=dict(checkpoint='hf-hub:lightly-ai/simclrv2-imagenet1k-r152_3x_sk1')
    ),
    head=dict(in_channels=6144),
)
