# SKNet-50 under timm's name.
_base_ = './sknet50_in1k.py'

model = dict(backbone=dict(type='SKResNeXt'))
