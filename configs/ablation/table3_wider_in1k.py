# Every output 1/16 wider; the 3x3s, of whole groups, in the last two stages.
_base_ = '../resnext50_32x4d_in1k.py'

model = dict(backbone=dict(channels=(68, 136, 272, 544)), head=dict(in_channels=2176))
