"""What every model has of the Hugging Face Hub: ``save_pretrained``, ``from_pretrained``, ``push_to_hub``.

The methods and their arguments are those of huggingface_hub's ``PyTorchModelHubMixin``; the files are those of
:func:`vpfast.models.save`, with a model card beside them. That class is not inherited from: it would be imported with
every model, it reads pickles, and it takes the old configuration away before the new model is written. huggingface_hub
is needed for what is not on this machine alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from torch import nn

from vpfast.models._card import model_card
from vpfast.models.storage import CONFIG, TRAINING, WEIGHTS, as_files, folder_of, load, pretrained, training_of, write

CARD = "README.md"
_FILES = (CONFIG, WEIGHTS, CARD, TRAINING)
_TRAINED = f"The configuration of the run that made these weights is in `{TRAINING}`."

_TEXTS = ("name", "license", "about", "training", "quality")

P = TypeVar("P", bound="Pretrained")


class Pretrained:
    """Models as folders that can be shared. A class beside ``nn.Module`` in the bases of every model."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, model_card_kwargs: Mapping[str, str] | None = None
    ) -> None:
        """Write what :func:`vpfast.models.save` writes, and a model card, README.md.

        A model that was loaded from a folder of ``vpfast train``, and is as it was loaded, takes ``training.json`` with
        it: how it was trained, and so on which clips ``vpfast evaluate`` measures it. Of absolute paths in it only the
        last part is kept. If it is not known how the model was trained, there is no ``training.json``, and one of
        another model is removed. A card of ``save_pretrained`` is replaced; one that somebody wrote or edited stays.

        Args:
            save_directory: the folder, made where it is missing; other files in it are left alone.
            model_card_kwargs: texts of the card: ``name``, what ``from_pretrained`` is to be given (default: the
                folder); ``license``, an identifier of the Hub such as ``"mit"``; ``about``, ``training``, ``quality``:
                paragraphs in Markdown. What is not given is left out.

        Raises:
            TypeError: another key in ``model_card_kwargs``.
            ValueError: a model that ``from_pretrained`` would refuse; see :func:`vpfast.models.save`.
            OSError: there is no room, or no permission. Then no file is half-written.
        """
        folder, model = Path(save_directory), _as_module(self)
        texts = _card_texts(folder.as_posix(), model_card_kwargs)
        contents: dict[str, bytes | None] = {**as_files(model), TRAINING: None}
        trained = training_of(model)
        if trained is not None:
            contents[TRAINING] = (json.dumps(trained, indent=2) + "\n").encode()
            texts = {"training": _TRAINED, **texts}
        if not (folder / CARD).exists() or _is_unedited(folder / CARD):
            contents[CARD] = _marked(model_card(model, **texts).encode())
        write(contents, folder)

    @classmethod
    def from_pretrained(
        cls: type[P],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> P:
        """The model in a folder, of the package, or on the Hub: on the CPU, in its saved type, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder that :func:`vpfast.models.save`, ``save_pretrained`` or
                ``vpfast train`` wrote; or the name of a model that comes with the package, one of
                ``vpfast.models.pretrained()``; or, given as a str, a repository of the Hub, such as ``"user/model"``,
                which takes the extra ``vpfast[hub]``. What comes first is taken.
            revision, cache_dir, token, force_download, local_files_only: of a repository, as huggingface_hub has them.

        Raises:
            FileNotFoundError: none of the three; the message tells what became of each.
            ImportError: not here, and without huggingface_hub.
            ValueError: the files are damaged, or hold a model of another class; the message names them.
        """
        folder = folder_of(pretrained_model_name_or_path)
        if not folder.exists() and isinstance(pretrained_model_name_or_path, str):
            folder = _downloaded(
                pretrained_model_name_or_path,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        model = load(folder)
        if not isinstance(model, cls):
            kind = type(model).__name__
            raise ValueError(f"{folder} holds a {kind}, not a {cls.__name__}; {kind}.from_pretrained loads it")
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a model of vpfast",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        model_card_kwargs: Mapping[str, str] | None = None,
    ) -> str:
        """Upload what ``save_pretrained`` writes to a repository of the Hub, made where it is missing, in one commit.

        Args:
            repo_id: such as ``"user/model"``.
            commit_message, private, token, branch, create_pr: as huggingface_hub has them.
            model_card_kwargs: as for ``save_pretrained``. The card that is uploaded replaces any that is there, and a
                ``training.json`` there goes if the model has none.

        Returns:
            the address of the commit.

        Raises:
            ImportError: without huggingface_hub. Errors of the upload are that package's.
        """
        hub = _hub(f"push to {repo_id}")
        api = hub.HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, model_card_kwargs=_card_texts(repo_id, model_card_kwargs))
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                delete_patterns=[TRAINING],
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )
        return str(commit)


def _as_module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"only a model can be saved, got {type(model).__name__}")
    return model


def _marked(card: bytes) -> bytes:
    """The card, and below it, unseen where Markdown is shown, by what :func:`_is_unedited` knows it again."""
    return (
        card
        + f"\n<!-- save_pretrained replaces this card until it is edited: {sha256(card).hexdigest()} -->\n".encode()
    )


def _is_unedited(path: Path) -> bool:
    """Is this card as ``save_pretrained`` wrote it?"""
    written = path.read_bytes() if path.is_file() else b""
    return written == _marked(written[: written.rfind(b"\n<!--")])


def _card_texts(name: str, given: Mapping[str, str] | None) -> dict[str, str]:
    """The texts of a card, with ``name`` where no other is given."""
    for key in given or {}:
        if key not in _TEXTS:
            raise TypeError(f"model_card_kwargs: {key!r} given, must be of {', '.join(_TEXTS)}")
    return {"name": name, **(given or {})}


def _hub(purpose: str) -> Any:
    """The module huggingface_hub."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"to {purpose} takes huggingface_hub: pip install 'vpfast[hub]'") from error
    return huggingface_hub


def _downloaded(repo_id: str, **asked: Any) -> Path:
    """The files of a model on the Hub, all of one revision, in the cache of huggingface_hub."""
    here = f"{repo_id} is no folder here, and none of {', '.join(pretrained())}"
    try:
        hub = _hub("look for it on the Hugging Face Hub")
    except ImportError as error:
        raise ImportError(f"{here}; {error}") from error
    try:
        return Path(hub.snapshot_download(repo_id, allow_patterns=list(_FILES), **asked))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"{here}; and the Hugging Face Hub: {reason}") from error
