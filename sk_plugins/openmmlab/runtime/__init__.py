"""Training that survives, by mmengine's own hooks, loops and registries. Importing this package switches it on.

``tools/train.py`` and ``tools/test.py`` import it. With mmengine's and its frameworks' own tools a config does::

    custom_imports = dict(imports=['sk_plugins.mmpretrain_models', 'sk_plugins.openmmlab.runtime'])
    runner_type = 'SurvivingRunner'

From then on every checkpoint that mmengine loads in this process is read by :mod:`.loading`, from files and addresses,
and nothing in it is run. :class:`~.runner.SurvivingRunner` has all of the rest, which is also at hand by its name:

- ``ResumableCheckpointHook``: a run that is killed goes on as if it had not been;
- ``CheckpointFitHook``, ``ClassCountHook``, ``InvalidLossHook`` and ``TotalBatchHook``: weights that do not fit, fewer
  classes than the data has, losses that are no numbers, and another number of images a step are errors, or said;
- ``SkipUnreadable`` and ``LoadSoundImage``: image files that cannot be read are named and skipped;
- ``CPUDistributedDataParallel``: several processes on CPUs.
"""

from . import classes as classes
from . import distributed as distributed
from . import images as images
from . import loading as loading
from . import losses as losses
from . import resuming as resuming
from . import runner as runner
