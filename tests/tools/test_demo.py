"""tools/demo.py: what the page says, in a browser too where there is one, and the Space that it writes."""

import ast
import importlib.util
import re
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import timm
import torch
from helpers.randomised import randomise
from PIL import Image

from sk_plugins.analysis import record
from sk_plugins.analysis.demo import draw_shares, explain, make_page, name_classes

TINY = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), cardinality=8, base_width=16)
BROWSER = shutil.which('chromium') or shutil.which('google-chrome')


@pytest.fixture(scope='module')
def network():
    """With so strong an attention that it moves."""
    torch.manual_seed(0)
    network = randomise(timm.create_model('sknet26', **TINY, num_classes=3)).eval()
    for name, tensor in network.named_parameters():
        if name.endswith('fc_select.weight'):
            tensor.data *= 50
    return network


@pytest.fixture(scope='module')
def picture():
    return Image.linear_gradient('L').resize((90, 120)).convert('RGB')


@pytest.mark.parametrize('scale', [1.0, 1.7])
def test_explains(network, picture, scale):
    """The scores and the attention of the square in the middle."""
    found = explain(network, picture, scale, ('a', 'b', 'c'))
    side = 90 * 0.875 / scale
    box = (45 - side / 2, 60 - side / 2, 45 + side / 2, 60 + side / 2)
    square = picture.resize((224, 224), Image.Resampling.BICUBIC, box)
    assert (np.asarray(found.seen) == np.asarray(square)).all()
    config = timm.data.resolve_model_data_config(network)
    pixels = (np.asarray(square) / 255 - config['mean']) / config['std']
    with torch.inference_mode(), record(network) as attention:
        logits = network(torch.tensor(pixels).permute(2, 0, 1)[None].float())[0]
    assert list(found.scores) == ['a', 'b', 'c']
    assert list(found.scores.values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)
    assert found.shares.keys() == attention.keys()
    for name, (kernels, shares) in found.shares.items():
        assert kernels == ('3x3', '5x5')
        assert shares == pytest.approx(attention[name][0].mean(-1).tolist(), abs=1e-5)
        assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_labels_of_their_own(network, picture):
    several = explain(network, picture, classes=('a', 'b', 'c'), multi_label=True).scores.values()
    one = explain(network, picture, classes=('a', 'b', 'c')).scores.values()
    assert sum(one) == pytest.approx(1, abs=1e-5)
    assert sum(several) != pytest.approx(1, abs=1e-2)


def test_what_it_refuses(network, picture):
    with pytest.raises(ValueError, match=r'^scale=0\.5 must be at least 1$'):
        explain(network, picture, 0.5)
    with pytest.raises(ValueError, match='without SK units'):
        explain(timm.create_model('sknet26', **TINY, unit='plain').eval(), picture)


def test_names_of_classes():
    assert name_classes(timm.create_model('sknet26', **TINY))[0] == 'tench, Tinca tinca'
    assert name_classes(timm.create_model('sknet26', **TINY, num_classes=3)) == ('0', '1', '2')
    named = timm.create_model('sknet26', **TINY, num_classes=2, pretrained_cfg_overlay=dict(label_names=['a', 'b']))
    assert name_classes(named) == ('a', 'b')


def test_table(network, picture):
    at_one, found = (explain(network, picture, scale, ('a', '<b>', 'c')) for scale in (1.0, 2.0))
    table = draw_shares(found, at_one)
    rows = re.findall(r'data-unit="(\w+)".*?class="share">([\d.]+)&nbsp;%.*?class="moved">([+-][\d.]+)<', table)
    assert [name for name, *_ in rows] == list(found.shares)
    for name, share, moved in rows:
        now, before = found.shares[name][1][1], at_one.shares[name][1][1]
        assert float(share) == pytest.approx(100 * now, abs=0.051)
        assert float(moved) == pytest.approx(100 * (now - before), abs=0.051)
    assert any(float(moved) for *_, moved in rows)


def test_without_gradio(network, load_tool, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(ModuleNotFoundError, match=r"^the demo page takes gradio: pip install '\.\[demo\]'"):
        make_page(network)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda *args: None)
    with pytest.raises(ModuleNotFoundError, match=r'^the demo page takes gradio'):  # before weights are asked for
        load_tool('demo').main(['sknet50'])


