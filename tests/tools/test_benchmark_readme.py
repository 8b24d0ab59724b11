"""README's table of speed and its picture, from reports whose figures are known."""

import json
from pathlib import Path

import pytest
from _benchmark.drawing import draw_networks, network_bars
from _benchmark.readme import BEGIN, END, FIGURES, read_reports, renew_table, speed_table
from _benchmark.sets import SETS

ROOT = Path(__file__).resolve().parents[2]
NAMES = ('sknet50', 'skresnext50_32x4d', 'resnext50_32x4d')


@pytest.fixture(scope='module')
def report():
    return json.loads((ROOT / 'results' / 'benchmark_cpu.json').read_text(encoding='utf-8'))


def test_rows_are_figures_of_the_sets():
    for labels in FIGURES.values():
        for label, name in zip(labels, ('standard', 'gpu')):
            assert label in [figure.label for figure in SETS[name].figures]


def test_speed_table(tmp_path):
    cells = [dict(ratio=dict(median=0.556)), dict(ratio=None)]
    figures = [dict(label='training step, eager', against=cells)]
    (tmp_path / 'benchmark_cpu.json').write_text(json.dumps(dict(figures=figures)))
    head, _, *rows = speed_table(*read_reports(tmp_path)).splitlines()
    assert head.count('CPU') == head.count('GPU') == 2
    assert rows[2] == '| training step | 0.56 | not measured | not measured | not measured |'
    assert rows[0] == '| inference | not measured | not measured | not measured | not measured |'
    assert len(rows) == len(FIGURES)


def test_readme_shows_the_figures(tmp_path):
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    page = tmp_path / 'README.md'
    page.write_text(text, encoding='utf-8')
    renew_table(page, ROOT / 'results')
    assert page.read_text(encoding='utf-8') == text, 'run `make table`'


def test_picture_shows_what_was_measured(report):
    panels = network_bars(report)
    assert list(panels) == ['Inference, ms', 'Training step, ms', 'Kept for backward, MiB/image']
    rows = {(row['mode'], row['model']): row for row in report['results'] if row.get('size') is None}
    for name in NAMES:
        assert panels['Inference, ms']['eager'][name] == 1e3 * rows['infer', name]['seconds']
        assert panels['Inference, ms']['compiled'][name] == 1e3 * rows['infer', f'{name}:compile']['seconds']
        assert panels['Training step, ms']['eager'][name] == 1e3 * rows['train', name]['seconds']
        assert panels['Kept for backward, MiB/image']['eager'][name] == rows['train', name]['saved_mib']
    assert all(set(values) == set(NAMES) for groups in panels.values() for values in groups.values())


def test_draw_networks(report, tmp_path):
    pytest.importorskip('matplotlib')
    from PIL import Image

    draw_networks(report, tmp_path / 'networks.png')
    with Image.open(tmp_path / 'networks.png') as drawn:
        assert drawn.size[0] > 800
        assert len(drawn.convert('RGB').getcolors(2**24)) > 20


def test_report_measures_nothing(load_tool, tmp_path, capsys):
    """--report writes again what an earlier --json holds."""
    results = ROOT / 'results'
    readme = tmp_path / 'README.md'
    readme.write_text(f'{BEGIN}\nold\n{END}\n')
    words = ['--report', results / 'benchmark_cpu.json', '--markdown', tmp_path / 'cpu.md', '--readme', readme]
    load_tool('benchmark').main(list(map(str, words)))
    text = (results / 'benchmark_cpu.md').read_text(encoding='utf-8')
    assert (tmp_path / 'cpu.md').read_text(encoding='utf-8') == capsys.readouterr().out == text
    assert readme.read_text() == f'{BEGIN}\n{speed_table(*read_reports(results))}\n{END}\n'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('line 1', 'old.json: not JSON, and so no report of --json: Expecting value'),
        ('[]', 'old.json: no report of --json, which has title, machine, .*; it lacks title, machine, settings'),
        ('{"title": "x", "machine": 1}', 'old.json: no report .*; it lacks settings, baseline, results, columns'),
    ],
)
def test_what_is_no_report(load_tool, tmp_path, text, message):
    (tmp_path / 'old.json').write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tool('benchmark').main(['--report', str(tmp_path / 'old.json')])


@pytest.mark.parametrize(
    ('words', 'named'),
    [
        (['sknet50'], 'models'),
        (['--set', 'host'], '--set'),
        (['--mode', 'both'], '--mode'),
        (['--threads', '0'], '--threads'),
        (['--blank'], '--blank'),
        (['--memory-format', 'contiguous'], '--memory-format'),
    ],
)
def test_a_report_stands_alone(load_tool, words, named):
    report = str(ROOT / 'results' / 'benchmark_cpu.json')
    with pytest.raises(ValueError, match=f'--report measures nothing, and takes what was measured: leave {named} out'):
        load_tool('benchmark').main(['--report', report, *words])


def test_outputs_that_cannot_be(load_tool, tmp_path, report):
    page, words = tmp_path / 'page.md', ['--report', str(ROOT / 'results' / 'benchmark_cpu.json')]
    page.write_text(f'{BEGIN}\n')
    with pytest.raises(ValueError, match=r'page.md: must have the line .*end of speed.* once, not 0 times'):
        load_tool('benchmark').main([*words, '--readme', str(page)])
    (tmp_path / 'other.json').write_text(json.dumps({**report, 'results': []}))
    with pytest.raises(ValueError, match=r'--picture .*x.png: nothing was measured of the networks sknet50, '):
        load_tool('benchmark').main(['--report', str(tmp_path / 'other.json'), '--picture', str(tmp_path / 'x.png')])
    assert not (tmp_path / 'x.png').exists()


def test_readme_needs_the_files(load_tool):
    with pytest.raises(ValueError, match='--readme reads the files beside --json or --report'):
        load_tool('benchmark').main(['sknet26', '--readme', 'README.md'])
