"""Models by name: a folder, a URL, or ORG/NAME on the Hugging Face Hub becomes a folder; a folder becomes a model on the Hub."""

import fnmatch
import json
import os
import pathlib
import urllib.parse
from typing import NamedTuple

import huggingface_hub
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import constants, errors
from huggingface_hub.utils import validate_repo_id

from repo_jax import urls

# What is fetched of a model; README.md says its licence. Subfolders hold the model in other formats, and Mistral's
# consolidated.safetensors is the weights a second time.
TEXTS = ["*.json", "*.jinja", "*.model", "*.txt", "README.md"]
WEIGHTS = ["*.safetensors"]
LEFT_OUT = ["*/*", "consolidated*"]

# What an earlier push may have left that would be loaded instead of, or together with, what is pushed now.
REPLACED = [
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
]

LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"


def local_folder(
    name: str | os.PathLike, *, revision: str | None = None, cache_dir: str | os.PathLike, weights: bool = True
) -> pathlib.Path:
    """The folder of a model, given as that folder, as a URL (gs://, s3://, ...) or as ORG/NAME on the Hub.

    What is not here is fetched: from the Hub into Hugging Face's own cache, where another program may have put it already, from
    elsewhere into cache_dir. Without `weights`, configuration and tokenizer are enough. Raises OSError or ValueError with one
    line that says what to change.
    """
    name = os.fspath(name)
    folder, is_url = pathlib.Path(os.path.expanduser(name)), urls.is_url(name)
    if revision is not None and (is_url or folder.is_dir()):
        raise ValueError(
            f"revision '{revision}' chooses among those of a model on the Hub, but '{urls.shown(name)}' is none; leave it out"
        )
    if is_url:
        return _from_url(name, pathlib.Path(os.path.expanduser(cache_dir)), weights)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"'{name}' is a file; give the folder of a Hugging Face model")
    if not is_hub_name(name):
        raise FileNotFoundError(
            f"'{name}' is not a folder with a model, nor ORG/NAME as models are called on the Hub; give the folder of a "
            "Hugging Face model (config.json, safetensors, tokenizer), a gs:// or s3:// URL of one, or ORG/NAME"
        )
    return _from_hub(name, revision, weights)


class ModelFiles(NamedTuple):
    """Where the parts of a model lie."""

    weights: pathlib.Path  # config.json and safetensors
    tokenizer: pathlib.Path
    adapter: pathlib.Path | None = None  # of PEFT, over these weights


