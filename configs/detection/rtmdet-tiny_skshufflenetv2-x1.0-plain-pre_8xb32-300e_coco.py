_base_ = 'rtmdet-tiny_skshufflenetv2-x1.0_8xb32-300e_coco.py'

# torchvision's ShuffleNetV2 goes into what the two networks have in common: the stem, which stays as it is, and half of
# the rest, with statistics that no longer fit, so that every BatchNorm after the stem learns.
model = dict(
    backbone=dict(
        frozen_stages=0,
        norm_eval=False,
        init_cfg=dict(checkpoint='https://download.pytorch.org/models/shufflenetv2_x1-5666bf0f80.pth'),
    ),
)
