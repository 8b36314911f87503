"""Exported folders on the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from srlora_pl.export.folders import WEIGHTS
from srlora_pl.models.peft_folder import CONFIG
from srlora_pl.util.errors import UserError, listed, one_line


def require_repository(name: str) -> str:
    """The whole name of the repository ``name``, ``USER/NAME``, to which this user can write; nothing is made there.

    Raises:
        UserError: the name cannot be one, no token is known, the hub cannot be reached or does not know the token, or
            USER is somebody else.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {name!r} cannot be a repository ({one_line(error)}): give USER/NAME") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push_to_hub needs the hub, but HF_HUB_OFFLINE is set: unset it, or leave the option out")
    if get_token() is None:
        raise UserError("--push_to_hub needs a token of the hub: log in with `hf auth login`, or set HF_TOKEN")
    try:
        user = HfApi().whoami()
    except Exception as error:  # of the hub's client, its transport or the network
        raise UserError(
            f"--push_to_hub: the hub cannot be reached or refuses the token ({one_line(error)}): see to the network, "
            "or log in with `hf auth login`"
        ) from error
    names = [user["name"], *(each["name"] for each in user.get("orgs", ()))]
    owner, _, rest = name.rpartition("/")
    if owner and owner not in names:
        raise UserError(f"--push_to_hub {name}: the token is of {listed(names)}, not of {owner}: give one of these")
    return f"{owner or names[0]}/{rest}"


def push(folder: Path, files: Sequence[str], repository: str, private: bool) -> str:
    """Upload ``files`` of an exported ``folder`` in one commit; returns the repository's address.

    Weights of another export that are there are removed, since libraries load all that they know.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(files),
            delete_patterns=[*WEIGHTS, CONFIG],
            commit_message="Upload by srlora_pl",
        )
    except Exception as error:
        raise UserError(
            f"{folder} is whole, but was not pushed ({one_line(error)}): `hf upload {repository} {folder}` sends it"
        ) from error
    return str(address)