def find_model(
    name: str | os.PathLike, *, revision: str | None = None, cache_dir: str | os.PathLike, weights: bool = True
) -> ModelFiles:
    """local_folder, and where the name stands for a PEFT adapter also that of the model below it, which the adapter names."""
    folder = local_folder(name, revision=revision, cache_dir=cache_dir, weights=weights)
    described = folder / "adapter_config.json"
    if (folder / "config.json").is_file() or not described.is_file():
        return ModelFiles(folder, folder)
    try:
        config = json.loads(described.read_text(encoding="utf-8"))
        base = os.fspath(config["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"'{described}' does not say base_model_name_or_path; write there what the adapter belongs to"
        ) from None
    try:
        here = urls.is_url(base) or os.path.isdir(os.path.expanduser(base))  # PEFT may write a revision all the same
        revision = None if here else config.get("revision")
        below = local_folder(base, revision=revision, cache_dir=cache_dir, weights=weights)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"'{name}' is an adapter of '{base}', which is not found: {error}; or write where it is into '{described}'"
        ) from None
    has_tokenizer = any(
        (folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    )
    return ModelFiles(below, folder if has_tokenizer else below, folder)


def is_hub_name(name: str) -> bool:
    """Whether a name has the form ORG/NAME. A relative path may look the same."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return "/" in name


# The Hub


def _from_hub(name: str, revision: str | None, weights: bool) -> pathlib.Path:
    wanted = TEXTS + WEIGHTS if weights else TEXTS
    try:
        folder = pathlib.Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=LEFT_OUT,
                local_files_only=constants.HF_HUB_OFFLINE,  # 1.33 would list a commit's files all the same
            )
        )
    except Exception as error:  # huggingface_hub raises many kinds
        raise _refused(error, name, revision) from None
    if weights and not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"'{name}' has no weights that can be read here, {_instead(name, revision, folder)}; they must be safetensors: "
            "choose another revision or model, or save it again with transformers (save_pretrained)"
        )
    return folder


def _instead(name: str, revision: str | None, folder: pathlib.Path) -> str:
    """What a repository without safetensors has, for people."""
    try:
        present = huggingface_hub.HfApi().list_repo_files(name, revision=revision)
    except Exception:  # offline, the cache may lack what the Hub has
        return f"at least not in its cached copy '{folder}'"
    others = [path for path in present if path.endswith((".bin", ".pth", ".pt", ".gguf", ".msgpack", ".h5"))]
    return f"only {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}" if others else "nor any others"


def _refused(error: Exception, name: str, revision: str | None) -> OSError | ValueError:
    """What huggingface_hub raised over a model that is wanted, as one line that says what to do."""
    shown = f"'{name}'" if revision is None else f"'{name}' at revision '{revision}'"
    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError
        then = (
            LOG_IN if huggingface_hub.get_token() is None else "use a token of that account that may read gated models"
        )
        return PermissionError(f"'{name}' is gated: accept its licence at {constants.ENDPOINT}/{name}, and {then}")
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(
            f"'{name}' has no revision '{revision or constants.DEFAULT_REVISION}'; give one of its branches, tags or commits"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"'{name}' is neither a folder here nor a model on the Hub that you may see; check the name, or if it is private "
            + LOG_IN
        )
    if _is_about_token(error):
        return PermissionError(f"the Hub does not know your token; {LOG_IN} anew")
    if isinstance(error, errors.LocalEntryNotFoundError):
        lacks = "only a part" if isinstance(error, errors.IncompleteSnapshotError) else "nothing"
        here = f"{shown} is no folder here, and the Hub's cache ({constants.HF_HUB_CACHE}) has {lacks} of it"
        if constants.HF_HUB_OFFLINE:
            return FileNotFoundError(f"{here}; unset HF_HUB_OFFLINE to fetch it, or give a folder")
        return ConnectionError(
            f"{here}, and {constants.ENDPOINT} did not give it ({_cause(error)}); check the network, or give a folder"
        )
    return ConnectionError(f"{shown} could not be fetched from the Hub ({_cause(error)}); try again, or give a folder")


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_about_token(error: Exception) -> bool:
    return _status(error) == 401 or isinstance(error, UnicodeEncodeError)  # a token cut with an ellipsis cannot be sent


def _cause(error: Exception) -> str:
    """What went wrong, in one line, without a token: one that cannot be sent is quoted by what refuses it."""
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    said = str(cause).strip() or type(cause).__name__
    if isinstance(cause, errors.HfHubHTTPError):
        said = f"{_status(cause)}: {cause.server_message or said.splitlines()[0]}"
    return urls.said(said)


# URLs


def _from_url(url: str, cache_dir: pathlib.Path, weights: bool) -> pathlib.Path:
    """The folder that a URL's model was copied into, now or earlier: whole or not there. A file:// URL is the folder itself."""
    shown = urls.shown(url).rstrip("/")
    if urllib.parse.urlsplit(url).hostname in ("huggingface.co", "hf.co"):
        raise ValueError(f"'{shown}' is a page of the Hub; give ORG/NAME alone, and a branch or commit as the revision")
    files, path = urls.opened(url)
    try:
        entries = files.ls(path, detail=True)
    except Exception as error:  # each file system's own kinds
        raise urls.unreadable(shown, error) from None
    if isinstance(files, LocalFileSystem):
        return pathlib.Path(path)
    wanted = TEXTS + WEIGHTS if weights else TEXTS
    names = {entry["name"].rsplit("/", 1)[-1]: entry for entry in entries if entry["type"] == "file"}
    found = {name: names[name] for name in sorted(names) if _matches(name, wanted) and not _matches(name, LEFT_OUT)}
    if not found.keys() & {"config.json", "adapter_config.json"}:
        raise FileNotFoundError(f"'{shown}' has no config.json; give the URL of a Hugging Face model's folder")
    if weights and not any(_matches(name, WEIGHTS) for name in found):
        raise FileNotFoundError(
            f"'{shown}' has no safetensors; save the model again with transformers (save_pretrained)"
        )
    return urls.copied(files, shown, found, cache_dir / "models")


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# Pushing


def check_push(repo_id: str) -> str:
    """Makes sure, before a run, that its model can be pushed at the end; returns ORG/NAME, ORG being the user where none is given.

    Creates nothing: a right to make new repositories is read from what the Hub says of the token. Raises OSError or ValueError
    with one line that says what to change.
    """
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise ValueError(f"hub_model_id='{repo_id}' is no name that the Hub takes ({error}); give ORG/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or set push_to_hub to false")
    api = huggingface_hub.HfApi()
    try:
        me = api.whoami()
    except Exception as error:
        raise _not_pushed(error, repo_id) from None
    full = repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"
    try:
        api.auth_check(full, write=True)
    except errors.RepositoryNotFoundError:
        _check_creating(full, me)
    except Exception as error:
        raise _not_pushed(error, full) from None
    return full


def _check_creating(repo_id: str, me: dict) -> None:
    """Whether the account and its token may make a repository of that name."""
    owner = repo_id.split("/")[0]
    owners = [me["name"], *(org["name"] for org in me.get("orgs", []) if org.get("roleInOrg") != "read")]
    if owner not in owners:
        raise PermissionError(
            f"'{repo_id}' would belong to '{owner}', but you may write as {', '.join(owners)}; give another hub_model_id"
        )
    token = me.get("auth", {}).get("accessToken", {})
    granted = token.get("fineGrained", {})
    rights = granted.get("global", []) + [
        right
        for scope in granted.get("scoped", [])
        if scope.get("entity", {}).get("name") == owner
        for right in scope.get("permissions", [])
    ]
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and "repo.write" not in rights):
        raise PermissionError(_no_rights(repo_id))


