"""What mmengine's training falls short of, put right through its own hooks, loops and registries.

Importing this package registers it all; ``sk_plugins.mmpretrain_models`` imports it, and with that every config does.
"""

from . import distributed as distributed
from . import images as images
from . import loading as loading
from . import losses as losses
from . import resuming as resuming
