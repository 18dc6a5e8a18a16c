"""SAEs on the Hugging Face hub: read at one commit through the standard cache, and pushed.

Of a repository only what one SAE needs is fetched. Which hub, which cache and whose token is told by
huggingface_hub's own environment: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.
"""

import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from sae_jax.base import InputError, require

WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")
CONFIGS = ("cfg.json", "config.json", "config.yaml", "hyperparams.json")
READ = (*WEIGHTS, ".json", ".yaml")
"""Endings of what the readers of `formats` open."""
CHECKPOINTS = "checkpoints"
"""Where Llama Scope has its weights, below the folder of their config."""
AT_ONCE = 8
"""Downloads side by side."""

REPO_ID = r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*"
ADDRESS = re.compile(
    # one slash only is what `Path` makes of two
    rf"hf:/+(?P<repo_id>{REPO_ID})(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/+(?P<path>.*))?"
)
COMMIT = re.compile(r"[0-9a-f]{40}")
TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Whose errors huggingface_hub lets through, of one version or another."""

MARK = "<!-- Written by sae_jax: its next push replaces this file, unless this line is taken out. -->"


class Address(NamedTuple):
    """A file or folder on the hub."""

    repo_id: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        return f"hf://{self.repo_id}{at}{'/' if self.path else ''}{self.path}"


class Found(NamedTuple):
    """A file or folder that is on disk now."""

    path: Path
    origin: str | None = None
    """The address that it was fetched from, with its commit: `hf://user/repo@commit/path`."""


class Pushed(NamedTuple):
    """A commit that was made."""

    url: str
    origin: str
    """What `load` takes for exactly this: `hf://user/repo@commit/path`."""


def locate(
    path_or_repo_id: str | Path,
    path_in_repo: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    *,
    every: bool = False,
) -> Found:
    """Where on disk a path or an address on the hub is, fetched if need be.

    Args:
      path_or_repo_id: a path, which wins where it exists; "user/repo", or "hf://user/repo@revision/path".
      path_in_repo: below it.
      revision: a branch, a tag or a commit.
      cache_dir: in place of the standard cache.
      every: all SAEs below the path are wanted, not one.

    Returns:
      The place; of what is neither there nor looks like an address, the path as it was given.

    Raises:
      InputError: as `fetch`.
    """
    name = str(path_or_repo_id)
    if os.path.exists(name):
        require(revision is None, f"{name} is on this disk, without revisions: hf://{name} is on the hub")
        return Found(Path(name) / (path_in_repo or ""))
    address = parsed(name)
    if address is None:
        return Found(Path(name))
    repo_id, path, at = address
    require(at is None or revision is None, f"{name} has a revision, and so has revision={revision!r}")
    path = "/".join(part.strip("/") for part in (path, path_in_repo) if part)
    return fetch(repo_id, path, revision if at is None else at, cache_dir, every=every)


def parsed(name: str) -> Address | None:
    """The address that "user/repo" or "hf://user/repo@revision/path" is; None of what is neither."""
    if not name.startswith("hf:"):
        return Address(name) if re.fullmatch(REPO_ID, name) else None
    told = ADDRESS.fullmatch(name)
    if told is None:
        return None
    revision = told["revision"]
    return Address(
        told["repo_id"], (told["path"] or "").strip("/"), None if revision is None else unquote(revision)
    )


def fetch(
    repo_id: str,
    path: str = "",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    *,
    every: bool = False,
) -> Found:
    """Download one SAE of a repository, unless the cache has it.

    Args:
      repo_id: "user/repo".
      path: a folder, of which the files in itself are taken, or a file, and the configs beside and above it.
      revision: a branch, a tag or a commit.
      cache_dir: in place of the standard cache.
      every: take all that lies below the folder.

    Returns:
      The folder or file within the cache's snapshot of that commit. Where the hub cannot be reached, of the
      commit that the cache knows the revision as.

    Raises:
      InputError: no such repository, revision or path, no right to read it, a folder without weights or with
        several SAEs, a failed download, or a hub out of reach and nothing in the cache.

    Example:
      >>> fetch("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71").path
    """
    from huggingface_hub import HfApi, constants

    address = Address(repo_id, _within(path.strip("/")), None if revision is None else _within(revision))
    storage = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
    storage /= f"models--{repo_id.replace('/', '--')}"
    api = HfApi(library_name="sae_jax")
    with _told(address):
        try:
            info = api.model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            commit = str(info.sha)
            require(COMMIT.fullmatch(commit) is not None, f"the hub calls {commit!r} a commit")
            pinned = address._replace(revision=commit)
            names = _below(api, pinned) if every else _needed(api, pinned)
        except Exception as error:
            if not _out_of_reach(error):
                raise
            return _cached(storage, address, _reason(error))

        def download(name: str) -> None:
            api.hf_hub_download(repo_id, name, revision=commit, cache_dir=cache_dir)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(download, names))
        _remember(storage, revision, commit)
    found = storage / "snapshots" / commit / address.path
    require(found.exists(), f"{address}: the hub answered with another commit than {commit}")
    return Found(found, str(pinned))


def push(
    folder: str | Path,
    repo_id: str,
    path: str = "",
    *,
    cards: Mapping[str, str],
    without: tuple[str, ...] = (),
    private: bool = False,
    revision: str | None = None,
    message: str,
) -> Pushed:
    """Put a folder's files into a repository, which is made if it is not there, in one commit.

    Args:
      folder: its own files are taken, not those of folders in it.
      repo_id: "user/repo".
      path: where in the repository; files of the same names are replaced.
      cards: README.md by the folder in the repository it is for; one without `MARK` that is there stays.
      without: names that shall not be at the path afterwards, unless the folder has them.
      private: make the repository private; one that is there and public is refused.
      revision: a branch, which is made if it is not there.
      message: of the commit.

    Returns:
      The commit.

    Raises:
      InputError: no right to write there, or a hub out of reach.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    address = Address(repo_id, _within(path.strip("/")), None if revision is None else _within(revision))
    files = {_join(address.path, one.name): one for one in sorted(Path(folder).iterdir()) if one.is_file()}
    texts = {_join(place, "README.md"): text for place, text in cards.items()}
    unwanted = [name for name in (_join(address.path, name) for name in without) if name not in files]
    api = HfApi(library_name="sae_jax")
    with _told(address):
        # None is the account's default: an organisation may keep what is new private
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        public = private and not api.model_info(repo_id).private
        require(not public, f"{repo_id} is there already and is public: make it private on the hub")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        asked = [*texts, *unwanted]
        there = {entry.path for entry in api.get_paths_info(repo_id, asked, revision=revision)}

        def is_ours(card: str) -> bool:
            return card not in there or MARK in Path(
                api.hf_hub_download(repo_id, card, revision=revision)
            ).read_text(errors="replace")

        done = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, file) for name, file in files.items()),
                *(CommitOperationAdd(name, text.encode()) for name, text in texts.items() if is_ours(name)),
                *(CommitOperationDelete(name) for name in unwanted if name in there),
            ],
            commit_message=message,
            revision=revision,
        )
    return Pushed(str(done.commit_url), str(address._replace(revision=done.oid)))