def push(
    folder: str | os.PathLike, repo_id: str, *, private: bool | None, revision: str | None = None, commit_message: str
) -> str:
    """Uploads a model's folder to the Hub, making repository and branch where they are missing; returns the page's URL.

    Weights, adapter and chat template of an earlier push that this one does not have are removed; the repository's history keeps
    them. `private` matters for a new repository only; None leaves it to the owner's default. Raises OSError with one line that
    says what to do; the folder stays as it is.
    """
    api = huggingface_hub.HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=REPLACED,
        )
    except Exception as error:  # huggingface_hub raises many kinds
        refused = _not_pushed(error, repo_id)
        raise type(refused)(
            f"{refused}; the model is in '{folder}': `hf upload {repo_id} {folder}` pushes it"
        ) from None
    return f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def _not_pushed(error: Exception, repo_id: str) -> OSError:
    """What huggingface_hub raised over a push, as one line that says what to do."""
    if huggingface_hub.get_token() is None:
        return PermissionError(f"'{repo_id}' cannot be pushed without an account; {LOG_IN}")
    if _is_about_token(error):
        return PermissionError(f"the Hub does not know your token; {LOG_IN} anew")
    if _status(error) == 403:
        return PermissionError(_no_rights(repo_id))
    return ConnectionError(f"'{repo_id}' could not be pushed to {constants.ENDPOINT} ({_cause(error)})")


def _no_rights(repo_id: str) -> str:
    return f"your token may not write to '{repo_id}'; use one that may (https://huggingface.co/settings/tokens), or another hub_model_id"
