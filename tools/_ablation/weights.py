"""The weights of the network whose attention is measured, with the row of their run."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sk_plugins._files import write_atomically

from .networks import SELECTED
from .rows import Row


def weights_path(work_dir: Path, seed: int) -> Path:
    return work_dir / f'{SELECTED}_seed{seed}.safetensors'


def save_weights(model: nn.Module, path: Path, row: Row) -> None:
    """Write a model's weights, with the row of their run as metadata, whole or not at all."""
    weights = {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
    with write_atomically(path) as partial:
        save_file(weights, partial, metadata={'run': json.dumps(row)})


def check_weights(path: Path, row: Row) -> None:
    """Raises ValueError where a file's weights are not those of the run of ``row``, which its metadata holds."""
    with safe_open(path, 'pt') as file:
        held = json.loads((file.metadata() or {}).get('run', '{}'))
    differ = [key for key in row if held.get(key) != row[key]]
    if differ:
        raise ValueError(
            f'{path} is not of the run of {row["network"]}, seed {row["seed"]}, in runs.jsonl ({", ".join(differ)} '
            'differ): choose the --work-dir of that run'
        )
