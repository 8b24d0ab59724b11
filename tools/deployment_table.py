"""Export networks for every runtime that is installed here, check and time them, and write docs/deployment.md's tables.

python tools/deployment_table.py --run onnx torchscript aoti   # into results/deployment.json
python tools/deployment_table.py --times onnx                  # beside timm's and the plain networks, in turn
python tools/deployment_table.py --int8 onnx                   # 8 bits beside float
python tools/deployment_table.py --accuracy onnx --model work_dirs/garments --images data/garments  # train/, val/
python tools/deployment_table.py --write                       # what was found, into docs/deployment.md

Runtimes live in environments of their own: each adds to the file what it found.
"""

import dataclasses
import datetime
import functools
import json
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from _arguments import Parser
from _errors import run
from _export import FIXED_IN_INT8, INT8, TARGET_NAMES
from _export.dense import build_dense
from _export.deployable import Deployable, prepare
from _export.int8 import QUANTISERS
from _export.running import difference, times
from _export.targets import TARGETS, write_onnx
from _tables import insert_table, markdown_table

from sk_plugins import fold_batch_norm
from sk_plugins._files import write_atomically
from sk_plugins._text import first_lines

PAGE, RESULTS = Path('docs/deployment.md'), Path('results/deployment.json')
# (name, its title): of timm, or of a config of mmdetection's or mmsegmentation's.
NETWORKS = (
    ('sknet50', 'SKNet-50'),
    ('sknet29_16x32d', 'SKNet-29'),
    ('skresnet18', 'SK-ResNet-18'),
    ('skshufflenetv2_x1_0', 'SK-ShuffleNetV2 1.0x'),
    ('retinanet_sknet50_fpn_1x_coco', 'RetinaNet'),
    ('fcn_sknet50-d8_4xb4-80k_ade20k-512x512', 'FCN'),
)
# A network, and what it is compared with: as it would be exported without this project.
PEERS = (
    ('sknet50', ('skresnext50_32x4d', 'resnext50_32x4d')),
    ('skshufflenetv2_x1_0', ('shufflenetv2_x1_0',)),
)
PACKAGES = {
    'onnx': 'onnxruntime', 'openvino': 'openvino', 'executorch': 'executorch', 'coreml': 'coremltools', 'ncnn': 'ncnn',
    'litert': 'litert-torch', 'tensorrt': 'onnx', 'torchscript': 'torch', 'aoti': 'torch',
}  # fmt: skip
SIZE = 96  # of the matrix, which is to be seconds a cell
CALIBRATION = 8  # random images: they decide nothing about time
BATCHES = ('1', '8')
TABLES = ('matrix', 'times', 'int8')
MARKS = {name: (f'<!-- {name}: tools/deployment_table.py -->', f'<!-- end of {name} -->') for name in TABLES}
RUN_HERE = [name for name in TARGET_NAMES if name not in ('coreml', 'tensorrt')]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('--run', nargs='+', choices=TARGET_NAMES, default=[], metavar='TARGET')
    titles = [title for _, title in NETWORKS]
    parser.add_argument('--networks', nargs='+', choices=titles, default=titles, metavar='TITLE', help='of --run')
    parser.add_argument('--times', nargs='+', choices=RUN_HERE, default=[], metavar='TARGET')
    parser.add_argument('--int8', nargs='+', choices=INT8, default=[], metavar='TARGET')
    parser.add_argument(
        '--accuracy', nargs='+', choices=INT8, default=[], metavar='TARGET', help='of --model in 8 bits'
    )
    parser.add_argument('--model', help='of --accuracy: the work dir of a run of finetune')
    parser.add_argument('--images', type=Path, help='of --accuracy: train/CLASS/* calibrate, val/CLASS/* are told')
    parser.add_argument('--write', action='store_true', help=f'the tables of {PAGE}')
    parser.add_argument('--repeats', type=int, default=15, help='of --times (default: 15)')
    parser.add_argument('--results', type=Path, default=RESULTS, help=f'default: {RESULTS}')
    args = parser.parse_args(argv)
    if args.accuracy and not (args.model and args.images):
        parser.error('argument --accuracy: takes --model and --images')
    for target in (*args.run, *args.times, *args.int8, *args.accuracy):
        TARGETS[target].require()
    for target in args.run:
        for name, title in (row for row in NETWORKS if row[1] in args.networks):
            _note(args.results, 'matrix', target, title, _try(target, name))
    for target in args.times:
        for name, peers in PEERS:
            _note(args.results, 'times', target, name, _time(target, name, peers, args.repeats))
    for target in args.int8:
        _note(args.results, 'int8', target, 'times', _time_int8(target, args.repeats))
    for target in args.accuracy:
        _note(args.results, 'int8', target, 'accuracy', _measure_accuracy(target, args.model, args.images))
    if args.write:
        found = json.loads(args.results.read_text(encoding='utf-8'))
        text = PAGE.read_text(encoding='utf-8')
        for name, table in zip(TABLES, (matrix, time_table, int8_table)):
            text = insert_table(text, table(found[name]), *MARKS[name])
        PAGE.write_text(text, encoding='utf-8')


