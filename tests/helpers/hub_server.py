"""A loopback Hugging Face Hub: repositories from a dict, and the faults that a real one and the network have."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote

_PATH = re.compile(r'/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)')
_COMMIT = re.compile(r'/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>preupload|commit)/(?P<revision>[^/?]+)')
_INFO = re.compile(r'/api/models/(?P<repo>[^/]+/[^/?]+)(\?.*)?')
_RANGE = re.compile(r'bytes=(\d+)-')


@dataclass(frozen=True)
class Fault:
    """What goes wrong: a status in place of the answer, or a body that is not the file's."""

    status: int | None = None
    code: str | None = None  # X-Error-Code, by which the client tells the reasons for a status apart
    message: str | None = None
    methods: tuple[str, ...] = ('HEAD', 'GET')
    cut: float | None = None  # the share of the body that is sent before the connection closes
    announce_cut: bool = False  # with a Content-Length of the part, as a proxy with a damaged copy does
    garbage: bool = False  # as many bytes as the file has, but others
    flipped: bool = False  # the file but for its last byte
    pause: float = 0  # seconds in the middle of the body
    once: bool = False  # over after one GET


# Status, code and message as huggingface.co sends them: 401 to a client that is not logged in, 403 and 404 to others.
FAULTS = {
    'missing': Fault(404, 'RepoNotFound', 'Repository not found'),
    'unauthorized': Fault(401, 'RepoNotFound', 'Invalid username or password.'),
    'bad-token': Fault(401, None, 'Invalid credentials in Authorization header'),
    'gated': Fault(403, 'GatedRepo', 'Access to this model is restricted and you are not in the authorized list.'),
    'disabled': Fault(403, None, 'Access to this resource is disabled.'),
    'busy': Fault(429, None, 'Too many requests: slow down'),
    'down': Fault(500, None, 'Internal Error - We are working hard to fix this as soon as possible!'),
    'download-down': Fault(500, methods=('GET',)),
    'truncated': Fault(cut=0.5),
    'short': Fault(cut=0.5, announce_cut=True),
    'garbage': Fault(garbage=True),
    'flipped': Fault(flipped=True),
}


class Request(NamedTuple):
    method: str
    path: str
    range: str | None


