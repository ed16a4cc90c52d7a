"""Pushing a run or merged folder to the Hugging Face Hub: only where it is asked for, and private.

The token comes from the environment or from `hf auth login`, never from an argument.
"""

from pathlib import Path

from exit_codes import UserError, note
from model_card import CARD, model_card, results_of
from run_folder import LOCK, first_line, read_run_config

# What the Hub has no use for. In a pattern * goes through folders too.
LEFT_OUT = ["checkpoints/*", "trackers/*", "*.tmp", "*.aside", LOCK, CARD, "report.html"]


def check_hub(repo_id: str | None) -> None:
    """Refuse, before anything is computed, a name or a machine that cannot be pushed from.

    Raises:
        UserError: as said.
    """
    if repo_id is None:
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    option = f"--push_to_hub {repo_id}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError(option, "no name of a model on the Hub", "give OWNER/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(option, "HF_HUB_OFFLINE is set", "unset it, or leave the option out")
    if get_token() is None:
        raise UserError(option, "no token for the Hub", "set HF_TOKEN, or run: hf auth login")


def push(folder: str, repo_id: str) -> None:
    """Upload a folder, in one commit, as a model that only its owner sees.

    Raises:
        UserError: the Hub cannot be reached, or does not take it. The folder is whole all the same.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import filter_repo_objects

    api, files = HfApi(), sorted(path for path in Path(folder).rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in files if not path.is_symlink()}
    card = Path(folder, CARD).read_text(encoding="utf-8")
    run_config = read_run_config(folder)
    for results in (None, results_of(folder)):
        if card == model_card(run_config, results):  # else somebody has edited it
            card = model_card(run_config, results, repo_id)  # which loads it by that name
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(names[name]))
        for name in filter_repo_objects(names, ignore_patterns=LEFT_OUT)
    ]
    operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode()))
    try:
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        if not api.repo_info(url.repo_id).private:
            note(f"{url.repo_id} was there before, and everybody sees it")
        api.create_commit(url.repo_id, operations, commit_message="Upload by Manchette")
    except Exception as error:  # the Hub client has a dozen kinds of refusal
        raise UserError(
            f"--push_to_hub {repo_id}",
            f"not pushed ({first_line(error)})",
            f"{folder} is whole: run the same command again, or hf upload",
        ) from None
    print(f"pushed to {url}")
