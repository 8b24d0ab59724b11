_base_ = 'retinanet_sknet50_fpn_1x_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper')
