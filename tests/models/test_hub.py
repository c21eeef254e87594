"""Models by name, against a Hub of our own that speaks the real one's protocol on this machine."""

import base64
import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
import urllib.parse

import fsspec
import pytest
from examples import ROOT

from repo_jax.models import hub

SECRET = "hf_" + "s3cretS3cret" * 3  # alice's
OTHERS = {"bob": "hf_" + "bobbobbob" * 4, "reader": "hf_" + "onlyreads" * 4, "narrow": "hf_" + "narrowone" * 4}
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b'{"of": "words"}',
    "tokenizer_config.json": b'{"of": "tokens"}',
    "chat_template.jinja": b"{{ messages }}",
    "tokenizer.model": b"pieces",
    "merges.txt": b"a b",
    "README.md": b"---\nlicense: mit\n---\n",
}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "original/model.safetensors": b"again",
    "onnx/config.json": b"{}",
    "logo.png": b"picture",
}


# The Hub


class Repo:
    """Branches of files; a commit is named by its content."""

    def __init__(self, files: dict[str, bytes], *, gated=False, private=False, **branches: dict[str, bytes]):
        self.branches = {"main": files} | branches
        self.gated, self.private, self.allowed = gated, private, {"alice"}

    def commit(self, revision: str) -> str | None:
        """The commit of a branch, or of a commit."""
        names = {
            hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest(): b for b, files in self.branches.items()
        }
        return {b: name for name, b in names.items()}.get(revision) or (revision if revision in names else None)

    def files(self, revision: str) -> dict[str, bytes]:
        return next(files for b, files in self.branches.items() if revision in (b, self.commit(b)))


