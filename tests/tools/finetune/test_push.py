"""tools/push.py to a loopback Hub: what arrives, what is refused, and what timm and transformers make of it."""

import os
import re
import shutil
import time

import pytest

pytest.importorskip('mmpretrain')

import timm
import torch
from helpers.hub_server import Fault
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from sk_plugins.weights import HubError


@pytest.fixture
def push(load_tool):
    return load_tool('push').main


@pytest.fixture
def token(monkeypatch, hub):
    monkeypatch.setenv('HF_TOKEN', hub.token)


def test_dry_run(push, hub, colours_run, capsys):
    push([str(colours_run), 'me/colours', '--dry-run', '--private'])
    said = capsys.readouterr().out
    for name in ('README.md', 'config.json', 'model.safetensors', 'confusion_matrix.png'):
        assert re.search(rf' MB  {name}$', said, flags=re.MULTILINE)
    assert 'would go to me/colours, private, from' in said
    assert "timm.create_model('hf-hub:me/colours', pretrained=True)" in said
    assert hub.requests == []


@pytest.mark.usefixtures('token')
def test_card(push, hub, colours_run):
    push([str(colours_run), 'me/colours', '--private'])
    assert hub.private == {'me/colours'}
    files = hub.files('me/colours')
    card = ModelCard(files['README.md'].decode())
    assert card.data.library_name == 'timm'
    assert card.data.pipeline_tag == 'image-classification'
    (result,) = card.data.eval_results
    assert result.metric_type == 'accuracy'
    assert 0 <= result.metric_value <= 1
    assert 'OWNER/' not in card.text
    assert 'sk-plugins finetune ' in card.text
    assert '18 images to train on' not in card.text
    assert '30 images to train on, 6 held out, 3 classes' in card.text
    for picture in re.findall(r'!\[[\w ]+\]\((.+)\)', card.text):
        assert picture in files


@pytest.mark.usefixtures('token')
def test_the_cards_snippet_runs(push, hub, colours_run, colours, tmp_path, monkeypatch, capsys):
    push([str(colours_run), 'me/colours'])
    card = hub.files('me/colours')['README.md'].decode()
    (snippet,) = re.findall(r'With timm .*?```python\n(.*?)```', card, flags=re.DOTALL)
    Image.open(colours / 'red' / '3.png').save(tmp_path / 'picture.jpg')
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(snippet, 'README.md', 'exec'), {})
    assert capsys.readouterr().out.strip() in {'blue', 'green', 'red'}


@pytest.mark.usefixtures('token')
@torch.inference_mode()
def test_what_comes_back(push, hub, colours_run, colours, monkeypatch):
    """The same logits by timm, and by transformers' model and pipeline."""
    transformers = pytest.importorskip('transformers')
    push([str(colours_run), 'me/colours'])
    local = timm.create_model(f'local-dir:{colours_run / "hub"}', pretrained=True).eval()
    config = timm.data.resolve_model_data_config(local)
    picture = Image.open(colours / 'red' / '3.png').convert('RGB')
    pixels = timm.data.create_transform(**config)(picture)[None]
    logits = local(pixels)
    remote = timm.create_model('hf-hub:me/colours', pretrained=True).eval()
    assert torch.equal(remote(pixels), logits)
    assert remote.pretrained_cfg['label_names'] == ['blue', 'green', 'red']
    wrapped = transformers.AutoModelForImageClassification.from_pretrained('me/colours').eval()
    # transformers leaves weights where they lie in the file, and convolutions round by how memory is aligned.
    for tensor in (*wrapped.parameters(), *wrapped.buffers()):
        tensor.data = tensor.data.clone()
    assert torch.equal(wrapped(pixels).logits, logits)
    assert wrapped.config.id2label == {0: 'blue', 1: 'green', 2: 'red'}
    said = transformers.pipeline('image-classification', 'me/colours')(picture)
    scores = dict(zip(('blue', 'green', 'red'), logits.softmax(1)[0].tolist()))
    assert {one['label']: one['score'] for one in said} == pytest.approx(scores, abs=1e-5)


