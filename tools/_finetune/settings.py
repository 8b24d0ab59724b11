"""What is chosen for a run: the network and its weights, sizes, the recipe; and the lines that say so."""

import ast
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors, hf_hub_download
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader

import sk_plugins.mmpretrain_models  # noqa: F401
from sk_plugins import zoo
from sk_plugins._resources import ROOT, find_config
from sk_plugins._text import counted, nearest
from sk_plugins.openmmlab.runtime import loading  # noqa: F401
from sk_plugins.weights import CheckpointError, HubError, load_checkpoint, timm_arguments
from sk_plugins.weights.fit import COUNTER
from sk_plugins.weights.hub import PartialLoad, split_revision
from sk_plugins.weights.names import BACKBONE, is_timm_format

from .checking import Facts
from .data import ImageSet

__all__ = [
    'Network',
    'Recipe',
    'choose_network',
    'choose_recipe',
    'describe',
    'load_weights',
    'with_preprocessing',
]

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet
BASE_BATCH = 32
PREPROCESSING = ('input_size', 'crop_pct', 'interpolation', 'mean', 'std')


@dataclass(frozen=True)
class Network:
    """A backbone of the project's and the weights that it starts from.

    Attributes:
        name: as the user gave it.
        backbone: OpenMMLab's config of it, without ``init_cfg``.
        features: channels of its last stage.
        parameters: how many it has.
        source: a file, an address or ``hf-hub:OWNER/NAME``; None where it starts from nothing.
        license: of these weights, where that is known.
        preprocessing: theirs, where they have some of their own: ``input_size``, ``crop_pct``, ``interpolation``,
            ``mean`` and ``std`` of 0 to 1.
    """

    name: str
    backbone: dict[str, Any]
    features: int
    parameters: int
    source: str | None = None
    license: str | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


def choose_network(
    name: str, weights: str | None = None, from_scratch: bool = False, warm_start: bool = False, freeze: int = -1
) -> Network:
    """The network of a name, or of a config's backbone, and where its weights come from.

    Raises:
        ValueError: an unknown name or tag, or a network without weights where none are named.
    """
    known = {spec.name: spec for spec in zoo.MODELS.values()}
    tagless = name.partition('.')[0]
    published: zoo.Weights | None = None
    source = weights
    license_ = None
    if tagless in known and not Path(name).is_file():
        spec = known[tagless]
        kind, arguments = spec.openmmlab
        backbone = dict(type=kind, **arguments)
        published = next((w for w in spec.weights if name in (spec.name, f'{spec.name}.{w.tag}')), None)
        if published is None and name != spec.name:
            tags = ', '.join(f'{spec.name}.{w.tag}' for w in spec.weights)
            raise ValueError(f'--model {name}: {spec.name} has {"the tags " + tags if tags else "no tags"}')
        if warm_start and weights is None:
            published = _relative(spec)
            if published is None:
                raise ValueError(f'--warm-start: no published weights fit into {name} in part: --weights names others')
        if weights is None and not from_scratch:
            if published is None:
                raise ValueError(_say_lack(spec))
            source = f'hf-hub:{published.hf_hub_id}' if published.hf_hub_id else published.url
            license_ = published.license
    else:
        backbone, source = _of_config(name, known, weights)
    if from_scratch:
        source, published = None, None
    backbone = {**backbone, 'frozen_stages': freeze} if freeze >= 0 else backbone
    with torch.device('meta'), DefaultScope.overwrite_default_scope('mmpretrain'):
        built = MODELS.build(backbone)
    if freeze >= 0 and source is None:
        raise ValueError(f'--freeze {freeze}: stages without weights would stay as they were initialised')
    preprocessing = {}
    if published is not None and weights is None:
        preprocessing = {key: getattr(published, key) for key in PREPROCESSING}
    parameters = sum(p.numel() for p in built.parameters())
    return Network(name, backbone, built.num_features, parameters, source, license_, preprocessing)


