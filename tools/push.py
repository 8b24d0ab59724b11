"""Upload a folder for the Hub: weights, config, label names and the card.

python tools/push.py work_dirs/flowers OWNER/flowers --private
python tools/push.py flowers_hub OWNER/flowers --dry-run

FOLDER is one that tools/export.py or tools/convert_checkpoint.py wrote, or the work dir of a run of finetune, which
is exported into its hub/ first. The token is that of `hf auth login`, or HF_TOKEN.
"""

import re
import sys
from pathlib import Path

from _arguments import Parser
from _errors import run
from _quiet import quiet_imports
from huggingface_hub import HfApi, errors, get_token

from sk_plugins._text import first_lines, nearest
from sk_plugins.weights import CheckpointError, HubError
from sk_plugins.weights.hub import say_cause


def find_folder(folder: Path) -> Path:
    """The Hub folder of what was named.

    Raises:
        FileNotFoundError, ValueError: it is no such folder.
    """
    if not folder.is_dir():
        there = [path.name for path in folder.absolute().parent.glob('*') if path.is_dir()]
        raise FileNotFoundError(f'{folder}: no such folder{nearest(folder.name, there)}')
    if (folder / 'config.json').is_file():
        if not (folder / 'model.safetensors').is_file():
            raise ValueError(f'{folder}: has config.json and no model.safetensors')
        return folder
    if not (folder / 'config.py').is_file():
        raise ValueError(
            f'{folder}: is neither a folder for the Hub (config.json, model.safetensors) nor a work dir of finetune '
            '(config.py)'
        )
    with quiet_imports():
        from _finetune.exporting import refresh

    return refresh(folder)


def read_card(folder: Path, repo: str) -> bytes | None:
    """The card with the repository's name in its snippets."""
    path = folder / 'README.md'
    if not path.is_file():
        return None
    return re.sub(r'OWNER/[\w.-]+', repo, path.read_text(encoding='utf-8')).encode()


def upload(folder: Path, repo: str, card: bytes | None, private: bool, update: bool) -> str:
    """Make the repository and commit the folder as a whole; returns its address.

    Raises:
        HubError: no token, a name that is taken, a public repository where a private one was asked for, no right to
            it, or no connection.
    """
    from huggingface_hub import CommitOperationAdd

    token = get_token()
    if not token:
        raise HubError(f'{repo}: no token: `hf auth login`, or set HF_TOKEN (huggingface.co/settings/tokens, "write")')
    api = HfApi(token=token)
    try:
        made = not update or not api.repo_exists(repo)
        try:
            api.create_repo(repo, private=private, exist_ok=update)
        except errors.HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            raise HubError(f'{repo}: there is a repository of this name already: --update commits to it') from error
        if private and update and not api.repo_info(repo).private:
            raise HubError(
                f'{repo}: is public already, and --private does not change that: leave it out, or make the repository '
                'private on the Hub first'
            )
        operations = [
            CommitOperationAdd(path.relative_to(folder).as_posix(), card if card and path.name == 'README.md' else path)
            for path in list_files(folder)
        ]
        try:
            done = api.create_commit(repo, operations, commit_message='Upload a model of sk-plugins')
        except BaseException:  # Ctrl-C too
            if made:
                remove_empty(api, repo)
            raise
    except HubError:
        raise
    except errors.RepositoryNotFoundError as error:
        raise HubError(f'{repo}: not found, or the token may not write to it: {say_cause(error)}') from error
    except errors.HfHubHTTPError as error:
        what = {401: 'the token is not valid', 403: 'the token may not write to it'}.get(error.response.status_code)
        raise HubError(f'{repo}: {what or "the Hub refused it"}: {say_cause(error)}') from error
    except errors.HFValidationError as error:
        raise HubError(f'{repo}: not a valid repository name: {first_lines(error)}') from error
    except (OSError, errors.HTTPError) as error:
        raise HubError(f'{repo}: the Hub cannot be reached: {say_cause(error)}') from error
    return str(done.repo_url)


def remove_empty(api: HfApi, repo: str) -> None:
    """Remove a repository that was made for what could not be uploaded, or say that it is there."""
    try:
        api.delete_repo(repo)
    except (OSError, errors.HTTPError) as error:
        print(f'{repo}: was made, is empty, and could not be removed: {say_cause(error)}', file=sys.stderr)


def list_files(folder: Path) -> list[Path]:
    """All but what is hidden, and what hidden folders hold."""

    def is_hidden(path: Path) -> bool:
        return any(part.startswith('.') for part in path.relative_to(folder).parts)

    return sorted(path for path in folder.rglob('*') if path.is_file() and not is_hidden(path))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('folder', type=Path, metavar='FOLDER')
    parser.add_argument('repo', metavar='OWNER/NAME')
    parser.add_argument('--private', action='store_true', help='make a private repository')
    parser.add_argument('--update', action='store_true', help='commit to a repository that is there already')
    parser.add_argument('--dry-run', action='store_true', help='print what would be uploaded, and the card')
    args = parser.parse_args(argv)
    if not re.fullmatch(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', args.repo):
        parser.error(f'argument OWNER/NAME: {args.repo!r} is not of this form')
    folder = find_folder(args.folder)
    card = read_card(folder, args.repo)
    files = list_files(folder)
    if args.dry_run:
        for path in files:
            print(f'{path.stat().st_size / 2**20:8.2f} MB  {path.relative_to(folder)}')
        print(f'would go to {args.repo}{", private" if args.private else ""}, from {folder}\n')
        print((card or b'').decode())
        return
    where = upload(folder, args.repo, card, args.private, args.update)
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f'{len(files)} files, {size:.1f} MB: {where}')
    print(f"timm.create_model('hf-hub:{args.repo}', pretrained=True)")


if __name__ == '__main__':
    run(main, CheckpointError, HubError, OSError, ValueError)