class Server(http.server.ThreadingHTTPServer):
    """What the Hub answers to models being looked for, fetched and pushed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.requests, self.broken = {}, [], False
        self.users = {
            SECRET: {
                "name": "alice",
                "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}],
            },
            OTHERS["bob"]: {"name": "bob", "orgs": []},
            OTHERS["reader"]: {"name": "alice", "orgs": [], "auth": {"accessToken": {"role": "read"}}},
            OTHERS["narrow"]: {"name": "alice", "orgs": [{"name": "lab", "roleInOrg": "admin"}], "auth": narrow("lab")},
        }
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str]:
        """The files that were asked for since this was last called."""
        found = [path.rsplit("/", 1)[-1] for method, path in self.requests if method == "GET" and "/resolve/" in path]
        self.requests.clear()
        return sorted(found)


def narrow(owner: str) -> dict:
    """What the Hub says of a token that may write to one owner's repositories, and read all."""
    scoped = [
        {"entity": {"type": "user", "name": "alice"}, "permissions": ["repo.content.read"]},
        {"entity": {"type": "org", "name": owner}, "permissions": ["repo.content.read", "repo.write"]},
    ]
    return {"accessToken": {"role": "fineGrained", "fineGrained": {"global": ["discussion.write"], "scoped": scoped}}}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status: int, content=None, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = ""):
        self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_any(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        user = self.server.users.get(token)
        if self.server.broken:
            return self.refuse(500, message="the Hub is ill")
        if token and user is None:
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return self.reply(200, user)
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body), user)
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/([a-z-]+)/(.+)", path)
        if match is None:
            return self.refuse(404)
        name, action, rest = match.groups()
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and (user is None or user["name"] not in repo.allowed)):
            return self.refuse(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if action == "auth-check":
            return self.reply(200, {}) if self.may_write(name, user) else self.refuse(403, message="no rights")
        if action in ("branch", "preupload", "commit"):
            return self.write(name, repo, action, rest, body, user)
        revision, _, file = (rest, "", "") if action != "resolve" else rest.partition("/")
        if repo.commit(revision) is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = repo.commit(revision), repo.files(revision)
        if action == "revision":
            return self.reply(200, {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})
        if action == "tree":
            return self.reply(
                200,
                [
                    {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for p, b in files.items()
                ],
            )
        if repo.gated and (user is None or user["name"] not in repo.allowed):
            return self.refuse(401 if user is None else 403, "GatedRepo", f"Access to model {name} is restricted.")
        if file not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        self.reply(200, files[file], ETag=f'"{hashlib.sha1(files[file]).hexdigest()}"', X_Repo_Commit=commit)

    do_GET = do_HEAD = do_POST = handle_any

    def may_write(self, name: str, user: dict | None) -> bool:
        owner, token = name.split("/")[0], (user or {}).get("auth", {}).get("accessToken", {})
        if user is None or token.get("role") == "read":
            return False
        if token.get("role") == "fineGrained":
            return owner == "lab"
        return owner == user["name"] or {"name": owner, "roleInOrg": "write"} in user["orgs"]

    def create(self, wanted: dict, user: dict | None):
        name = f"{wanted.get('organization') or user['name']}/{wanted['name']}"
        place = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repos:
            return self.reply(409, place | {"error": "You already created this model repo"})
        if not self.may_write(name, user):
            return self.refuse(403, message="You don't have the rights to create a model under this namespace")
        private = "private" in (wanted.get("visibility"), wanted.get("private") and "private")
        self.server.repos[name] = Repo({".gitattributes": b""}, private=private)
        self.reply(200, place)

    def write(self, name: str, repo: Repo, action: str, rest: str, body: bytes, user: dict | None):
        if not self.may_write(name, user):
            return self.refuse(403, message="no rights")
        if action == "branch":
            known = rest in repo.branches
            repo.branches.setdefault(rest, dict(repo.branches["main"]))
            return self.reply(409 if known else 200, {})
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self.reply(
                200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
            )
        files = repo.branches[rest]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
            elif line["key"] == "header":
                repo.message = line["value"]["summary"]
        self.reply(
            200, {"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": repo.commit(rest), "success": True}
        )


@pytest.fixture(scope="module")
def the_server():
    with Server() as server:
        yield server
        server.shutdown()


@pytest.fixture
def server(the_server):
    the_server.repos.clear()
    the_server.requests.clear()
    the_server.broken = False
    return the_server


# Where the calls are made: huggingface_hub reads its environment when it is imported


class Caller:
    """Calls functions of hub in a process with an environment of its own, and looks that no token is ever shown."""

    def __init__(self, home: pathlib.Path, **environment: str):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = kept | {"HF_HOME": str(home), "PYTHONPATH": str(ROOT)} | environment
        self.errors = home.with_suffix(".errors")
        with open(self.errors, "wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORK],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                cwd=home.parent,
                text=True,
            )

    def __call__(self, function: str, *args, token: str | None = None, **kwargs):
        """What the function returns; what it raises is raised here."""
        print(json.dumps([function, args, kwargs, token]), file=self.process.stdin, flush=True)
        reply = self.process.stdout.readline()
        for secret in (SECRET, *OTHERS.values(), *([token.strip()] if token else [])):
            assert secret not in reply and secret not in self.errors.read_text()
        result, error, message = json.loads(reply)
        if error is not None:
            assert "\n" not in message
            raise {"ValueError": ValueError, "ConnectionError": ConnectionError}.get(error, OSError)(message)
        return result

    def close(self):
        self.process.stdin.close()
        assert self.process.stdout.read() == "", "what commands print as JSON must stay whole"
        self.process.wait()


WORK = """
import json, os, sys
from repo_jax.models import hub
for line in sys.stdin:
    function, args, kwargs, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    try:
        reply = getattr(hub, function)(*args, **kwargs)
        reply = [str(reply), None, None]
    except Exception as error:
        reply = [None, type(error).__name__, str(error)]
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Hugging Face's folder on a machine, with its cache."""
    return tmp_path_factory.mktemp("machine") / "home"


@pytest.fixture(scope="module")
def online(the_server, home):
    caller = Caller(home, HF_ENDPOINT=the_server.url)
    yield caller
    caller.close()


@pytest.fixture(scope="module")
def offline(the_server, home):
    caller = Caller(home.with_name("home"), HF_ENDPOINT=the_server.url, HF_HUB_OFFLINE="1")
    yield caller
    caller.close()


@pytest.fixture(scope="module")
def unplugged(home):
    """A machine whose network is down; port 9 answers to nobody."""
    caller = Caller(home, HF_ENDPOINT="http://127.0.0.1:9")
    yield caller
    caller.close()


def content(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in pathlib.Path(folder).rglob("*") if p.is_file()}


def fetch(caller, name, **kwargs):
    return caller("local_folder", name, cache_dir="unused", **kwargs)


def refusal(*args, **kwargs) -> str:
    """What is said of a call."""
    function, *args = args
    with pytest.raises((OSError, ValueError)) as refused:
        function(*args, **kwargs)
    return str(refused.value)


# Folders


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("org/model", tmp_path / "org" / "model", "~/org/model", "./org/model"):
        folder = hub.local_folder(name, cache_dir=tmp_path / "cache")
        assert folder.is_dir() and folder.samefile(tmp_path / "org" / "model")
    assert hub.local_folder((tmp_path / "org").as_uri(), cache_dir=tmp_path / "cache") == tmp_path / "org"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "name", ["./org/model", "/org/model", "~/model", "../model", "a/b/c", "model", "org/model/", "a--b/c"]
)
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(hub.local_folder, name, cache_dir=tmp_path) == (
        f"'{name}' is not a folder with a model, nor ORG/NAME as models are called on the Hub; give the folder of a Hugging Face "
        "model (config.json, safetensors, tokenizer), a gs:// or s3:// URL of one, or ORG/NAME"
    )


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    said = refusal(hub.local_folder, tmp_path / "model.safetensors", cache_dir=tmp_path)
    assert said == f"'{tmp_path}/model.safetensors' is a file; give the folder of a Hugging Face model"


@pytest.mark.parametrize("name", ["{}", "memory://model", "gs://user:hidden@bucket/model"])
def test_a_revision_is_for_the_hub_alone(name, tmp_path):
    said = refusal(hub.local_folder, name.format(tmp_path), revision="v1", cache_dir=tmp_path)
    assert said.startswith("revision 'v1' chooses among those of a model on the Hub, but '")
    assert said.endswith("is none; leave it out") and "hidden" not in said


# Adapters


def adapter(folder: pathlib.Path, *files: str, **config) -> pathlib.Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for name in files:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("revision", [None, "main"])
def test_an_adapter_leads_to_the_model_below_it(tmp_path, revision):
    (tmp_path / "base").mkdir()
    below = {"base_model_name_or_path": str(tmp_path / "base"), "revision": revision}
    plain, chatty = adapter(tmp_path / "a", **below), adapter(tmp_path / "b", "tokenizer.json", **below)
    found = hub.find_model(plain, cache_dir=tmp_path / "cache")
    assert found == (tmp_path / "base", tmp_path / "base", plain)
    assert hub.find_model(chatty, cache_dir=tmp_path / "cache") == (tmp_path / "base", chatty, chatty)
    merged = adapter(tmp_path / "c", "config.json", **below)
    assert hub.find_model(merged, cache_dir=tmp_path / "cache") == (merged, merged, None)


@pytest.mark.parametrize("config", [{}, {"base_model_name_or_path": None}])
def test_an_adapter_of_nothing_is_refused(tmp_path, config):
    folder = adapter(tmp_path / "a", **config)
    assert refusal(hub.find_model, folder, cache_dir=tmp_path) == (
        f"'{folder}/adapter_config.json' does not say base_model_name_or_path; write there what the adapter belongs to"
    )


def test_an_adapter_whose_model_is_missing_names_both(tmp_path):
    folder = adapter(tmp_path / "a", base_model_name_or_path="/nowhere/llama")
    said = refusal(hub.find_model, folder, cache_dir=tmp_path)
    assert said.startswith(
        f"'{folder}' is an adapter of '/nowhere/llama', which is not found: '/nowhere/llama' is not a folder"
    )
    assert said.endswith(f"; or write where it is into '{folder}/adapter_config.json'")


# Fetching from the Hub


def test_a_model_is_fetched_without_what_is_not_read_and_only_once(server, online):
    server.repos["lab/fetched"] = Repo(FILES | UNWANTED)
    folder = fetch(online, "lab/fetched")
    assert content(folder) == FILES and server.fetched() == sorted(FILES)
    assert fetch(online, "lab/fetched") == folder and server.fetched() == []


def test_the_weights_are_fetched_when_they_are_needed(server, online):
    server.repos["lab/parts"] = Repo(FILES | UNWANTED)
    folder = fetch(online, "lab/parts", weights=False)
    assert content(folder) == {name: FILES[name] for name in FILES if name != "model.safetensors"}
    server.fetched()
    assert fetch(online, "lab/parts") == folder and server.fetched() == ["model.safetensors"]


def test_a_branch_and_a_commit_have_files_of_their_own(server, online):
    server.repos["lab/branches"] = repo = Repo(FILES, dev=FILES | {"config.json": b"{1}"})
    assert content(fetch(online, "lab/branches", revision="dev"))["config.json"] == b"{1}"
    assert content(fetch(online, "lab/branches"))["config.json"] == b"{}"
    assert fetch(online, "lab/branches", revision=repo.commit("dev")) == fetch(online, "lab/branches", revision="dev")


def test_an_adapter_is_fetched_with_the_model_below_it(server, online):
    described = {"base_model_name_or_path": "lab/below", "revision": "v1"}
    server.repos["lab/below"] = Repo({"config.json": b"newer"}, v1=FILES)
    server.repos["lab/adapter"] = Repo(
        {"adapter_config.json": json.dumps(described).encode(), "adapter_model.safetensors": b"ab"}
    )
    found = online("find_model", "lab/adapter", cache_dir="unused")
    below, tokenizer, over = re.findall(r"Path\('(.*?)'\)", found)
    assert content(below) == FILES and tokenizer == below
    assert content(over) == server.repos["lab/adapter"].branches["main"]


def test_the_newest_commit_is_asked_for_each_time(server, online):
    server.repos["lab/moving"] = Repo(FILES)
    fetch(online, "lab/moving")
    server.repos["lab/moving"].branches["main"] = FILES | {"config.json": b"{2}"}
    assert content(fetch(online, "lab/moving"))["config.json"] == b"{2}"


def test_a_gated_model_names_the_page_and_how_to_log_in(server, online):
    server.repos["meta/gated"] = Repo(FILES, gated=True)
    page = f"'meta/gated' is gated: accept its licence at {server.url}/meta/gated, and "
    assert refusal(fetch, online, "meta/gated") == page + "log in with `hf auth login` (or set HF_TOKEN)"
    assert refusal(fetch, online, "meta/gated", token=OTHERS["bob"]) == (
        page + "use a token of that account that may read gated models"
    )
    assert content(fetch(online, "meta/gated", token=SECRET)) == FILES


def test_a_missing_and_a_private_model_are_answered_alike(server, online):
    server.repos["lab/private"] = Repo(FILES, private=True)
    for name in ("lab/nothing", "lab/private"):
        for token in (None, OTHERS["bob"]):
            assert refusal(fetch, online, name, token=token) == (
                f"'{name}' is neither a folder here nor a model on the Hub that you may see; check the name, or if it is "
                "private log in with `hf auth login` (or set HF_TOKEN)"
            )
    assert content(fetch(online, "lab/private", token=SECRET)) == FILES


@pytest.mark.parametrize("revision", ["v9", "refs/pr/9", "0123456789abcdef0123456789abcdef01234567"])
def test_a_missing_revision_is_named(server, online, revision):
    server.repos["lab/revisions"] = Repo(FILES)
    assert refusal(fetch, online, "lab/revisions", revision=revision) == (
        f"'lab/revisions' has no revision '{revision}'; give one of its branches, tags or commits"
    )


@pytest.mark.parametrize(
    "token",
    ["hf_expiredExpiredExpired", "hf_cut\x01offInTheMiddle", "hf_withAcc\u00e9ntsInIt", "two words"],
)
def test_a_token_that_does_not_work_is_told_but_not_shown(server, online, token):
    server.repos["lab/open"] = Repo(FILES)
    said = refusal(fetch, online, "lab/open", token=token)
    assert "token" in said or "could not be fetched" in said
    assert not any(part in said for part in (token, token[3:], repr(token)[1:-1]))


def test_pickled_weights_are_not_enough(server, online):
    server.repos["lab/pickled"] = Repo({"config.json": b"{}", "pytorch_model-1.bin": b"", "pytorch_model-2.bin": b""})
    assert refusal(fetch, online, "lab/pickled") == (
        "'lab/pickled' has no weights that can be read here, only pytorch_model-1.bin, pytorch_model-2.bin; they must be "
        "safetensors: choose another revision or model, or save it again with transformers (save_pretrained)"
    )
    server.repos["lab/bare"] = Repo({"config.json": b"{}"})
    assert "has no weights that can be read here, nor any others;" in refusal(fetch, online, "lab/bare")
    fetch(online, "lab/pickled", weights=False)


def test_a_hub_that_is_down_is_told(server, online):
    server.broken = True
    said = refusal(fetch, online, "lab/never-seen")
    assert said.startswith("'lab/never-seen' is no folder here, and the Hub's cache (")
    assert f"has nothing of it, and {server.url} did not give it (" in said
    assert said.endswith("(500: the Hub is ill); check the network, or give a folder")


# Without the Hub


def test_what_was_fetched_is_found_without_a_network(server, online, unplugged, offline):
    server.repos["lab/kept"] = repo = Repo(FILES, dev=FILES | {"config.json": b"{1}"})
    folder, dev = fetch(online, "lab/kept"), fetch(online, "lab/kept", revision="dev")
    server.requests.clear()
    for caller in (unplugged, offline):
        assert fetch(caller, "lab/kept") == folder
        assert (
            fetch(caller, "lab/kept", revision="dev") == dev == fetch(caller, "lab/kept", revision=repo.commit("dev"))
        )
    assert server.requests == []


def test_a_cache_that_another_program_filled_will_do(home, offline):
    repo = home / "hub" / "models--lab--theirs"
    snapshot = repo / "snapshots" / ("a" * 40)
    for name, data in {**FILES, "refs/v1": b""}.items():
        place = repo / name if name.startswith("refs/") else snapshot / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data or b"a" * 40)
    (repo / "refs" / "main").write_text("a" * 40)
    for revision in (None, "v1", "a" * 40):
        assert fetch(offline, "lab/theirs", revision=revision) == str(snapshot)
    (snapshot / "model.safetensors").unlink()
    assert fetch(offline, "lab/theirs", weights=False) == str(snapshot)
    assert f"has no weights that can be read here, at least not in its cached copy '{snapshot}';" in refusal(
        fetch, offline, "lab/theirs"
    )


