"""`ssm-zoo push`: a model folder to the Hub."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .hub_client import limit_waiting
from .run_folder import model_folder

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

# Names in a list, before the rest is counted.
_LISTED = 12


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
    yes: Annotated[
        bool, typer.Option("--yes", help="Also remove weights and adapters of REPO that no push of ssm-zoo wrote.")
    ] = False,
) -> None:
    """Upload a model folder to the Hub. Code, tokenizer and card go with it.

    Sent are safetensors, configurations, tokenizer, README.md, plots, licences and the code that config.json names;
    links are refused, and hidden or any other files stay here and are listed. The folder has to be whole: weights as
    config.json promises them, all finite; all code there; no path of this machine.

    A file that the repository has is replaced by the folder's, the card too. What an earlier push left is removed. What
    else loading the repository might take instead (weights, an adapter), and a model where an adapter is pushed or the
    other way round, is removed with --yes only; everything else stays. The token is that of `hf auth login` or
    HF_TOKEN.
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
    yes: bool = False,
) -> "CommitInfo":
    """Upload a folder that holds a model and its code, or an adapter. What is not sent is printed.

    Args:
        folder: what `save_pretrained` of a zoo model, or of one with adapters, wrote.
        repo: OWNER/NAME, or NAME in the name space of the token's user; made if it does not exist.
        private: refuse a repository that is public, and make a new one private.
        message: first line of the commit message.
        revision: branch; made from the default one if it does not exist.
        create_pr: open a pull request on the default branch.
        yes: remove what of the repository would be loaded instead, even if no push of ours wrote it. Otherwise a user
            at a terminal is asked.

    Returns:
        The commit; `oid` is the revision to pin.

    Raises:
        ValueError: if the folder holds neither a whole, self-contained model nor a whole adapter, there is no token,
            the repository is public although a private one was asked for, or something would have to be removed that
            is not ours; nothing is uploaded then.
    """
    if create_pr and revision is not None:
        raise ValueError(f"--revision: got {revision!r}; accepted with --create-pr: none")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from ..conversion.publishable import check_publishable
    from ..modeling.hub_upload import carry_out, plan_upload

    check_publishable(folder)
    check_repository(repo)
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
    plan = plan_upload(api, folder, repo, revision=revision)
    if plan.not_ours and not yes:
        question = f"{repo} holds what no push of this kind wrote and would have to go: {_listed(plan.not_ours)}"
        if not (sys.stdin.isatty() and typer.confirm(f"{question}. Remove it?", err=True)):
            raise ValueError(f"REPO: {question}; look at it, then remove it with --yes, or choose another repository")
    if plan.left_out:
        typer.echo(f"not sent: {_listed(plan.left_out)}")
    return carry_out(api, plan, commit_message=message, revision=revision, create_pr=create_pr)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def check_repository(repo: str, field: str = "REPO") -> None:
    """Raise a ValueError if `repo` cannot be a repository's name, there is no token, or the Hub is switched off.

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
    """Raise a ValueError in offline mode, with one more `remedy` than to leave it."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise ValueError(
            f"{field}: nothing can be pushed in offline mode; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE{remedy}"
        )


def check_push_target(repo: str, *, private: bool = False) -> None:
    """Ask the Hub whether what a training makes can be pushed, before hours of it.

    Args:
        repo: OWNER/NAME or NAME, as `--push-to-hub` gives it.
        private: whether the repository has to be private.

    Raises:
        ValueError: if the name is no repository's, there is no token, the Hub is switched off or does not accept the
            token, it may not write there, or the repository is public although a private one is asked for.
        OSError: if the Hub cannot be reached.
    """
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
            f"{field}: the Hub does not accept the token; log in anew with `hf auth login`, or set another HF_TOKEN"
        ) from None
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(f"{field}: the token of {user['name']} may only read; make one that may write to {repo}")
    owner = repo.partition("/")[0] if "/" in repo else user["name"]
    members = {each.get("name"): each.get("roleInOrg") for each in user.get("orgs", [])}
    # A fine-grained token need not say which organisations its user belongs to.
    stranger = owner != user["name"] and owner not in members and role != "fineGrained"
    if stranger or members.get(owner) == "read":
        raise ValueError(f"{field}: {user['name']} may not write to repositories of {owner}; accepted: your own")
    try:
        public = not api.model_info(repo if "/" in repo else f"{owner}/{repo}").private
    except RepositoryNotFoundError:
        return  # it will be made
    if private and public:
        raise ValueError(f"--private: {repo} is public; make it private on the Hub, or choose another name")
