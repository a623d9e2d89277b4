"""Models of the Hugging Face Hub, `hf:owner/name`: fetched when first asked for, then taken from the Hub's own cache.

`hf:owner/name@revision` is a certain state of one, `hf:owner/name/model.safetensors` a file of it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from limner.checkpoints import folders
from limner.errors import FileProblem

PREFIX = "hf:"
NAME = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>[\w. /-]+\.(safetensors|ckpt)))?")
BESIDE = (".json", ".txt", ".model")
UNREAD = {"safety_checker", "feature_extractor", "image_encoder", "depth_estimator"}


def fetch(source: str, beside: Sequence[str] = ()) -> Path:
    """The folder or file of this name, on this machine, with those files `beside` it that there are: asked for, a model
    is of one part, in the folder of transformers. Raises FileProblem."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if (said := NAME.fullmatch(source)) is None:
        raise FileProblem(f"{source!r} is not hf:owner/name, hf:owner/name@revision or one with /file.safetensors")
    name, revision, file = said["name"], said["revision"], said["file"]
    try:
        if file:
            for other in beside:
                with suppress(EntryNotFoundError):
                    hf_hub_download(name, str(PurePosixPath(file).with_name(other)), revision=revision)
            return Path(hf_hub_download(name, file, revision=revision))
        found = HfApi().model_info(name, revision=revision)
        wanted = choose([entry.rfilename for entry in found.siblings or ()], source, beside)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        return folder / wanted[0] if len(wanted) == 1 else folder
    except GatedRepoError as error:
        raise FileProblem(
            f"{source} is for those who agreed to its licence: do so on its page, then `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise FileProblem(f"the Hub has no {source}, or does not show it to you: is it spelt so?") from error
    except LocalEntryNotFoundError as error:
        return _kept(name, revision, file, source, error, beside)
    except EntryNotFoundError as error:
        raise FileProblem(f"the Hub has {name}, but no {file or 'such file'} in it") from error
    except FileProblem:
        raise
    except Exception as error:  # of the network: many kinds
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise FileProblem(f"{source} cannot be kept on this machine: {error.strerror}") from error
        return _kept(name, revision, file, source, error, beside)


def choose(names: Collection[str], source: str, beside: Sequence[str] = ()) -> list[str]:
    """Of the files of a repository, those that make a model: of a folder of diffusers each part once, in half precision
    where that is there, else the only single file; where there are files `beside` it, these and the weights that
    transformers names so. Raises FileProblem."""
    if here := [name for name in beside if name in names]:
        of_all = _weights([name for name in names if name.startswith(("model", "pytorch_model")) and "/" not in name])
        if not of_all:
            raise FileProblem(f"{source} holds {here[0]}, but no weights: a file such as model.safetensors is missing")
        return [*here, *sorted(of_all)]
    if folders.INDEX in names:
        wanted = [folders.INDEX]
        for part in (*folders.KNOWN_PARTS, "transformer", *folders.BESIDE - UNREAD):
            inside = [PurePosixPath(name) for name in names if name.startswith(f"{part}/") and name.count("/") == 1]
            weights = _weights([path.name for path in inside])
            wanted += [str(path) for path in inside if path.name in weights or _beside(path.name)]
        if len(wanted) == 1:  # the first folders of diffusers have one part, and that at the root
            weights = _weights([name for name in names if name.startswith("diffusion_pytorch_model.")])
            wanted += [name for name in ("config.json", "scheduler_config.json", *sorted(weights)) if name in names]
        return wanted
    single = sorted(n for n in names if "/" not in n and n.endswith(".safetensors"))
    single = single or sorted(n for n in names if "/" not in n and n.endswith(".ckpt"))
    if len(single) != 1:
        some = f"{len(single)} files, such as {single[0]}: name one, {source}/{single[0]}" if single else "no weights"
        raise FileProblem(f"{source} is no folder of diffusers, and holds {some}")
    return single


def _beside(name: str) -> bool:
    return name.endswith(BESIDE) and ".index." not in name


def _weights(names: Collection[str]) -> set[str]:
    """The weights of one part, once: safetensors before bin, half precision before full, with an index its shards."""
    for ending in (".safetensors", ".bin"):
        for variant in (".fp16", ""):
            here = {n for n in names if n.endswith(ending) and (".fp16" in n) == bool(variant) and ".non_ema" not in n}
            if here:
                return here | {n for n in names if f"{ending}.index" in n and (".fp16" in n) == bool(variant)}
    return set()


def _kept(
    name: str, revision: str | None, file: str | None, source: str, error: Exception, beside: Sequence[str]
) -> Path:
    """What was fetched before, where the Hub cannot be reached; a file that was asked for by name, or nothing."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file:
            return Path(hf_hub_download(name, file, revision=revision, local_files_only=True))
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[]))
        kept = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        wanted = choose(kept, source, beside)
    except Exception:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise FileProblem(f"{source} is not on this machine, and the Hub does not answer ({reason})") from error
    return folder / wanted[0] if len(wanted) == 1 else folder