def test_what_the_cache_lacks_is_told_without_a_network(server, home, online, unplugged, offline):
    cache = f"the Hub's cache ({home}/hub) has"
    assert refusal(fetch, offline, "lab/absent") == (
        f"'lab/absent' is no folder here, and {cache} nothing of it; unset HF_HUB_OFFLINE to fetch it, or give a folder"
    )
    said = refusal(fetch, unplugged, "lab/absent", revision="v1")
    assert said.startswith(
        f"'lab/absent' at revision 'v1' is no folder here, and {cache} nothing of it, and http://127.0.0.1:9"
    )
    assert "refused" in said and said.endswith("check the network, or give a folder")
    server.repos["lab/half"] = Repo(FILES)
    fetch(online, "lab/half", weights=False)
    assert f"{cache} only a part of it; unset HF_HUB_OFFLINE" in refusal(fetch, offline, "lab/half")


# URLs


class Bucket(fsspec.AbstractFileSystem):
    """Objects with ETags, that remembers what it listed, counts what is copied and can break off."""

    protocol, cachable = "bucket", False
    objects, etags, listed, copied, fault = {}, {}, {}, [], None  # of all instances

    def ls(self, path, detail=True, **kwargs):
        under = {name: data for name, data in self.objects.items() if name.startswith(f"{path}/")}
        if not under:
            raise FileNotFoundError(path)
        listing = [
            {"name": name, "size": len(data), "type": "file", "ETag": self.etags.get(name)}
            for name, data in under.items()
            if "/" not in name.removeprefix(f"{path}/")
        ] + [{"name": f"{path}/original", "size": 0, "type": "directory"}]
        return self.listed.setdefault(path, listing)

    def invalidate_cache(self, path=None):
        self.listed.clear()

    def get_file(self, rpath, lpath, **kwargs):
        self.copied.append(rpath.rsplit("/", 1)[-1])
        weights = rpath.endswith("safetensors")
        if self.fault == "slow":
            time.sleep(0.02)
        if self.fault == "gone" and weights:
            raise RuntimeError(f"the line broke; Bearer {SECRET}")
        data = self.objects[rpath]
        pathlib.Path(lpath).write_bytes(data[:-1] if self.fault == "cut" and weights else data)


