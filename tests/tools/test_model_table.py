"""tools/model_table.py, and that docs/models.md and README.md have what it counts."""

import json
from pathlib import Path

import _counts
import pytest
from _tables import insert_table

from sk_plugins import zoo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('model_table')


@pytest.fixture(scope='module')
def rows():
    return _counts.rows()


@pytest.mark.parametrize(
    ('name', 'parameters', 'gflops', 'strides'),
    [
        ('sknet26', 16_746_408, 2.59, (2, 4, 8, 16, 32)),
        ('sknet50', 27_479_784, 4.46, (2, 4, 8, 16, 32)),
        ('sknet101', 48_736_040, 8.45, (2, 4, 8, 16, 32)),
        ('skresnet18', 11_958_056, 1.81, (2, 4, 8, 16, 32)),
        ('shufflenetv2_x0_5', 1_366_792, 0.0405, (2, 4, 8, 16, 32)),
        ('skshufflenetv2_x1_0', 2_459_410, 0.148, (2, 4, 8, 16, 32)),
        ('resnext29_16x32d', 25_229_220, 4.03, (1, 1, 2, 4)),
    ],
)
def test_rows(name, parameters, gflops, strides):
    row = _counts.count(zoo.MODELS[name])
    assert row.parameters == parameters
    assert row.gflops == pytest.approx(gflops, rel=0.005)
    assert row.output_strides == strides


@pytest.mark.slow
def test_all_models_have_a_row(rows):
    assert [row.name for row in rows] == list(zoo.MODELS)


def test_activations_by_hand():
    # ResNeXt-29's stem, its nine units of three convolutions and three shortcuts, and its classifier.
    shapes = [(64, 32)]
    for width, out, side, before in ((512, 256, 32, 32), (1024, 512, 16, 32), (2048, 1024, 8, 16)):
        shapes += [(width, before), (width, side), (out, side), (out, side)] + 2 * [(width, side)] * 2
        shapes += 2 * [(out, side)]
    expected = sum(channels * side**2 for channels, side in shapes) + 100
    assert _counts.count(zoo.MODELS['resnext29_16x32d']).activations == expected


def test_count_at_another_size():
    # Convolutions alone go with the area; the attention and the classifier don't.
    spec = zoo.MODELS['sknet26']
    assert 3.9 < _counts.count(spec, 128).gflops / _counts.count(spec, 64).gflops < 4


@pytest.mark.slow
def test_papers_figures_stand_beside_the_counted(tool, rows):
    head, rule, *lines = tool.markdown(rows).splitlines()
    assert len(lines) == len(zoo.MODELS)
    assert {line.count('|') for line in (head, rule, *lines)} == {len(tool.HEAD) + 1}
    sknet50 = next(line for line in lines if '`sknet50`' in line)
    for figure in (
        '27,479,784',
        '27.5M (-0.1 %)',
        '4.46',
        '4.47 (-0.2 %)',
        '17.18M',
        '2 4 8 16 32',
        '20.79 (224), 19.32 (320)',
        '[timm/skresnext50_32x4d.ra_in1k](https://huggingface.co/timm/skresnext50_32x4d.ra_in1k) 80.15',
    ):
        assert figure in sknet50
    sknet29 = next(line for line in lines if '`sknet29_16x32d`' in line)
    assert '27.7M (+0.7 %)' in sknet29
    assert '3.47 (CIFAR-10), 17.33 (CIFAR-100)' in sknet29
    assert sum('(timm)' in line for line in lines) == 4


def test_the_page_has_a_row_for_every_model():
    page = (ROOT / 'docs/models.md').read_text(encoding='utf-8')
    assert [name for name in zoo.MODELS if f'`{name}`' not in page] == []


@pytest.mark.parametrize('write', [False, True])
def test_main(tool, tmp_path, monkeypatch, capsys, write):
    pages = [tmp_path / 'docs' / 'models.md', tmp_path / 'README.md']
    pages[0].parent.mkdir()
    for page in pages:
        page.write_text(f'{tool.BEGIN}\nold\n{tool.END}\n')
    monkeypatch.setattr(tool, '__file__', str(tmp_path / 'tools' / 'model_table.py'))
    rows = [_counts.count(zoo.MODELS[name]) for name in ('sknet26', 'sknet50')]
    monkeypatch.setattr(tool, 'rows', lambda: rows)
    table = tool.markdown(rows)
    tool.main(['--json', str(tmp_path / 'models.json'), *(['--write'] if write else [])])
    assert capsys.readouterr().out == table + '\n'
    for page, text in zip(pages, (table, tool.short_markdown(rows))):
        assert page.read_text(encoding='utf-8') == f'{tool.BEGIN}\n{text if write else "old"}\n{tool.END}\n'
    written = json.loads((tmp_path / 'models.json').read_text())
    assert [row['name'] for row in written] == ['sknet26', 'sknet50']
    assert written[1]['parameters'] == 27_479_784
    assert written[1]['output_strides'] == [2, 4, 8, 16, 32]
    assert written[1]['parameters_difference'] == pytest.approx(-0.0007, abs=1e-4)
    assert written[1]['gflops_difference'] == pytest.approx(-0.0016, abs=1e-4)
    assert written[0]['gflops_difference'] is None
    assert written[1]['paper_errors'] == {'224': 20.79, '320': 19.32}


@pytest.mark.slow
def test_short_table(tool, rows):
    head, rule, *lines = tool.short_markdown(rows).splitlines()
    assert [line.split('`')[1] for line in lines] == list(tool.TEN)
    assert {line.count('|') for line in (head, rule, *lines)} == {len(tool.SHORT_HEAD) + 1}
    assert next(line for line in lines if '`sknet50`' in line).startswith(
        '| `sknet50` | 27.5M | 4.46 | 20.79 (224), 19.32'
    )


@pytest.mark.parametrize(('page', 'form'), [('docs/models.md', 'markdown'), ('README.md', 'short_markdown')])
@pytest.mark.slow
def test_pages_are_up_to_date(tool, rows, page, form):
    text = (ROOT / page).read_text(encoding='utf-8')
    assert insert_table(text, getattr(tool, form)(rows), tool.BEGIN, tool.END) == text, 'run `make table`'
