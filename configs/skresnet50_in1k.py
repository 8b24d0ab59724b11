_base_ = './sknet50_in1k.py'

model = dict(backbone=dict(type='SKResNet', depth=50))