def test_space(load_tool, tmp_path, hub, network, picture, run_python):
    """Its app.py loads the model by the package beside it; gradio is a stand-in here."""
    tool = load_tool('demo')
    files = {}
    timm.models.save_for_hf(network, tmp_path / 'files', safe_serialization=True, model_args=dict(TINY, num_classes=3))
    for path in (tmp_path / 'files').iterdir():
        files[path.name] = path.read_bytes()
    hub.add('me/tiny', files)
    space = tmp_path / 'space'
    assert tool.main(['me/tiny', '--space', str(space)]) is None
    assert {path.name for path in space.iterdir()} == {'app.py', 'README.md', 'requirements.txt', 'sk_plugins'}
    source = (space / 'app.py').read_text()
    ast.parse(source)
    assert "timm.create_model('hf-hub:me/tiny', pretrained=True)" in source
    assert (space / 'sk_plugins' / 'analysis' / 'demo.py').is_file()
    assert not list(space.rglob('__pycache__'))
    assert 'sdk: gradio' in (space / 'README.md').read_text()
    code = (
        'import sys; from unittest.mock import MagicMock; sys.modules["gradio"] = MagicMock(); '
        'from huggingface_hub import constants, file_download; '  # which have read the environment by now
        f'constants.ENDPOINT, constants.HF_HUB_CACHE = {hub.url!r}, {str(hub.cache)!r}; '
        'template = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"; '
        'constants.HUGGINGFACE_CO_URL_TEMPLATE = file_download.HUGGINGFACE_CO_URL_TEMPLATE = template; '
        f'sys.path.insert(0, {str(space)!r}); import app, sk_plugins; '
        f'assert sk_plugins.__file__.startswith({str(space)!r}); print(type(app.network).__name__)'
    )
    done = run_python('-c', code, cwd=space)
    assert done.stdout == 'SKResNet\n', done.stderr[-2000:]
    with pytest.raises(FileExistsError, match='exists and is not empty'):
        tool.main(['me/tiny', '--space', str(space)])


def test_space_of_what_is_not_on_the_hub(load_tool, network, tmp_path):
    timm.models.save_for_hf(network, tmp_path / 'x', safe_serialization=True, model_args=dict(TINY, num_classes=3))
    with pytest.raises(ValueError, match=r'^--space: .* is not on the Hub: tools/push\.py brings it there first'):
        load_tool('demo').main([str(tmp_path / 'x'), '--space', str(tmp_path / 'space')])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason='there is no browser')
def test_in_a_browser(load_tool, network, picture, tmp_path, free_port, monkeypatch):
    """A picture is dropped, its classes appear, and the slider moves the attention by as much as `explain` says."""
    gradio = pytest.importorskip('gradio')
    playwright = pytest.importorskip('playwright.sync_api')
    monkeypatch.setenv('GRADIO_ANALYTICS_ENABLED', 'False')
    folder = tmp_path / 'model'
    timm.models.save_for_hf(network, folder, safe_serialization=True, model_args=dict(TINY, num_classes=3))
    picture.save(tmp_path / 'picture.png')
    port = free_port()
    page = load_tool('demo').main([str(folder), '--port', port])
    assert isinstance(page, gradio.Blocks)
    try:
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'])
            tab = browser.new_page(viewport=dict(width=1100, height=800))
            tab.goto(f'http://127.0.0.1:{port}')
            tab.locator('#picture input[type=file]').set_input_files(str(tmp_path / 'picture.png'))
            tab.locator('#attention tr[data-unit]').first.wait_for(timeout=60_000)

            def shares():
                return {
                    row.get_attribute('data-unit'): (
                        float(row.locator('.share').inner_text().rstrip('\xa0 %')),
                        float(row.locator('.moved').inner_text()),
                    )
                    for row in tab.locator('#attention tr[data-unit]').all()
                }

            at_one = explain(network, picture)
            assert shares() == {
                name: (pytest.approx(100 * values[1], abs=0.2), 0) for name, (_, values) in at_one.shares.items()
            }
            best = max(at_one.scores, key=at_one.scores.get)
            assert f'class {best}' in tab.locator('#classes').inner_text().split('\n')[1]
            number = tab.locator('#scale input[type=number]')
            number.fill('2')
            number.press('Enter')
            tab.wait_for_function(
                "[...document.querySelectorAll('#attention .moved')].some(cell => parseFloat(cell.innerText) != 0)",
                timeout=60_000,
            )
            found = explain(network, picture, 2.0)
            assert shares() == {
                name: (
                    pytest.approx(100 * values[1], abs=0.2),
                    pytest.approx(100 * (values[1] - at_one.shares[name][1][1]), abs=0.2),
                )
                for name, (_, values) in found.shares.items()
            }
            tab.screenshot(path=str(tmp_path / 'page.png'))
            assert (tmp_path / 'page.png').stat().st_size > 10_000
            browser.close()
    finally:
        page.close()