def _needed(api: Any, address: Address) -> list[str]:
    """The files that one SAE is read from."""
    from huggingface_hub.hf_api import RepoFile

    if not address.path:
        return _in_folder(api, address)
    above = list(PurePosixPath(address.path).parents)[:2]
    beside = [_join(str(folder), name) for folder in above for name in CONFIGS]
    entries = api.get_paths_info(address.repo_id, [address.path, *beside], revision=address.revision)
    found = {entry.path: isinstance(entry, RepoFile) for entry in entries}
    require(address.path in found, f"{address.repo_id} has no {address.path} at {address.revision}")
    configs = [name for name in beside if found.get(name)]
    own = [address.path] if found[address.path] else _in_folder(api, address)
    return [*own, *(name for name in configs if name not in own)]


def _in_folder(api: Any, address: Address) -> list[str]:
    """The files of a folder that holds one SAE."""
    files, folders = _listed(api, address)
    weights = [name for name in files if name.endswith(WEIGHTS)]
    inner = _join(address.path, CHECKPOINTS)
    if not weights and inner in folders and any(name.endswith("hyperparams.json") for name in files):
        return [*files, *_in_folder(api, address._replace(path=inner))]
    holds = f"folders: {_some(folders)}" if folders else f"files: {_some(files)}" if files else "nothing"
    require(bool(weights), f"{address} has no weights ({', '.join(WEIGHTS)}) in itself; it holds {holds}")
    kinds = {re.sub(r"\d+", "#", name) for name in weights}
    several = f"holds {len(weights)} files of weights: name one of {_some(weights)}, or use load_all"
    require(len(kinds) == len(weights), f"{address} {several}")
    return files


