# SKNet-20, a quarter as wide as SKNet-50: the backbone of the scenes' networks. Their configs take it out of _base_, so
# that it is nowhere but in their model.
sknet20 = dict(
    depth=26,
    layers=(1, 2, 2, 1),
    channels=(16, 32, 64, 128),
    cardinality=8,
    base_width=16,
    stem_type='deep',
    stem_width=8,
    channels_last=True,
)
