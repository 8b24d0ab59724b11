_base_ = './sknet50_in1k.py'

model = dict(backbone=dict(type='SKResNet', depth=18), head=dict(in_channels=512))
