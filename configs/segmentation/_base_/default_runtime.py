# mmsegmentation's own file, by where its package lies: mmengine's `mmseg::` asks for the original distribution's name.
_base_ = f'{__import__("mmseg").__path__[0]}/.mim/configs/_base_/default_runtime.py'
custom_imports = dict(imports=['sk_plugins.mmpretrain_models'], allow_failed_imports=False)

sync_bn = 'torch'  # with a launcher: the backbone's norms, too, as the heads' are SyncBN in mmsegmentation's files
