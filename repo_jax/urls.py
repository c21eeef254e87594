"""Files at URLs (gs://, s3:// and what else fsspec knows): copied here once, and brought there from here."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable

import filelock
import fsspec
from fsspec.callbacks import TqdmCallback
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

# What tells one version of a stored file from another, as the file systems call it. Without any, its size has to do.
VERSIONS = ["etag", "ETag", "generation", "md5Hash", "content_md5", "blob_id", "LastModified", "last_modified", "mtime"]

EXTRAS = {"gcsfs": "gs", "s3fs": "s3"}  # package -> the extra of ours that has it
SECRETS = [
    (r"\bhf_[A-Za-z0-9]{8,}|(?<=Bearer )[^'\"]+", "..."),
    (r"(://)[^\s/@'\"]+@", r"\1"),
    (r"(://[^\s?'\"]+)\?[^\s'\"]+", r"\1"),
]


def is_url(name: str | os.PathLike) -> bool:
    return "://" in os.fspath(name)


def shown(url: str) -> str:
    """A URL without what may be secret in it: user and password, and the query."""
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        return url
    rest = rest.split("?")[0]
    host = rest.split("/")[0]
    return scheme + slashes + host.rsplit("@", 1)[-1] + rest[len(host) :]


def without_secrets(field: str, url: str) -> str:
    """The URL. Raises ValueError where it holds a user, a password or a query, which a run's recipe would keep."""
    if url != shown(url):
        raise ValueError(
            f"{field}='{shown(url)}' is given with a user, a password or a query, which would stand in the run's recipe; leave them "
            "out, and log in as the store has it (gcloud auth application-default login, AWS_PROFILE)"
        )
    return url


def last_name(url: str) -> str:
    return shown(url).rstrip("/").rsplit("/", 1)[-1]


