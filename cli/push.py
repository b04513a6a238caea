"""`ssm-zoo push`: a model folder to the Hub."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .sources import limit_waiting, model_folder

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

# Maximum number of names in a list; the others are only counted.
_LISTED = 12


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder that export or a training wrote, or folder of a run.")
    ],
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="Repository, OWNER/NAME or NAME of your own; created if needed."),
    ],
    private: Annotated[bool, typer.Option("--private", help="Push to a private repository only.")] = False,
    message: Annotated[
        str, typer.Option("--message", metavar="TEXT", help="First line of the commit message.")
    ] = "Upload model",
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Branch to commit to; created if needed.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request on the default branch instead of committing.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Also remove weights and adapters in REPO that ssm-zoo did not push.")
    ] = False,
) -> None:
    """Upload a model folder to the Hub.

    Its code, tokenizer and card go with it.

    Uploaded are safetensors, configurations, tokenizer, README.md, plots, licences and the code that config.json names.
    Other and hidden files are listed and not uploaded; links are refused. The folder must be complete: all weights that
    config.json promises, all finite; all code; no path of this machine.

    Files of the same name in the repository are replaced, including the card, and what an earlier push left is removed.
    --yes is needed to remove anything else that loading the repository could pick up instead: weights, an adapter, or a
    model where an adapter is pushed. All other files are kept. The token is that of `hf auth login` or HF_TOKEN.
    """
    commit = push_folder(
        model_folder(folder),
        repo,
        private=private,
        message=message,
        revision=revision,
        create_pr=create_pr,
        yes=yes,
    )
    announce(commit)


def announce(commit: "CommitInfo") -> None:
    """Print where an upload is, and the revision that pins it."""
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
    yes: bool = False,
) -> "CommitInfo":
    """Upload a folder that holds a model and its code, or an adapter. Print which files are not uploaded.

    Args:
        folder: written by `save_pretrained` of a zoo model, or of one with adapters.
        repo: OWNER/NAME, or NAME in the namespace of the token's user; created if it does not exist.
        private: refuse a public repository, and create a new one as private.
        message: first line of the commit message.
        revision: branch; created from the default branch if it does not exist.
        create_pr: open a pull request on the default branch.
        yes: remove files that would be loaded instead of these, even if ssm-zoo did not push them. Otherwise a user at
            a terminal is asked.

    Returns:
        The commit; `oid` is the revision to pin.

    Raises:
        ValueError: if the folder holds neither a complete, self-contained model nor a complete adapter, there is no
            token, the repository is public although a private one was asked for, or a file would have to be removed
            that is not ours. Nothing is uploaded then.
    """
    if create_pr and revision is not None:
        raise ValueError(f"--revision must be left out with --create-pr, got {revision!r}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from ..conversion.publishable import check_publishable
    from ..modeling.hub_upload import carry_out, plan_upload

    check_publishable(folder)
    check_repository(repo)
    api = HfApi(library_name="ssm-zoo")
    if "/" not in repo:  # the bare name may be that of an old repository without an owner
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
    plan = plan_upload(api, folder, repo, revision=revision)
    if plan.not_ours and not yes:
        question = f"{repo} holds files that ssm-zoo did not push and that would have to go: {_listed(plan.not_ours)}"
        if not (sys.stdin.isatty() and typer.confirm(f"{question}. Remove them?", err=True)):
            raise ValueError(f"REPO: {question}. Look at them, then pass --yes, or choose another repository.")
    if plan.left_out:
        typer.echo(f"not uploaded: {_listed(plan.left_out)}")
    return carry_out(api, plan, commit_message=message, revision=revision, create_pr=create_pr)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def check_repository(repo: str, field: str = "REPO") -> None:
    """Raise a ValueError if `repo` cannot be the name of a repository, there is no token, or the Hub is offline.

    Args:
        repo: OWNER/NAME or NAME.
        field: the argument or option that gave it.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    limit_waiting()
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{field}: {error}") from None
    if get_token() is None:
        raise ValueError(f"{field}: there is no Hugging Face token; log in with `hf auth login` or set HF_TOKEN")
    check_online(field, "" if field == "REPO" else ", or leave the option out and run `ssm-zoo push` later")


def check_online(field: str, remedy: str = "") -> None:
    """Raise a ValueError in offline mode; `remedy` adds to the advice to leave it."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise ValueError(
            f"{field}: nothing can be pushed in offline mode; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE{remedy}"
        )


def check_push_options(repo: str | None, *, private: bool) -> None:
    """Ask the Hub, before hours of training, whether `--push-to-hub` can work.

    Args:
        repo: OWNER/NAME or NAME; None: nothing is pushed.
        private: whether the repository must be private.

    Raises:
        ValueError: if the name is not valid, there is no token, the Hub is offline or does not accept the token, it
            may not write there, or the repository is public although a private one is asked for.
        OSError: if the Hub cannot be reached.
    """
    if repo is None:
        if private:
            raise ValueError("--private has no effect without --push-to-hub")
        return
    field = "--push-to-hub"
    check_repository(repo, field)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    api = HfApi(library_name="ssm-zoo")
    try:
        user = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise ValueError(
            f"{field}: the Hub does not accept the token; log in again with `hf auth login`, or set another HF_TOKEN"
        ) from None
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(f"{field}: the token of {user['name']} can only read; create one that can write to {repo}")
    owner = repo.partition("/")[0] if "/" in repo else user["name"]
    members = {each.get("name"): each.get("roleInOrg") for each in user.get("orgs", [])}
    # A fine-grained token need not say which organisations its user belongs to.
    stranger = owner != user["name"] and owner not in members and role != "fineGrained"
    if stranger or members.get(owner) == "read":
        raise ValueError(f"{field}: {user['name']} may not write to repositories of {owner}; choose one of your own")
    try:
        public = not api.model_info(repo if "/" in repo else f"{owner}/{repo}").private
    except RepositoryNotFoundError:
        return  # it will be made
    if private and public:
        raise ValueError(f"--private: {repo} is public; make it private on the Hub, or choose another name")