def _below(api: Any, address: Address) -> list[str]:
    """All files below a folder that SAEs may be read from."""
    files, _ = _listed(api, address, recursive=True)
    weights = any(name.endswith(WEIGHTS) for name in files)
    require(weights, f"{address} has no weights ({', '.join(WEIGHTS)}) anywhere below")
    return files


def _listed(api: Any, address: Address, recursive: bool = False) -> tuple[list[str], list[str]]:
    """The files that a reader may open, and the folders, of a folder on the hub."""
    from huggingface_hub.hf_api import RepoFile

    entries = list(
        api.list_repo_tree(
            address.repo_id, address.path or None, revision=address.revision, recursive=recursive
        )
    )
    inside = f"{address.path}/" if address.path else ""
    for entry in entries:
        stays = _within(entry.path).startswith(inside)
        require(stays, f"the hub lists {entry.path!r} as a part of {address}")
    files = [entry.path for entry in entries if isinstance(entry, RepoFile)]
    folders = [entry.path for entry in entries if not isinstance(entry, RepoFile)]
    return [name for name in files if name.endswith(READ)], folders


def _remember(storage: Path, revision: str | None, commit: str) -> None:
    """Note in the cache which commit a branch or tag is, for when the hub is out of reach."""
    name = revision or "main"
    if name == commit:
        return
    ref = storage / "refs" / name
    with suppress(OSError):  # a cache that may only be read
        ref.parent.mkdir(parents=True, exist_ok=True)
        stage = ref.with_name(f"{ref.name}.{os.getpid()}.writing")
        stage.write_text(commit)
        stage.replace(ref)


def _cached(storage: Path, address: Address, reason: str) -> Found:
    """What the cache has of it."""
    name = address.revision or "main"
    ref = storage / "refs" / name
    commit = ref.read_text().strip() if ref.is_file() else name
    found = storage / "snapshots" / commit / address.path
    require(found.exists(), f"{address} is not in the cache {storage.parent}, and {reason}")
    return Found(found, str(address._replace(revision=commit)))


def _within(path: str) -> str:
    """A path that stays where it starts."""
    stays = not set(path.split("/")) & {"", ".", ".."} and not set(path) & {"\\", "\0"}
    require(path == "" or stays, f"{path!r} is not a path within a repository")
    return path


def _join(folder: str, name: str) -> str:
    return name if folder in ("", ".") else f"{folder}/{name}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _out_of_reach(error: BaseException) -> bool:
    """Whether there was no hub to answer, rather than an answer."""
    status = _status(error)
    if status is not None:
        return status >= 500
    return isinstance(error, ConnectionError) or type(error).__module__.split(".")[0] in TRANSPORTS


def _reason(error: BaseException) -> str:
    """Why the hub is out of reach."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    status = _status(error)
    if status is not None:
        return f"{constants.ENDPOINT} answers {status}"
    return f"{constants.ENDPOINT} cannot be reached ({_line(error)})"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _told(address: Address) -> Iterator[None]:
    """Whatever huggingface_hub and what it speaks through raise, as one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a dozen types, others from version to version
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the disk's
        raise InputError(_sentence(address, error)) from None


def _sentence(address: Address, error: BaseException) -> str:
    from huggingface_hub import constants, errors

    repo_id, endpoint = address.repo_id, constants.ENDPOINT
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} is gated: ask for access at {endpoint}/{repo_id}, then log in (`hf auth login`)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo_id} is neither a path here nor a repository that {endpoint} shows: "
            "check its name, or log in if it is private (`hf auth login`)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {address.revision or 'main'}"
    if isinstance(error, errors.EntryNotFoundError) and _status(error) == 404:
        return f"{repo_id} has no folder {address.path or '/'} at {address.revision or 'main'}"
    if _status(error) in (401, 403):
        return f"{endpoint} refuses {repo_id} to you: log in with a token that may (`hf auth login`)"
    if isinstance(error, errors.HFValidationError):
        return f"{repo_id!r} is not the name of a repository, which is user/repo"
    if _out_of_reach(error):
        return f"{address}: {_reason(error)}"
    return f"{address}: {_line(error)}"