def _relative(spec: zoo.ModelSpec) -> zoo.Weights | None:
    """Published weights of the same shape with other units: torchvision's, for ShuffleNetV2 with SE or SK units."""
    kind, arguments = spec.openmmlab
    if kind != 'SKShuffleNetV2':
        return None
    plain = zoo.find(kind, **{**arguments, 'unit': 'plain'})
    return plain.weights[0] if plain and plain.weights else None


def _say_lack(spec: zoo.ModelSpec) -> str:
    have = [one.name for one in zoo.MODELS.values() if one.weights]
    warm = ', --warm-start takes what fits of its plain counterpart' if _relative(spec) else ''
    return (
        f'{spec.name} has no published weights: --from-scratch trains from nothing{warm}, --weights names a file or '
        f'hf-hub:OWNER/NAME; these models have weights: {", ".join(have)}'
    )


def _of_config(name: str, known: Mapping[str, Any], weights: str | None) -> tuple[dict[str, Any], str | None]:
    try:
        path = find_config(name)
    except FileNotFoundError as error:
        hub = '; weights of the Hub go with --weights' if name.startswith(('hf-hub:', 'hf_hub:')) else ''
        names = [*known, *(path.stem for path in (ROOT / 'configs').glob('*.py'))]
        raise ValueError(
            f'--model {name}: neither a network of this project nor a config{hub or nearest(name, names)}'
        ) from error
    if path.suffix not in ('.py', '.json', '.yml', '.yaml'):
        raise ValueError(f'--model {name}: is no config; a checkpoint to start from goes with --weights')
    model = Config.fromfile(path).get('model') or {}
    backbone = dict((model.get('backbone') or {}).to_dict()) if model.get('backbone') else {}
    backbone['type'] = str(backbone.get('type')).removeprefix('mmpretrain.')
    if backbone['type'] not in {spec.openmmlab[0] for spec in zoo.MODELS.values()} | {'SKResNeXt'}:
        raise ValueError(f'--model {name}: its backbone is {backbone["type"]!r}, and not one of this project')
    for key in ('out_indices', 'frozen_stages'):
        backbone.pop(key, None)
    if backbone.get('in_channels', 3) != 3:
        backbone['in_channels'] = 3  # images are read in colour
    own = (backbone.pop('init_cfg', None) or {}).get('checkpoint')
    return backbone, weights or own


def load_weights(network: Network) -> PartialLoad | None:
    """Fetch the weights that the run will start from, and compare them with the network.

    Raises:
        CheckpointError, HubError, FileNotFoundError: they cannot be had; the message names the way without them.
    """
    if network.source is None:
        return None
    try:
        loaded = CheckpointLoader.load_checkpoint(network.source, map_location='cpu')
    except (CheckpointError, HubError, FileNotFoundError) as error:
        raise type(error)(
            f'{error}; --from-scratch trains without weights (on a CPU a small network: --model sknet_digits), '
            '--weights names others'
        ) from error
    given = loaded.get('state_dict', loaded)
    given = given if is_timm_format(given) else {k.removeprefix(BACKBONE): v for k, v in given.items()}
    given = {k: v for k, v in given.items() if not k.endswith(COUNTER)}
    with torch.device('meta'), DefaultScope.overwrite_default_scope('mmpretrain'):
        wanted = {k: v for k, v in MODELS.build(network.backbone).state_dict().items() if not k.endswith(COUNTER)}
    fitting = [k for k in wanted if k in given and given[k].shape == wanted[k].shape]
    if not fitting:
        raise CheckpointError(f'{network.source}: none of its {len(given)} tensors fits {network.name}')
    return PartialLoad(
        tuple(fitting), tuple(k for k in wanted if k not in fitting), tuple(k for k in given if k not in fitting)
    )


def with_preprocessing(network: Network) -> Network:
    """The network with the preprocessing that its weights say of themselves: the size, mean and deviation they know.

    A folder for the Hub, or a repository, says it in ``config.json``, a checkpoint of mmengine's in its config's text,
    of which nothing is run.
    """
    if network.source is None or network.preprocessing:
        return network
    found = _read_preprocessing(network.source)
    found = {key: found[key] for key in PREPROCESSING if found.get(key) is not None}
    if len(found.get('mean', ())) != 3 or len(found.get('std', ())) != 3:
        return network
    return replace(network, preprocessing=found)


