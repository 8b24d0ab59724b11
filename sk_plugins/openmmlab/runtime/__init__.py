"""Training that survives, by mmengine's own hooks, loops and registries. Importing this package switches it on.

``tools/train.py`` and ``tools/test.py`` do; with mmengine's other tools a config does, by
``custom_imports = dict(imports=['sk_plugins.mmpretrain_models', 'sk_plugins.openmmlab.runtime'])``. From then on every
checkpoint that mmengine loads in this process is read by :mod:`.loading`, from files, ``*.safetensors`` among them, and
addresses, and nothing in it is run. The rest is at hand by its name, for a config:

- ``default_hooks.checkpoint=dict(type='ResumableCheckpointHook')``: a run that is killed goes on as if it had not been;
- ``custom_hooks=[dict(type='CheckpointFitHook'), dict(type='InvalidLossHook'), dict(type='TotalBatchHook')]``: weights
  that do not fit, losses that are no numbers, and another number of images a step are errors, or said;
- ``SkipUnreadable`` and ``LoadSoundImage``: image files that cannot be read are named and skipped;
- ``CPUDistributedDataParallel``: several processes on CPUs.

The tools put all of these into every config, and say in one line what is wrong in one (:mod:`.configs`).
"""

from . import distributed as distributed
from . import images as images
from . import loading as loading
from . import losses as losses
from . import resuming as resuming