def test_hidden_folders_stay(push, hub, tmp_path, capsys):
    folder = tmp_path / '.cache' / 'hub'
    for name in ('config.json', 'model.safetensors', 'more/labels.txt', '.git/config', '.gitattributes', 'a/.b/c.txt'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{}')
    push([str(folder), 'me/x', '--dry-run'])
    said = re.findall(r' MB  (.+)$', capsys.readouterr().out, flags=re.MULTILINE)
    assert said == ['config.json', 'model.safetensors', 'more/labels.txt']


def test_no_token(push, hub, colours_run, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv('HF_TOKEN', raising=False)
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
    with pytest.raises(HubError, match=r'^me/colours: no token: `hf auth login`, or set HF_TOKEN'):
        push([str(colours_run), 'me/colours'])
    assert hub.requests == []


@pytest.mark.usefixtures('token')
@pytest.mark.parametrize('words', [[], ['--update']])
def test_an_upload_that_fails_leaves_no_repository(push, hub, colours_run, words):
    hub.faults['me/new/commit'] = Fault(413, None, 'Payload too large')
    with pytest.raises(HubError, match=r'^me/new: the Hub refused it: HTTP 413'):
        push([str(colours_run), 'me/new', *words])
    assert not hub.has('me/new')
    hub.add('me/taken', {'old.txt': b'x'})
    hub.faults['me/taken/commit'] = Fault(413, None, 'Payload too large')
    with pytest.raises(HubError, match=r'^me/taken: the Hub refused it: HTTP 413'):
        push([str(colours_run), 'me/taken', '--update'])
    assert set(hub.files('me/taken')) == {'old.txt'}


@pytest.mark.usefixtures('token')
def test_a_repository_that_cannot_be_removed(push, hub, colours_run, monkeypatch, capsys):
    hub.faults['me/new/commit'] = Fault(413, None, 'Payload too large')
    monkeypatch.setattr(HfApi, 'delete_repo', lambda *args: (_ for _ in ()).throw(OSError('no way')))
    with pytest.raises(HubError, match=r'^me/new: the Hub refused it: HTTP 413'):
        push([str(colours_run), 'me/new'])
    assert 'me/new: was made, is empty, and could not be removed: ' in capsys.readouterr().err


def test_a_failed_export_keeps_the_earlier_folder(colours_run, tmp_path, monkeypatch):
    from _finetune import exporting

    run = shutil.copytree(colours_run, tmp_path / 'run', ignore=shutil.ignore_patterns('hub'))
    before = {path.name: path.read_bytes() for path in exporting.refresh(run).iterdir()}
    assert before['README.md'].decode().partition('\n# ')[2].startswith('colours\n')
    (best,) = run.glob('best_*.pth')
    os.utime(best, ns=(time.time_ns() + 10**10,) * 2)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, 'save_hub_folder', lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            exporting.refresh(run)
    assert {path.name: path.read_bytes() for path in (run / 'hub').iterdir()} == before
    written = (run / 'hub' / 'model.safetensors').stat().st_mtime_ns
    exporting.refresh(run)
    assert (run / 'hub' / 'model.safetensors').stat().st_mtime_ns != written
    assert not [path for path in run.iterdir() if path.name.startswith('.')]


@pytest.mark.usefixtures('token')
def test_a_name_that_is_taken(push, hub, colours_run):
    hub.add('me/taken', {'old.txt': b'x'})
    with pytest.raises(
        HubError, match=r'^me/taken: there is a repository of this name already: --update commits to it'
    ):
        push([str(colours_run), 'me/taken'])
    assert set(hub.files('me/taken')) == {'old.txt'}
    push([str(colours_run), 'me/taken', '--update'])
    assert {'old.txt', 'model.safetensors'} < set(hub.files('me/taken'))


@pytest.mark.usefixtures('token')
def test_private_onto_a_public_repository(push, hub, colours_run):
    hub.add('me/public', {'old.txt': b'x'})
    with pytest.raises(HubError, match=r'^me/public: is public already, and --private does not change that'):
        push([str(colours_run), 'me/public', '--update', '--private'])
    assert set(hub.files('me/public')) == {'old.txt'}
    hub.add('me/secret', {'old.txt': b'x'})
    hub.private.add('me/secret')
    push([str(colours_run), 'me/secret', '--update', '--private'])
    push([str(colours_run), 'me/new', '--update', '--private'])
    assert hub.private == {'me/secret', 'me/new'}
    assert all('model.safetensors' in hub.files(repo) for repo in ('me/secret', 'me/new'))


@pytest.mark.usefixtures('token')
def test_refusals(push, hub, colours_run, monkeypatch):
    with pytest.raises(
        HubError, match=r'^you/colours: the token may not write to it: HTTP 403: You have no rights to you'
    ):
        push([str(colours_run), 'you/colours'])
    monkeypatch.setenv('HF_TOKEN', 'hf_other')
    with pytest.raises(HubError, match=r'^me/colours: the token is not valid: HTTP 401: Invalid credentials'):
        push([str(colours_run), 'me/colours'])
    monkeypatch.setenv('HF_TOKEN', hub.token)
    hub.stop()
    with pytest.raises(HubError, match=r'^me/colours: the Hub cannot be reached: '):
        push([str(colours_run), 'me/colours'])