def _read_preprocessing(source: str) -> Mapping[str, Any]:
    beside = Path(source).parent / 'config.json'
    if source.startswith('hf-hub:'):
        repo, revision = split_revision(source.removeprefix('hf-hub:'))
        try:
            beside = Path(hf_hub_download(repo, 'config.json', revision=revision))
        except (errors.HTTPError, OSError, ValueError):  # it has none
            return {}
    elif not Path(source).is_file():
        return {}
    try:
        if beside.is_file():
            config = json.loads(beside.read_text(encoding='utf-8'))
            return {**config, **(config.get('pretrained_cfg') or {})}
        config = _parse(str(load_checkpoint(source)[1].get('cfg') or ''))
        data = config['model'].get('data_preprocessor') or config['data_preprocessor']
        return timm_arguments(config)[2] if data.get('to_rgb') else {}
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError):
        return {}


def _parse(text: str) -> dict[str, Any]:
    """The variables of a config as mmengine writes it: literals and ``dict(...)`` alone."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
            return {word.arg: value(word.value) for word in node.keywords}
        if isinstance(node, ast.Dict):
            return {ast.literal_eval(key): value(item) for key, item in zip(node.keys, node.values)}
        if isinstance(node, ast.List | ast.Tuple):
            return [value(item) for item in node.elts]
        return ast.literal_eval(node)

    return {
        node.targets[0].id: value(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


@dataclass(frozen=True)
class Recipe:
    """How it is trained.

    Attributes:
        size: side of the input in pixels; ``resize`` that of the short side before the centre crop.
        batch, lr, epochs, patience: ``patience`` is the epochs without a better score after which it stops.
        layer_decay: the learning rate's factor from a layer to the one below it.
        mean, std: of 0 to 255.
        flip: whether images are mirrored at random.
        amp, device, workers: mixed precision, ``'cpu'`` or ``'cuda'``, and the processes that read images.
        topk: the accuracies that are reported.
    """

    size: int
    resize: int
    interpolation: str
    batch: int
    lr: float
    weight_decay: float
    layer_decay: float
    epochs: int
    patience: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    amp: bool
    device: str
    workers: int
    topk: tuple[int, ...]


def choose_recipe(images: ImageSet, facts: Facts, network: Network, device: str, given: Mapping[str, Any]) -> Recipe:
    """The recipe for these images; what is in ``given``, and not None, stays as it is."""
    given = {key: value for key, value in given.items() if value is not None}
    own = network.preprocessing
    published_size = own.get('input_size', (3, 224, 224))[-1]
    pretrained = network.source is not None
    size = given.get('size') or _size(facts.side, published_size, pretrained, network.backbone.get('small_stem', False))
    batch = given.get('batch_size') or _batch(len(images.train))
    steps = math.ceil(len(images.train) / batch)
    epochs = given.get('epochs') or _epochs(steps, pretrained)
    lr = given.get('lr') or (LR_PRETRAINED if pretrained else LR_SCRATCH) * math.sqrt(batch / BASE_BATCH)
    cores = os.cpu_count() or 1
    workers = min(8, cores - 1) if device != 'cpu' else min(2, cores // 2)
    return Recipe(
        size=size,
        resize=round(size / own.get('crop_pct', 0.875)),
        interpolation=own.get('interpolation', 'bicubic'),
        batch=batch,
        lr=float(f'{lr:.3g}'),
        weight_decay=given.get('weight_decay', 0.05),
        layer_decay=given.get('layer_decay', 1.0),
        epochs=epochs,
        patience=given.get('patience', _patience(steps, epochs, pretrained)),
        mean=tuple(round(255 * value, 3) for value in own['mean'])
        if 'mean' in own
        else MEAN
        if pretrained
        else facts.mean,
        std=tuple(round(255 * value, 3) for value in own['std']) if 'std' in own else STD if pretrained else facts.std,
        flip=given.get('flip', not facts.grey),
        amp=given.get('amp', device != 'cpu'),
        device=device,
        workers=given.get('workers', workers),
        topk=(1, 5) if len(images.classes) > 5 else (1,),
    )


LR_PRETRAINED, LR_SCRATCH = 1e-3, 2e-3


def _size(side: int, most: int, pretrained: bool, small_stem: bool) -> int:
    """Small images gain nothing from being blown up further, and cost as much.

    Twice their side, since the stem takes a quarter of it, though above 128 pixels only for the sake of weights that
    were trained on large images. A stem for small images takes them nearly as they are.
    """
    if small_stem:
        return max(16, min(most, 8 * math.ceil(side / 8)))
    wanted = 2 * side if pretrained else min(2 * side, max(side, 128))
    return max(64, min(most, 32 * math.ceil(wanted / 32)))


def _batch(images: int) -> int:
    """32, or a power of two with which an epoch has four steps; the attention's BatchNorm needs two images."""
    return max(2, min(BASE_BATCH, 2 ** int(math.log2(max(2, images / 4)))))