@pytest.fixture
def bucket(monkeypatch):
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    stored = {f"models/llama/{name}": data for name, data in (FILES | UNWANTED).items()}
    for name, value in {"objects": stored, "etags": {}, "listed": {}, "copied": []}.items():
        monkeypatch.setattr(Bucket, name, value)
    return Bucket


def test_a_url_is_copied_once(bucket, tmp_path):
    folder = hub.local_folder("bucket://models/llama", cache_dir=tmp_path)
    assert content(folder) == FILES and sorted(bucket.copied) == sorted(FILES)
    for url in ("bucket://models/llama", "bucket://models/llama/"):
        assert hub.local_folder(url, cache_dir=tmp_path) == folder
    assert len(bucket.copied) == len(FILES)
    assert folder.is_relative_to(tmp_path) and folder.name.startswith("llama-")


def test_a_file_that_changed_makes_another_copy(bucket, tmp_path):
    first = hub.local_folder("bucket://models/llama", cache_dir=tmp_path)
    bucket.objects["models/llama/config.json"] = b"[]"  # as long as before
    bucket.etags["models/llama/config.json"] = "2"
    second = hub.local_folder("bucket://models/llama", cache_dir=tmp_path)
    assert content(first)["config.json"] == b"{}" and content(second)["config.json"] == b"[]"