def _deployable(name: str, target: str, size: int | None = None) -> Deployable:
    torch.manual_seed(0)
    if timm.is_model(name):
        net = timm.create_model(name, exportable=True).eval()
        data = timm.data.resolve_model_data_config(net)
    else:
        built = build_dense(name, None)
        assert built is not None
        net, data = built
    _spread(net)
    return prepare(net, data, name, size, dynamic=TARGETS[target].dynamic)


@torch.no_grad()
def _spread(net: torch.nn.Module) -> None:
    """Statistics and attention that differ between channels, as training leaves them."""
    for key, tensor in net.state_dict().items():
        if key.endswith('running_var'):
            tensor.uniform_(0.75, 1.25)
        elif key.endswith('running_mean'):
            tensor.normal_(0, 0.1)
        elif key.endswith('fc_select.weight'):
            tensor.normal_(0, 0.3)


def _try(target: str, name: str) -> dict[str, Any]:
    """What happened: the difference from eager mode, or that the file was written, or why not."""
    deployable = _deployable(name, target, SIZE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f'net{TARGETS[target].suffix}')
        try:
            TARGETS[target].write(deployable, path)
            if TARGETS[target].load is None:
                return {'written': TARGETS[target].inspect(deployable, path)}
            return {'difference': difference(deployable, TARGETS[target].run(path, 2))}
        except Exception as error:  # each library's own kinds: it is what the table is for
            return {'error': first_lines(error)[:200] or type(error).__name__}


def _time(target: str, name: str, peers: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """Median milliseconds for batches of 1 and 8, or 1 where the batch is not open."""
    runners = {}
    with tempfile.TemporaryDirectory() as folder:
        for net in (name, *peers):
            deployable = _deployable(net, target) if net == name else _peer(net, target)
            path = Path(folder, f'{net}{TARGETS[target].suffix}')
            write = (
                functools.partial(write_onnx, width=1) if net != name and target == 'onnx' else TARGETS[target].write
            )
            write(deployable, path)
            runners[net] = TARGETS[target].run(path, 2)
            if net != name and not _runs(runners[net], deployable, _batches(target)):
                del runners[net]  # ExecuTorch takes a plain ShuffleNet's split for one of the example's batch
        return _by_batch(times(deployable, runners, _batches(target), repeats))


def _runs(run: Callable, deployable: Deployable, batches: list[int]) -> bool:
    try:
        for batch in batches:
            run(deployable.random(batch, *deployable.size))
    except Exception as error:  # each runtime's own kinds
        print(first_lines(error))
        return False
    return True


def _time_int8(target: str, repeats: int) -> dict[str, Any]:
    """Median milliseconds of a network of ours and of the plain one, in 8 bits and in float."""
    name, peer = PEERS[0][0], PEERS[0][1][-1]
    fixed = 'batch' in FIXED_IN_INT8.get(target, ())
    found: dict[str, dict[int, float]] = {}
    for batches in [[batch] for batch in _batches(target)] if fixed else [_batches(target)]:
        runners = {}
        with tempfile.TemporaryDirectory() as folder:
            for net, deployable in ((name, _deployable(name, target)), (peer, _peer(peer, target))):
                if fixed:
                    image = deployable.random(batches[0], *deployable.size)
                    deployable = dataclasses.replace(deployable, image=image, dynamic=frozenset())
                images = [
                    deployable.random(len(deployable.image), *deployable.size, seed=i) for i in range(CALIBRATION)
                ]
                quantise = functools.partial(QUANTISERS[target], images=images, keep=frozenset())
                for kind, write in (('float', TARGETS[target].write), ('int8', quantise)):
                    path = Path(folder, f'{net}_{kind}{TARGETS[target].suffix}')
                    write(deployable, path)
                    runners[f'{net} {kind}'] = TARGETS[target].run(path, 2)
            for runner, by in times(deployable, runners, batches, repeats).items():
                found.setdefault(runner, {}).update(by)
    return _by_batch(found)


def _measure_accuracy(target: str, model: str, images: Path) -> dict[str, float]:
    """Percent of the held-out images that the file of 8 bits tells, and that eager mode does."""
    import export  # the command itself

    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, f'net{TARGETS[target].suffix}'), Path(folder, 'found.jsonl')
        of = ['--int8', str(images / 'train'), '--int8-images', '256', '--accuracy', str(images / 'val')]
        export.main([model, target, str(out), *of, '--json', str(log)])
        return json.loads(log.read_text(encoding='utf-8'))['accuracy']