def _epochs(steps: int, pretrained: bool) -> int:
    """So many that there are some 600 steps, or 1,500 from nothing; few images are seen more often."""
    least, most = (10, 30) if pretrained else (20, 60)
    return max(least, min(most, math.ceil((600 if pretrained else 1500) / steps)))


def _patience(steps: int, epochs: int, pretrained: bool) -> int:
    """A third of the epochs, five at least, and at least 200 steps, or 500 from nothing.

    A dozen held-out images are no reason to stop a run of a minute: their score rises and falls by chance.
    """
    return max(5, epochs // 3, math.ceil((200 if pretrained else 500) / steps))


def describe(
    images: ImageSet, facts: Facts, network: Network, loaded: PartialLoad | None, recipe: Recipe, step_s: float | None
) -> list[str]:
    """The six lines that say what was chosen."""
    counts = sorted(images.counts(images.train).values())
    kind = 'labels, several an image' if images.multi_label else 'classes'
    tensors = 'from nothing: random weights'
    if loaded is not None:
        total = len(loaded.loaded) + len(loaded.initialised)
        licence = f' ({network.license})' if network.license else ''
        tensors = f'{len(loaded.loaded)} of {total} tensors from {network.source}{licence}, the classifier new'
    decay = f', {recipe.layer_decay:g} times that a layer down' if recipe.layer_decay < 1 else ''
    steps = math.ceil(len(images.train) / recipe.batch)
    time = '' if step_s is None else f', about {say_time(1.3 * step_s * steps * recipe.epochs)} for all of them'
    mirrored = 'mirrored at random' if recipe.flip else 'not mirrored'
    score = 'mAP' if images.multi_label else f'top-1 (top-{" and top-".join(map(str, recipe.topk))} reported)'
    cpu = f'CPU, {counted(torch.get_num_threads(), "thread")}'
    on = cpu if recipe.device == 'cpu' else torch.cuda.get_device_name()
    stops = f'stops after {counted(recipe.patience, "epoch")} without a better {score}'
    if recipe.patience >= recipe.epochs:
        stops = f'the best {score} is kept'
    return [
        f'images    {len(images.train)} to train on, {len(images.val)} held out; {len(images.classes)} {kind}, '
        f'{"" if counts[0] == counts[-1] else f"{counts[0]} to "}{counted(counts[-1], "image")} each',
        f'model     {network.name}, {network.parameters / 1e6:.1f}M parameters; {tensors}',
        f'input     {recipe.size} x {recipe.size} pixels (the images: {facts.side}), '
        f'{mirrored}, mean {_numbers(recipe.mean)}, std {_numbers(recipe.std)}',
        f'recipe    AdamW, learning rate {recipe.lr:g}{decay}, batch {recipe.batch}, '
        f'weight decay {recipe.weight_decay:g}',
        f'length    {counted(recipe.epochs, "epoch")} of {counted(steps, "step")}{time}; {stops}',
        f'machine   {on}, {"mixed precision" if recipe.amp else "float32"}, '
        f'{counted(recipe.workers, "process") if recipe.workers else "no other process"} to read images',
    ]


def say_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes:02d} min'
    return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'


def _numbers(values: tuple[float, ...]) -> str:
    return '/'.join(f'{value:.0f}' for value in values)
