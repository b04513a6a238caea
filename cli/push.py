"""`ssm-zoo push`: a model folder to the Hub."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .run_folder import model_folder

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

# What transformers might load if it were left in a repository: it prefers an old model.safetensors to new shards.
_LOADED = (".safetensors", ".safetensors.index.json", ".py")


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder that export or distill wrote. Of a run, its student.")
    ],
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="Repository: OWNER/NAME, or NAME of one of your own. Made if new."),
    ],
    private: Annotated[bool, typer.Option("--private", help="Only to a private repository.")] = False,
    message: Annotated[
        str, typer.Option("--message", metavar="TEXT", help="First line of the commit message.")
    ] = "Upload model",
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Branch to commit to; made if new.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request on the default branch instead of committing.")
    ] = False,
) -> None:
    """Upload a model folder to the Hub. Code, tokenizer and card go with it.

    A file that the repository has is replaced by the folder's, the card too. Weights and code of the repository
    that the folder lacks are removed, since transformers might load them; everything else stays. The token is that
    of `hf auth login` or HF_TOKEN.
    """
    commit = push_folder(
        model_folder(folder),
        repo,
        private=private,
        message=message,
        revision=revision,
        create_pr=create_pr,
    )
    announce(commit)


def announce(commit: "CommitInfo") -> None:
    """Print where an upload is, and what pins it."""
    if commit.pr_url is not None:
        typer.echo(f"pull request: {commit.pr_url}")
    typer.echo(f"commit: {commit.commit_url}")
    typer.echo(f"to pin it: revision={commit.oid}")


def push_folder(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    message: str = "Upload model",
    revision: str | None = None,
    create_pr: bool = False,
) -> "CommitInfo":
    """Upload a folder that holds a model and its code, or an adapter.

    Args:
        folder: what `save_pretrained` of a zoo model, or of one with adapters, wrote.
        repo: OWNER/NAME, or NAME in the name space of the token's user; made if it does not exist.
        private: refuse a repository that is public, and make a new one private.
        message: first line of the commit message.
        revision: branch; made from the default one if it does not exist.
        create_pr: open a pull request on the default branch.

    Returns:
        The commit; `oid` is the revision to pin.

    Raises:
        ValueError: if the folder holds neither a self-contained model nor an adapter, there is no token, or the
            repository is public although a private one was asked for; nothing is uploaded then.
    """
    check_model_folder(folder)
    if create_pr and revision is not None:
        raise ValueError(f"--revision: got {revision!r}; accepted with --create-pr: none")
    check_repository(repo)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(library_name="ssm-zoo")
    if "/" not in repo:  # by itself the name may be that of somebody's old repository without an owner
        repo = f"{api.whoami()['name']}/{repo}"
    try:
        public = not api.model_info(repo).private
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private or None)
    else:
        if private and public:
            raise ValueError(f"--private: {repo} is public; make it private on the Hub, or choose another name")
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    here = {path.name for path in folder.iterdir()}
    stale = [
        name
        for name in api.list_repo_files(repo, revision=revision)
        if "/" not in name and name not in here and name.endswith(_LOADED)
    ]
    return api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        delete_patterns=stale or None,
    )


def check_repository(repo: str) -> None:
    """Raise a ValueError if `repo` cannot be a repository's name, or there is no token."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo)
    if get_token() is None:
        raise ValueError("there is no Hugging Face token: log in with `hf auth login` or set HF_TOKEN")


def check_model_folder(folder: Path) -> None:
    """Raise a ValueError if a folder does not hold weights as safetensors, a config and the code it names.

    An adapter's code is its base model's.
    """
    if not folder.is_dir():
        raise ValueError(f"FOLDER: there is no folder {folder}")
    if (folder / "adapter_config.json").is_file():
        if not (folder / "adapter_model.safetensors").is_file():
            raise ValueError(f"FOLDER: {folder} holds no weights (adapter_model.safetensors)")
        return
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"FOLDER: {folder} is not a model's: it holds no config.json")
    values = json.loads(config.read_text(encoding="utf-8"))
    auto_map = values.get("auto_map") if isinstance(values, dict) else None
    if not isinstance(auto_map, dict) or not auto_map:
        raise ValueError(f"FOLDER: {config} has no auto_map, so it does not load; write the folder with export")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"FOLDER: {folder} holds no weights (*.safetensors)")
    for reference in auto_map.values():
        repository, _, name = str(reference).rpartition("--")
        file = f"{name.partition('.')[0]}.py"
        if not repository and not (folder / file).is_file():
            raise ValueError(f"FOLDER: {config} names {reference}, but there is no {file}; write it with export")