def test_an_adapter_may_lie_at_a_url_with_its_model_at_another(bucket, tmp_path):
    described = json.dumps({"base_model_name_or_path": "bucket://models/llama"}).encode()
    bucket.objects |= {"models/lora/adapter_config.json": described, "models/lora/adapter_model.safetensors": b"ab"}
    found = hub.find_model("bucket://models/lora", cache_dir=tmp_path)
    assert content(found.weights) == FILES and content(found.adapter)["adapter_model.safetensors"] == b"ab"


def test_a_copy_for_the_tokenizer_alone_is_small(bucket, tmp_path):
    assert "model.safetensors" not in content(
        hub.local_folder("bucket://models/llama", cache_dir=tmp_path, weights=False)
    )
    assert content(hub.local_folder("bucket://models/llama", cache_dir=tmp_path)) == FILES


@pytest.mark.parametrize(
    "fault, said", [("cut", "model.safetensors has 7 bytes there, 6 came"), ("gone", "the line broke")]
)
def test_a_copy_is_whole_or_not_there(bucket, tmp_path, monkeypatch, fault, said):
    monkeypatch.setattr(bucket, "fault", fault)
    refused = refusal(hub.local_folder, "bucket://models/llama", cache_dir=tmp_path)
    assert (
        refused.startswith("'bucket://models/llama' could not be read (") and said in refused and SECRET not in refused
    )
    assert content(tmp_path / "models").keys() == {path.name for path in (tmp_path / "models").glob(".*.lock")}
    monkeypatch.setattr(bucket, "fault", None)
    assert content(hub.local_folder("bucket://models/llama", cache_dir=tmp_path)) == FILES