def opened(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, with nothing remembered of earlier listings, and the path there.

    Raises ValueError naming the package that is missing, or OSError.
    """
    try:
        files, path = fsspec.core.url_to_fs(url)
        files.invalidate_cache()
    except ImportError as error:
        known = known_implementations.get(url.split("://")[0], {"class": "fsspec"})
        package = known["class"].split(".")[0]
        install = f"pip install 'repo_jax[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {package}"
        install = str(error) if package == "fsspec" else install
        raise ValueError(f"'{shown(url)}' needs a package that is not installed; {install}") from None
    except Exception as error:  # each file system's own kinds
        raise unreadable(url, error) from None
    return files, path.rstrip("/")


def unreadable(url: str, error: Exception, *, kind: str = "folder") -> OSError:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"there is no {kind} '{shown(url)}', or none that you may see; check the URL")
    return OSError(
        f"'{shown(url)}' could not be read ({said(error)}); check the URL, your rights there, and the network"
    )


def unwritable(url: str, error: Exception) -> OSError:
    return OSError(
        f"'{shown(url)}' could not be written ({said(error)}); check the URL, your rights there, and the network"
    )


def said(error: Exception | str) -> str:
    """What went wrong, in one line, without what is secret."""
    return textwrap.shorten(scrubbed(str(error).strip() or type(error).__name__), 200, placeholder=" ...").rstrip(".")


def scrubbed(text: str) -> str:
    """A text without tokens, passwords and signed queries."""
    for pattern, instead in SECRETS:
        text = re.sub(pattern, instead, text)
    return text


# From there


def fetched(url: str, place: pathlib.Path, wanted: Callable[[str], bool] = lambda name: True) -> pathlib.Path:
    """What a URL names, a file or the wanted files of a folder, under its own name in a copy within `place`.

    A file:// URL is what it names.
    """
    files, path = opened(url)
    name, kind = last_name(url), "file or folder"
    try:
        info = files.info(path)
        if isinstance(files, LocalFileSystem):
            return pathlib.Path(path)
        if info["type"] == "file":
            found = {name: info}
        else:
            found = {f"{name}/{below}": entry for below, entry in _below(files, path).items() if wanted(below)}
    except Exception as error:  # each file system's own kinds
        raise unreadable(url, error, kind=kind) from None
    if not found:
        raise FileNotFoundError(f"'{shown(url)}' is empty; give the URL of a file or a folder of files")
    return copied(files, url, found, place) / name


def copied(files, url: str, found: dict[str, dict], place: pathlib.Path) -> pathlib.Path:
    """The folder in `place` that these files {name: entry of a listing} were copied into, now or earlier: whole or not there."""
    versions = {
        name: [entry.get("size"), *(str(entry[key]) for key in VERSIONS if key in entry)]
        for name, entry in found.items()
    }
    key = hashlib.sha256(json.dumps([shown(url).rstrip("/"), versions]).encode()).hexdigest()[:16]
    folder = place / f"{last_name(url)}-{key}"
    part = folder.with_name(f".{folder.name}.part")
    place.mkdir(parents=True, exist_ok=True)
    # One process copies and the others wait; a process that was killed holds no lock any more.
    with filelock.FileLock(place / f".{folder.name}.lock"):
        if folder.is_dir():
            return folder
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            _get(files, url, found, part)
            part.rename(folder)
        except Exception as error:  # each file system's own kinds
            raise unreadable(url, error) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _get(files, url: str, found: dict[str, dict], folder: pathlib.Path, *, quiet: bool = False) -> None:
    theirs, ours = [entry["name"] for entry in found.values()], [folder / name for name in found]
    for path in ours:
        path.parent.mkdir(parents=True, exist_ok=True)
    bar = {"desc": f"copying {shown(url)}", "unit": "file", "disable": quiet}
    with TqdmCallback(tqdm_kwargs=bar) as progress:
        files.get(theirs, [str(path) for path in ours], callback=progress)
    for name, entry in found.items():
        size = (folder / name).stat().st_size
        if entry.get("size") not in (None, size):
            raise OSError(f"{name} has {entry['size']} bytes there, {size} came")


def _below(files, path: str) -> dict[str, dict]:
    """The files below a path, {name from there: entry}, none where there is no such folder."""
    entries = files.find(path, detail=True).values()
    found = {entry["name"].removeprefix(path).lstrip("/"): entry for entry in entries if entry["type"] == "file"}
    # Stores without folders may hold an empty object in place of one.
    return {name: found[name] for name in sorted(found) if name and not name.endswith("/")}


def names(url: str) -> list[str]:
    """The files below a URL, by their names from there; none where there is no such folder."""
    files, path = opened(url)
    try:
        return list(_below(files, path))
    except FileNotFoundError:
        return []
    except Exception as error:  # each file system's own kinds
        raise unreadable(url, error) from None


def read(url: str) -> bytes:
    files, path = opened(url)
    try:
        return files.cat_file(path)
    except Exception as error:  # each file system's own kinds
        raise unreadable(url, error, kind="file") from None


def download(url: str, folder: pathlib.Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copies the files below a URL whose names are wanted into a folder."""
    files, path = opened(url)
    try:
        found = {name: entry for name, entry in _below(files, path).items() if wanted(name)}
        if found:
            _get(files, url, found, folder, quiet=True)
    except FileNotFoundError:
        return
    except Exception as error:  # each file system's own kinds
        raise unreadable(url, error) from None


# To there


def upload(folder: pathlib.Path, url: str, wanted: Iterable[str]) -> None:
    """Copies these files of a folder, by their names from there, to below a URL."""
    files, path = opened(url)
    wanted = list(wanted)
    try:
        if wanted:
            files.put([str(folder / name) for name in wanted], [f"{path}/{name}" for name in wanted])
    except Exception as error:  # each file system's own kinds
        raise unwritable(url, error) from None


def remove(url: str, unwanted: Iterable[str]) -> None:
    """Removes these files below a URL, those of them that are there."""
    files, path = opened(url)
    try:
        for name in unwanted:
            if files.exists(f"{path}/{name}"):
                files.rm_file(f"{path}/{name}")
    except Exception as error:  # each file system's own kinds
        raise unwritable(url, error) from None


def remove_folder(url: str, *, first: str = "") -> None:
    """Removes what lies below a URL, the file `first` before all others."""
    remove(url, sorted(names(url), key=lambda name: name != first))


def replace_folder(folder: pathlib.Path, url: str, *, last: str, first: str = "") -> None:
    """Makes a URL hold what a folder holds, and nothing else.

    Stores like these cannot rename a folder. Instead the file `last` is there after all others, and without it nobody takes the folder
    for whole; `first` is there before them, to say whose the folder is.
    """
    ours = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    remove(url, [last])
    upload(folder, url, [name for name in ours if name == first])
    upload(folder, url, [name for name in ours if name not in (first, last)])
    remove(url, set(names(url)) - set(ours))
    upload(folder, url, [name for name in ours if name == last])
