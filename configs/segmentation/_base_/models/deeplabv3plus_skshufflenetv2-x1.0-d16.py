# By its path: see ../default_runtime.py.
_base_ = f'{__import__("mmseg").__path__[0]}/.mim/configs/_base_/models/deeplabv3plus_r50-d8.py'

# A quarter of DeepLabV3+'s width, and a decoder at stride 8: ShuffleNetV2 has no stage of stride 4.
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SKShuffleNetV2',
        widen_factor=1.0,
        unit='sk',
        out_indices=(0, 1, 3),
        output_stride=16,
        # No SK-ShuffleNetV2 is published: torchvision's ShuffleNetV2 goes into what the two have in common.
        init_cfg=dict(
            type='Pretrained', checkpoint='https://download.pytorch.org/models/shufflenetv2_x1-5666bf0f80.pth'
        ),
    ),
    decode_head=dict(
        in_channels=1024, in_index=2, channels=128, dilations=(1, 6, 12, 18), c1_in_channels=116, c1_channels=32
    ),
    auxiliary_head=dict(in_channels=232, in_index=1, channels=64),
)