def test_what_a_killed_process_left_is_not_taken_for_a_copy(bucket, tmp_path):
    folder = hub.local_folder("bucket://models/llama", cache_dir=tmp_path)
    part = folder.rename(folder.with_name(f".{folder.name}.part"))
    (part / "config.json").write_bytes(b"{")
    (part / "strange.json").touch()
    assert content(hub.local_folder("bucket://models/llama", cache_dir=tmp_path)) == FILES and not part.exists()


def test_two_that_want_the_same_copy_share_it(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket, "fault", "slow")
    folders = []
    threads = [
        threading.Thread(target=lambda: folders.append(hub.local_folder("bucket://models/llama", cache_dir=tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3 and len(set(folders)) == 1 and len(bucket.copied) == len(FILES)


def test_what_a_url_lacks_is_told(bucket, tmp_path):
    bucket.objects |= {"models/empty/notes.txt": b"", "models/pickled/config.json": b"{}"}
    for url, said in {
        "bucket://models/nothing": "there is no folder 'bucket://models/nothing', or none that you may see; check the URL",
        "bucket://models/empty": "'bucket://models/empty' has no config.json; give the URL of a Hugging Face model's folder",
        "bucket://models/pickled": "'bucket://models/pickled' has no safetensors; save the model again with transformers "
        "(save_pretrained)",
        f"{tmp_path.as_uri()}/nothing": f"there is no folder '{tmp_path.as_uri()}/nothing', or none that you may see; check the URL",
        "https://huggingface.co/org/model": "'https://huggingface.co/org/model' is a page of the Hub; give ORG/NAME alone, and a "
        "branch or commit as the revision",
        "nonsense://me:hidden@place/model?signature=hidden": "'nonsense://place/model' could not be read (Protocol not known: "
        "nonsense); check the URL, your rights there, and the network",
    }.items():
        assert refusal(hub.local_folder, url, cache_dir=tmp_path) == said


def test_the_package_that_a_url_needs_is_named(tmp_path, monkeypatch):
    for module in ("gcsfs", "s3fs", "adlfs"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    for scheme, package in (("gs", "'repo_jax[gs]'"), ("s3", "'repo_jax[s3]'"), ("abfs", "adlfs")):
        assert refusal(hub.local_folder, f"{scheme}://me:hidden@bucket/model", cache_dir=tmp_path) == (
            f"'{scheme}://bucket/model' needs a package that is not installed; pip install {package}"
        )


# Pushing


@pytest.fixture
def exported(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def push(caller, folder, repo_id, *, token=SECRET, private=None, **kwargs):
    return caller("push", str(folder), repo_id, private=private, commit_message="Aligned", token=token, **kwargs)


def test_what_is_pushed_is_fetched_again(server, online, exported):
    assert push(online, exported, "lab/new") == f"{server.url}/lab/new"
    assert content(fetch(online, "lab/new")) == FILES
    assert server.repos["lab/new"].message == "Aligned" and not server.repos["lab/new"].private
    assert push(online, exported, "mine", private=True) == f"{server.url}/alice/mine"
    assert server.repos["alice/mine"].private


def test_a_push_leaves_nothing_of_an_earlier_model_that_would_be_loaded(server, online, exported):
    earlier = {
        "model-00001-of-00002.safetensors": b"1",
        "model-00002-of-00002.safetensors": b"2",
        "model.safetensors.index.json": b"{}",
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"3",
        "chat_template.jinja": b"old",
    }
    theirs = {"logo.png": b"picture", "runs/model.safetensors": b"other", ".gitattributes": b""}
    server.repos["lab/again"] = Repo({**earlier, **theirs, "config.json": b"old"})
    (exported / "chat_template.jinja").unlink()
    push(online, exported, "lab/again")
    expected = {name: FILES[name] for name in FILES if name != "chat_template.jinja"}
    assert server.repos["lab/again"].branches["main"] == theirs | expected


def test_a_push_may_go_to_a_branch(server, online, exported):
    assert push(online, exported, "lab/branched", revision="dpo") == f"{server.url}/lab/branched/tree/dpo"
    push(online, exported, "lab/branched", revision="dpo")
    branches = server.repos["lab/branched"].branches
    assert branches["main"] == {".gitattributes": b""} and branches["dpo"] == FILES | branches["main"]


def test_a_push_that_is_refused_says_where_the_model_is(server, online, offline, exported):
    later = f"; the model is in '{exported}': `hf upload lab/model {exported}` pushes it"
    rights = (
        "your token may not write to 'lab/model'; use one that may (https://huggingface.co/settings/tokens), or another "
        "hub_model_id" + later
    )
    account = "'lab/model' cannot be pushed without an account; log in with `hf auth login` (or set HF_TOKEN)" + later
    unknown = "the Hub does not know your token; log in with `hf auth login` (or set HF_TOKEN) anew" + later
    for present in (False, True):
        if present:
            server.repos["lab/model"] = Repo({})
        assert refusal(push, online, exported, "lab/model", token=OTHERS["bob"]) == rights
        assert refusal(push, online, exported, "lab/model", token=OTHERS["reader"]) == rights
        assert refusal(push, online, exported, "lab/model", token=None) == account
        assert refusal(push, online, exported, "lab/model", token="hf_expiredExpiredExpired") == unknown
    said = refusal(push, offline, exported, "lab/model")
    assert said.startswith(f"'lab/model' could not be pushed to {server.url} (") and said.endswith(later)


def test_whether_a_push_will_work_is_known_beforehand_without_leaving_a_trace(server, online):
    server.repos["lab/mine"] = Repo({})
    for name, full in (
        ("lab/mine", "lab/mine"),
        ("lab/new", "lab/new"),
        ("alice/new", "alice/new"),
        ("new", "alice/new"),
    ):
        assert online("check_push", name, token=SECRET) == full
    assert online("check_push", "lab/new", token=OTHERS["narrow"]) == "lab/new"
    assert set(server.repos) == {"lab/mine"}
    assert {method for method, _ in server.requests} == {"GET"}


def test_a_push_that_cannot_work_is_refused_beforehand(server, online, offline):
    server.repos["lab/theirs"], server.repos["lab/hidden"] = Repo({}), Repo({}, private=True)

    def said(name, token=SECRET, caller=online):
        return refusal(caller, "check_push", name, token=token)

    rights = "your token may not write to '{}'; use one that may (https://huggingface.co/settings/tokens), or another hub_model_id"
    for name, token in (
        ("lab/theirs", "bob"),
        ("alice/new", "reader"),
        ("lab/theirs", "reader"),
        ("alice/new", "narrow"),
    ):
        assert said(name, OTHERS[token]) == rights.format(name)
    for owner in ("club", "else"):  # alice may only read what is the club's
        assert said(f"{owner}/new") == (
            f"'{owner}/new' would belong to '{owner}', but you may write as alice, lab; give another hub_model_id"
        )
    assert said("lab/hidden", OTHERS["bob"]).startswith("'lab/hidden' would belong to 'lab', but you may write as bob;")
    assert (
        said("lab/new", None)
        == "'lab/new' cannot be pushed without an account; log in with `hf auth login` (or set HF_TOKEN)"
    )
    assert said("lab/new", "hf_expiredExpiredExpired").startswith("the Hub does not know your token; log in with")
    assert said("runs/a/b").startswith("hub_model_id='runs/a/b' is no name that the Hub takes (")
    assert said("lab/new", caller=offline) == (
        "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or set push_to_hub to false"
    )
    server.broken = True
    assert said("lab/new").startswith(f"'lab/new' could not be pushed to {server.url} (")