class HubServer:
    """Serves ``/OWNER/NAME/resolve/REVISION/FILE`` on 127.0.0.1; a stopped one refuses connections on its port.

    Attributes:
        faults: a :class:`Fault` by 'OWNER/NAME/FILE', 'OWNER/NAME' or '*' for all, the first that is there.
        requests: every request so far.
        token: who has it may make repositories of ``OWNER``, and commit to them.
        private: the repositories that were made so.
    """

    OWNER = 'me'
    token = 'hf_loopback'

    def __init__(self) -> None:
        self.port = 0
        self.faults: dict[str, Fault] = {}
        self.requests: list[Request] = []
        self.private: set[str] = set()
        self._revisions: dict[str, dict[str, str]] = {}
        self._commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.port}'

    def add(self, repo: str, files: Mapping[str, bytes], *revisions: str) -> str:
        """Commit ``files`` as the whole of a repository, on branch main or on ``revisions``; returns the commit."""
        listing = '\n'.join(f'{name} {hashlib.sha1(data).hexdigest()}' for name, data in sorted(files.items()))
        commit = hashlib.sha1(f'{repo}\n{listing}'.encode()).hexdigest()
        self._commits[repo, commit] = dict(files)
        self._revisions.setdefault(repo, {}).update(dict.fromkeys([*(revisions or ('main',)), commit], commit))
        return commit

    def create(self, repo: str, private: bool) -> bool:
        """Whether a repository could be made: not where there is one of this name."""
        if repo in self._revisions:
            return False
        self.add(repo, {})
        if private:
            self.private.add(repo)
        return True

    def remove(self, repo: str) -> None:
        del self._revisions[repo]
        self.private.discard(repo)

    def has(self, repo: str) -> bool:
        return repo in self._revisions

    def files(self, repo: str) -> dict[str, bytes]:
        """What is on the branch main."""
        return dict(self._commits[repo, self._revisions[repo]['main']])

    def start(self) -> 'HubServer':
        self._server = ThreadingHTTPServer(('127.0.0.1', self.port), _Handler)
        self._server.hub = self
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def fault(self, repo: str, name: str) -> Fault:
        return next((self.faults[key] for key in (f'{repo}/{name}', repo, '*') if key in self.faults), Fault())

    def find(self, repo: str, revision: str, name: str) -> tuple[str | None, bytes | Fault]:
        """The commit and the file, or what is wrong with the request."""
        if repo not in self._revisions:
            return None, FAULTS['missing']
        commit = self._revisions[repo].get(revision)
        if commit is None:
            return None, Fault(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return commit, self._commits[repo, commit].get(name, Fault(404, 'EntryNotFound', 'Entry not found'))


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0 closes the connection after each answer, so that nothing is served once the server has stopped.
    protocol_version = 'HTTP/1.0'

    def do_GET(self) -> None:
        hub: HubServer = self.server.hub
        hub.requests.append(Request(self.command, self.path, self.headers.get('Range')))
        match = _INFO.fullmatch(self.path)
        if match is not None:
            repo = unquote(match['repo'])
            if hub.has(repo):
                self._answer_json(200, {'id': repo, 'private': repo in hub.private, 'siblings': []})
            else:
                self._refuse(FAULTS['missing'])
            return
        match = _PATH.fullmatch(self.path)
        if match is None:
            self._answer(404, {'Content-Length': 0})
            return
        repo, revision, name = map(unquote, match.groups())
        fault = hub.fault(repo, name)
        if fault.once and self.command == 'GET':
            hub.faults = {key: other for key, other in hub.faults.items() if other is not fault}
        if fault.status is not None and self.command in fault.methods:
            self._refuse(fault)
            return
        commit, found = hub.find(repo, revision, name)
        if isinstance(found, Fault):
            self._refuse(found, commit)
        else:
            self._send(commit, found, fault)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        hub: HubServer = self.server.hub
        hub.requests.append(Request(self.command, self.path, None))
        body = self._body()
        if self.path == '/api/validate-yaml':
            self._answer_json(200, {'errors': [], 'warnings': []})
            return
        if self.headers.get('Authorization') != f'Bearer {hub.token}':
            self._refuse(FAULTS['bad-token'])
            return
        if self.path == '/api/repos/create':
            asked = json.loads(body)
            repo = f'{asked["organization"]}/{asked["name"]}'
            private = asked.get('private') or asked.get('visibility') == 'private'
            if asked['organization'] != hub.OWNER:
                self._refuse(Fault(403, None, f'You have no rights to {asked["organization"]}'))
            elif not hub.create(repo, bool(private)):
                self._answer_json(409, {'error': 'You already created this model repo', 'url': f'{hub.url}/{repo}'})
            else:
                self._answer_json(200, {'url': f'{hub.url}/{repo}', 'name': repo})
            return
        match = _COMMIT.match(self.path)
        if match is None:
            self._answer(404, {'Content-Length': 0})
        elif match['what'] == 'preupload':
            files = [dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in json.loads(body)['files']]
            self._answer_json(200, {'files': files})
        else:
            fault = hub.faults.get(f'{match["repo"]}/commit')
            if fault is not None:
                self._refuse(fault)
                return
            lines = [json.loads(line) for line in body.splitlines() if line]
            added = {line['value']['path']: line['value']['content'] for line in lines if line['key'] == 'file'}
            repo = match['repo']
            commit = hub.add(repo, {**hub.files(repo), **{k: base64.b64decode(v) for k, v in added.items()}})
            self._answer_json(
                200, {'commitOid': commit, 'commitUrl': f'{hub.url}/{repo}/commit/{commit}', 'hookOutput': ''}
            )

    def do_DELETE(self) -> None:
        hub: HubServer = self.server.hub
        hub.requests.append(Request(self.command, self.path, None))
        asked = json.loads(self._body())
        hub.remove(f'{asked["organization"]}/{asked["name"]}')
        self._answer_json(200, {})

    def _body(self) -> bytes:
        if 'chunked' not in self.headers.get('Transfer-Encoding', ''):
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b''.join(parts)

    def _answer_json(self, status: int, answer: Mapping[str, object]) -> None:
        body = json.dumps(answer).encode()
        self._answer(status, {'Content-Type': 'application/json', 'Content-Length': len(body)})
        self.wfile.write(body)

    def _refuse(self, fault: Fault, commit: str | None = None) -> None:
        headers = {'X-Error-Code': fault.code, 'X-Error-Message': fault.message, 'X-Repo-Commit': commit}
        self._answer(fault.status, {'Content-Length': 0, **headers})

    def _send(self, commit: str, data: bytes, fault: Fault) -> None:
        body = b'\xff' * len(data) if fault.garbage else data
        if fault.flipped:
            body = body[:-1] + bytes([body[-1] ^ 1])
        wanted = _RANGE.fullmatch(self.headers.get('Range', ''))
        start = int(wanted[1]) if wanted else 0
        rest = body[start:]
        part = rest if fault.cut is None else rest[: int(fault.cut * len(rest))]
        announced = part if fault.announce_cut and self.command == 'GET' else rest
        headers = {
            'X-Repo-Commit': commit,
            'ETag': f'"{hashlib.sha256(data).hexdigest()}"',
            'Content-Length': len(announced),
            'Content-Range': f'bytes {start}-{len(body) - 1}/{len(body)}' if wanted else None,
        }
        self._answer(206 if wanted else 200, headers)
        if self.command == 'GET':
            half = len(part) // 2
            self.wfile.write(part[:half])
            if fault.pause:
                self.wfile.flush()
                time.sleep(fault.pause)
            self.wfile.write(part[half:])

    def _answer(self, status: int, headers: Mapping[str, object]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *args) -> None:
        pass
