"""tools/model_table.py, and that README.md has what it counts."""

from pathlib import Path

import pytest

from sk_plugins import zoo

README = Path(__file__).resolve().parents[2] / 'README.md'


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('model_table')


@pytest.fixture(scope='module')
def table(tool):
    return tool.markdown()


@pytest.mark.parametrize(
    ('name', 'parameters', 'gflops'),
    [('sknet26', 16_746_408, 2.59), ('sknet50', 27_479_784, 4.46), ('sknet101', 48_736_040, 8.45)],
)
def test_count(tool, name, parameters, gflops):
    counted = tool.count(name)
    assert counted[0] == parameters
    assert counted[1] == pytest.approx(gflops, abs=0.005)


def test_count_at_another_size(tool):
    # Convolutions alone go with the area; the attention and the classifier don't.
    assert 3.9 < tool.count('sknet26', 128)[1] / tool.count('sknet26', 64)[1] < 4


def test_table(table):
    head, rule, *rows = table.splitlines()
    assert len(rows) == len(zoo.MODELS)
    assert {line.count('|') for line in (head, rule, *rows)} == {8}
    for row, name in zip(rows, zoo.MODELS):
        assert name in row
    sknet50 = next(row for row in rows if 'sknet50' in row)
    for figure in ('27,479,784', '27.5M', '4.46', '4.47', '20.79 / 19.32', '80.15', 'timm/skresnext50_32x4d.ra_in1k'):
        assert figure in sknet50


def test_insert(tool):
    before = f'# Title\n\n{tool.BEGIN}\nold\n{tool.END}\nAfter.\n'
    after = tool.insert(before, '| new |')
    assert after == f'# Title\n\n{tool.BEGIN}\n| new |\n{tool.END}\nAfter.\n'
    assert tool.insert(after, '| new |') == after


@pytest.mark.parametrize('write', [False, True])
def test_main(tool, tmp_path, monkeypatch, capsys, write):
    readme = tmp_path / 'README.md'
    readme.write_text(f'{tool.BEGIN}\nold\n{tool.END}\n')
    monkeypatch.setattr(tool, '__file__', str(tmp_path / 'tools' / 'model_table.py'))
    monkeypatch.setattr(tool, 'markdown', lambda: '| → |')
    tool.main(['--write'] if write else [])
    assert capsys.readouterr().out == '| → |\n'
    expected = '| → |' if write else 'old'
    assert readme.read_text(encoding='utf-8') == f'{tool.BEGIN}\n{expected}\n{tool.END}\n'


def test_readme_is_up_to_date(tool, table):
    text = README.read_text(encoding='utf-8')
    assert tool.insert(text, table) == text, 'run `python tools/model_table.py --write`'