def _peer(name: str, target: str) -> Deployable:
    """One of timm's as it is, with its BatchNorms folded."""
    torch.manual_seed(0)
    net = timm.create_model(name, exportable=True).eval()
    data = timm.data.resolve_model_data_config(net)
    deployable = prepare(net, data, name, dynamic=TARGETS[target].dynamic)
    return dataclasses.replace(deployable, model=fold_batch_norm(net))


def _batches(target: str) -> list[int]:
    return [1, 8] if 'batch' in TARGETS[target].dynamic else [1]


def _by_batch(found: dict[str, dict[int, float]]) -> dict[str, dict[str, float]]:
    return {net: {str(batch): ms for batch, ms in by.items()} for net, by in found.items()}


def _note(path: Path, table: str, target: str, title: str, found: dict[str, Any]) -> None:
    results = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    package = PACKAGES[target]
    of = torch.__version__.partition('+')[0] if package == 'torch' else version(package)
    found = {
        **found,
        'version': of,
        'torch': torch.__version__.partition('+')[0],
        'date': datetime.date.today().isoformat(),
    }
    if 'times' in (table, title):
        found['machine'] = f'{_cpu()}, 2 of {os.cpu_count()} cores'
    results.setdefault(table, {}).setdefault(target, {})[title] = found
    with write_atomically(path) as partial:
        partial.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
    print(f'{target:12} {title:28} {found}')


def _cpu() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(': ')[2] for line in lines if line.startswith('model name')), platform.processor())


def matrix(found: dict[str, dict[str, Any]]) -> str:
    """Runtime by network: the largest difference from eager mode, relative to the largest output."""
    titles = [title for _, title in NETWORKS]
    lines = [['target', 'tried with', *titles], ['---', '---', *['---:'] * len(titles)]]
    for target in TARGET_NAMES:
        if target not in found:
            continue
        rows = found[target]
        lines.append([f'`{target}`', _tried(target, rows), *(_cell(rows.get(title)) for title in titles)])
    return markdown_table(lines)


def _tried(target: str, rows: dict[str, dict[str, Any]]) -> str:
    """The packages' versions, those of most networks first, and the last day."""
    package = PACKAGES[target]
    with_ = Counter(
        (f'torch {row["torch"]}' if package == 'torch' else f'{package} {row["version"]}, torch {row["torch"]}')
        for row in rows.values()
    )
    tried = '; '.join(words for words, _ in with_.most_common())
    return f'{tried}; {max(row["date"] for row in rows.values())}'


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ''
    if 'error' in found:
        return f'no: {found["error"]}'.replace('|', '/').replace('\n', ' ')
    return f'{found["difference"]:.0e}' if 'difference' in found else 'converted'


def time_table(found: dict[str, dict[str, Any]]) -> str:
    """Milliseconds, and the ratios to the peers, target by target in their order."""
    lines = [
        ['target', 'network', 'batch 1', 'batch 8', 'ratio, batch 1', 'ratio, batch 8'],
        ['---'] * 2 + ['---:'] * 4,
    ]
    for target, networks in sorted(found.items(), key=lambda row: TARGET_NAMES.index(row[0])):
        for name, row in networks.items():
            own = row[name]
            nets = [name, *next(peers for net, peers in PEERS if net == name)]
            for net in nets:
                if net not in row:
                    cells = ['does not run'] * 2 + ['', '']
                else:
                    cells = [_milliseconds(row[net], b) for b in BATCHES]
                    cells += [_ratio(own, row[net], b) if net != name else '' for b in BATCHES]
                lines.append([f'`{target}`', f'`{net}`', *cells])
    return markdown_table(lines)


def int8_table(found: dict[str, dict[str, Any]]) -> str:
    """The times of 8 bits, the ratios to float's, and what they tell of held-out images."""
    name, peer = PEERS[0][0], PEERS[0][1][-1]
    heads = [f'{words}, batch {b}' for words in ('8 bits', 'of float', f'`{peer}` of float') for b in BATCHES]
    lines = [['target', *heads, 'top-1', 'in eager mode'], ['---'] + ['---:'] * (len(heads) + 2)]
    for target in TARGET_NAMES:
        if target not in found:
            continue
        row = found[target].get('times', {})
        kinds = {net: (row.get(f'{net} int8', {}), row.get(f'{net} float', {})) for net in (name, peer)}
        told = found[target].get('accuracy')
        cells = [_milliseconds(kinds[name][0], b) for b in BATCHES]
        cells += [_ratio(*kinds[net], b) for net in (name, peer) for b in BATCHES]
        lines.append([f'`{target}`', *cells, *([f'{told[k]:.2f} %' for k in ('file', 'eager')] if told else ['', ''])])
    return markdown_table(lines)


def _milliseconds(row: dict[str, float], batch: str) -> str:
    return f'{row[batch]:.1f} ms' if batch in row else ''


def _ratio(own: dict[str, float], other: dict[str, float], batch: str) -> str:
    return f'{own[batch] / other[batch]:.2f}' if batch in own and batch in other else ''


if __name__ == '__main__':
    run(main, ImportError, OSError, ValueError)
