"""tools/deployment_table.py: what it tries, and that docs/deployment.md has what it found."""

import json
from pathlib import Path

import pytest
from _export import INT8, TARGET_NAMES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('deployment_table')


@pytest.fixture(scope='module')
def results(tool):
    return json.loads((ROOT / tool.RESULTS).read_text(encoding='utf-8'))


def test_every_target_and_network(tool, results):
    titles = [title for _, title in tool.NETWORKS]
    assert sorted(results['matrix']) == sorted(TARGET_NAMES)
    for target, found in results['matrix'].items():
        assert sorted(found) == sorted(titles)
        for row in found.values():
            assert row.get('difference', 1) < 1e-4 or (target == 'coreml' and 'written' in row)


def test_times_and_eight_bits_of_every_runtime(tool, results):
    assert sorted(results['times']) == sorted(tool.RUN_HERE)
    assert sorted(results['int8']) == sorted(INT8)
    for found in results['int8'].values():
        assert found['accuracy']['file'] >= found['accuracy']['eager'] - 0.5


def test_page(tool, results, tmp_path, monkeypatch):
    page = (ROOT / tool.PAGE).read_text(encoding='utf-8')
    (tmp_path / 'page.md').write_text(page, encoding='utf-8')
    monkeypatch.setattr(tool, 'PAGE', tmp_path / 'page.md')
    tool.main(['--write', '--results', str(ROOT / tool.RESULTS)])
    assert (tmp_path / 'page.md').read_text(encoding='utf-8') == page


def test_tables_of_a_part(tool):
    """One image at a time, and a runtime whose accuracy alone is known."""
    found = {'ncnn': {'skshufflenetv2_x1_0': {'skshufflenetv2_x1_0': {'1': 3.0}, 'shufflenetv2_x1_0': {'1': 2.0}}}}
    assert '| `ncnn` | `shufflenetv2_x1_0` | 2.0 ms |  | 1.50 |  |' in tool.time_table(found)
    times = {'sknet50 int8': {'1': 1.0}, 'sknet50 float': {'1': 2.0}, 'resnext50_32x4d int8': {}}
    found = {'litert': {'times': times}, 'aoti': {'accuracy': {'file': 83.4, 'eager': 83.85}}}
    table = tool.int8_table(found).splitlines()
    assert table[2:] == [
        '| `aoti` |  |  |  |  |  |  | 83.40 % | 83.85 % |',
        '| `litert` | 1.0 ms |  | 0.50 |  |  |  |  |  |',
    ]


def test_one_network_in_one_runtime(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, 'SIZE', 32)
    results = tmp_path / 'results.json'
    tool.main(['--run', 'torchscript', '--networks', 'SK-ShuffleNetV2 1.0x', '--results', str(results)])
    found = json.loads(results.read_text(encoding='utf-8'))
    assert found['matrix']['torchscript']['SK-ShuffleNetV2 1.0x']['difference'] < 1e-4


def test_accuracy_needs_a_model(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(['--accuracy', 'onnx', '--model', 'work_dirs/flowers'])
    assert 'argument --accuracy: takes --model and --images' in capsys.readouterr().err
