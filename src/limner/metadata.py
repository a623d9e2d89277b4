"""What a picture remembers of its making, as text chunks of its PNG file; nothing about who, where or when.

`parameters`            infotext, the de-facto standard of Stable Diffusion web UI that galleries read
`limner`                the complete settings as JSON with sorted keys: what `read_settings` reads back
`XML:com.adobe.xmp`     the IPTC mark of a generated picture (Digital Source Type, IPTC Photo Metadata 2023.2)

The same pixels and settings give the same bytes. What is read is untrusted: it is checked value by value.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner import names
from limner.errors import FileProblem

if TYPE_CHECKING:
    from PIL import Image

MAX_PROMPT = 20_000
MAX_TEXT = 300_000  # characters of one text chunk that we are willing to read

# Every setting a picture can remember, with its type and its range (of a text: of its length).
SETTINGS: dict[str, tuple[type, float, float]] = {
    "limner": (str, 1, 50),  # version that painted it
    "model": (str, 1, 200),  # a name; never a path
    "model_hash": (str, 1, 64),  # SHA-256 of the weights, or the first digits of it
    "vae": (str, 1, 200),  # the name of its file
    "vae_hash": (str, 1, 64),
    "text_encoder": (str, 1, 400),  # the names of their files
    "text_encoder_hash": (str, 1, 64),
    "prediction": (str, 1, 20),  # of a network whose files do not say it
    "prompt": (str, 0, MAX_PROMPT),
    "negative": (str, 0, MAX_PROMPT),
    "seed": (int, 0, 2**64 - 1),
    "width": (int, 1, 65_536),
    "height": (int, 1, 65_536),
    "steps": (int, 1, 100_000),
    "guidance": (float, 0, 1e6),
    "sampler": (str, 1, 100),
    "schedule": (str, 1, 100),
    "strength": (float, 0, 1),
    "mask_blur": (float, 0, 100),
    "only_masked": (bool, 0, 1),
    "padding": (int, 0, 65_536),  # around what is masked
    "guidance_kind": (str, 1, 50),
    "guidance_rescale": (float, 0, 1),
    "guidance_mimic": (float, 0, 100),
    "image_guidance": (float, 0, 100),
    "depth_hash": (str, 1, 64),  # of the depth map given
    "guidance_interval": (list, 2, 2),
    "eta": (float, 0, 1),
    "churn": (float, 0, 1000),
    "pag_scale": (float, 0, 100),
    "pag_layers": (list, 1, 100),
    "guide_model": (str, 1, 200),
    "guide_model_hash": (str, 0, 64),
    "classifier": (str, 1, 200),
    "classifier_hash": (str, 0, 64),
    "classifier_scale": (float, 0, 100),
    "variation": (float, 0, 1),
    "variation_seed": (int, 0, 2**63 - 1),
    "variation_image_hash": (str, 1, 64),  # of the picture turned to
    "invert": (str, 0, MAX_PROMPT),  # what the picture given shows
    "refiner": (str, 1, 200),
    "refiner_hash": (str, 0, 64),
    "switch_at": (float, 0, 1),
    "hires": (float, 1, 16),
    "hires_strength": (float, 0, 1),
    "hires_steps": (int, 1, 1000),
    "prompt_dialect": (str, 1, 50),
    "clip_skip": (int, 1, 1000),
    "compat": (str, 1, 20),
    "noise_delta": (int, 0, 2**31),
    "place": (int, 0, 1023),  # in a batch of ComfyUI's
    "tile": (int, 0, 65_536),  # pixels that the network sees at once
    "vae_tile": (int, 0, 65_536),
    "noise_level": (int, 0, 999),  # of a picture that was enlarged
    "adapters": (list, 1, 100),  # each as `ADAPTER`: of LoRA and its kin, with a weight; without, a learned word
    "control": (list, 1, 100),  # each as `CONTROL`
    "ip_adapter": (list, 1, 100),  # each as `IP_ADAPTER`
}
CONTROL: dict[str, tuple[type, float, float]] = {
    "name": (str, 1, 200),
    "hash": (str, 1, 64),
    "weight": (float, -100, 100),
    "start": (float, 0, 1),
    "end": (float, 0, 1),
    "guess": (bool, 0, 1),
    "maker": (str, 1, 50),  # of what it saw
    "maker_name": (str, 1, 200),  # of the model that a maker looked through; never a path
    "maker_hash": (str, 1, 64),
    "kind": (str, 1, 50),
    "image_hash": (str, 1, 64),  # of the picture given
}
ADAPTER: dict[str, tuple[type, float, float]] = {
    "name": (str, 1, 200),  # of its file; never a path
    "hash": (str, 1, 64),
    "weight": (float, -100, 100),
    "blocks": (dict, 1, 1000),  # factors of blocks
}
IP_ADAPTER = ADAPTER | {"image_hash": (str, 1, 64)}  # of the picture shown

NUMBERS = {
    "Mask blur": "mask_blur",
    "Masked area padding": "padding",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation",
    "CFG Rescale phi": "guidance_rescale",
    "Mimic scale": "guidance_mimic",
    "Image CFG scale": "image_guidance",
    "PAG Scale": "pag_scale",
    "Refiner switch at": "switch_at",
    "Hires upscale": "hires",
    "Hires steps": "hires_steps",
    "ENSD": "noise_delta",
    "Tile": "tile",
    "VAE tile": "vae_tile",
}  # infotext -> setting
ONLY_MASKED = "Only masked"

XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType='
    '"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/></rdf:RDF></x:xmpmeta>'
    '<?xpacket end="w"?>'
)


# --- writing ---------------------------------------------------------------------------------------------------------


def save_png(image: Image.Image, settings: dict[str, Any], path: Path) -> Path:
    """Write `image` with its settings to `path`, or to `fox-2.png`, `fox-3.png`, ... when `fox.png` is taken.

    Never overwrites, not even in a race; the file appears complete or not at all; missing folders are made.
    Returns the path written. Raises FileProblem: no PNG name, a folder, not writable, disk full.
    """
    data = encode_png(image, settings)
    temporary = path.parent / f".limner-{secrets.token_hex(8)}.tmp"
    try:
        _check_name(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(temporary, data)
        try:
            written = _claim(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return written


def encode_png(image: Image.Image, settings: dict[str, Any]) -> bytes:
    """The bytes of a PNG file with `settings` inside, which must be known ones (`SETTINGS`)."""
    from PIL.PngImagePlugin import PngInfo

    check_settings(settings)
    chunks = PngInfo()
    # A tEXt chunk where latin-1 will do, iTXt where not; neither can hold a NUL or half a surrogate pair.
    chunks.add_text("parameters", to_infotext(settings).replace("\0", "").encode("utf-8", "replace").decode())
    chunks.add_text("limner", json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False))
    chunks.add_itxt("XML:com.adobe.xmp", XMP)
    bare = image.copy()
    bare.info = {}  # what another program left in it (profiles, EXIF, comments) is not ours to publish
    out = io.BytesIO()
    bare.save(out, "PNG", pnginfo=chunks)
    return out.getvalue()


PREVIEW = "limner-preview"


def save_preview(image: Image.Image, path: Path) -> None:
    """Put a passing picture at `path` in place of the one before: whoever reads it finds one of both, whole. Raises
    FileProblem."""
    from PIL.PngImagePlugin import PngInfo

    marks = PngInfo()
    marks.add_text(PREVIEW, "of a picture that is being painted")
    marks.add_itxt("XML:com.adobe.xmp", XMP)
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=marks, compress_level=1)
    temporary = path.parent / f".limner-{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(temporary, out.getvalue())
        try:
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def check_preview(path: Path) -> None:
    """Raise FileProblem if `save_preview` to `path` would fail, or would replace what is no preview."""
    from PIL import Image

    check_writable(path)
    if not os.path.lexists(path):
        return
    known = False
    with contextlib.suppress(Exception):  # Pillow's plugins raise many kinds
        if path.is_file():
            with Image.open(path, formats=["PNG"]) as found:
                known = PREVIEW in found.info
    if not known:
        raise FileProblem(f"{str(path)!r} is there and is no preview, so it is kept: name another file for previews")


def check_writable(path: Path, size: int = 0) -> None:
    """Raise FileProblem if `save_png` to `path` would fail, leaving nothing behind. `size` bytes are needed."""
    try:
        _check_name(path)
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        probe = folder / f".limner-{secrets.token_hex(8)}.tmp"
        _write_synced(probe, b"limner")
        probe.unlink()
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise _cannot_write(path, error) from error


def _check_name(path: Path) -> None:
    if path.is_dir():
        raise FileProblem(f"cannot write {str(path)!r}: it is a folder; name a file in it")
    if path.suffix.lower() != ".png":
        raise FileProblem(f"cannot write {str(path)!r}: pictures are saved as PNG, so let the name end in .png")


def _write_synced(path: Path, data: bytes) -> None:
    """A new file with `data` on the disk, or no file."""
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink()
            raise


def _claim(temporary: Path, path: Path) -> Path:
    """Give the finished file the first free name. Linking and exclusive creation both fail on a taken one."""
    for number in itertools.count(1):
        target = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            os.link(temporary, target)
            return target
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
        try:  # a file system without hard links, such as FAT: reserve the name, then replace what we reserved
            os.close(os.open(target, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        try:
            temporary.replace(target)
        except BaseException:
            target.unlink()
            raise
        return target
    raise AssertionError("unreachable")


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows has no such call
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse; the file itself is synced
            os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: OSError) -> FileProblem:
    code = errno.ENOTDIR if error.errno == errno.EEXIST else error.errno or 0  # a parent exists, but as a file
    advice = {
        errno.ENOSPC: "free some space or choose another disk",
        errno.EDQUOT: "free some space or choose another disk",
        errno.ENAMETOOLONG: "choose a shorter name",
    }
    reason = os.strerror(code).lower() if code else type(error).__name__
    return FileProblem(f"cannot write {str(path)!r}: {reason}; {advice.get(code, 'choose another place')}")


# --- infotext --------------------------------------------------------------------------------------------------------


def to_infotext(settings: dict[str, Any]) -> str:
    """Settings as web UI writes them: the prompt, "Negative prompt: ...", then one line of `Key: value` pairs."""
    size = f"{settings['width']}x{settings['height']}" if {"width", "height"} <= settings.keys() else None
    over = settings.get("strength", settings.get("hires_strength"))
    pairs = {
        "Steps": settings.get("steps"),
        "Sampler": names.title(settings["sampler"], names.SAMPLERS) if "sampler" in settings else None,
        "Schedule type": names.title(settings["schedule"], names.SCHEDULES) if "schedule" in settings else None,
        "CFG scale": f"{settings['guidance']:.12g}" if "guidance" in settings else None,
        "Seed": settings.get("seed"),
        "Size": size,
        "Model hash": settings["model_hash"][:10] if "model_hash" in settings else None,
        "Model": settings.get("model"),
        "VAE hash": settings.get("vae_hash"),
        "VAE": settings.get("vae"),
        "Clip skip": skip if (skip := settings.get("clip_skip", 1)) > 1 else None,
        "Prompt dialect": settings.get("prompt_dialect"),
        "Denoising strength": f"{over:.12g}" if over is not None else None,
        "Inpaint area": ONLY_MASKED if settings.get("only_masked") else None,
        **{key: f"{settings[name]:.12g}" if name in settings else None for key, name in NUMBERS.items()},
        "Refiner": f"{settings['refiner']} [{settings['refiner_hash']}]" if "refiner" in settings else None,
        "RNG": {"a1111-cpu": "CPU"}.get(settings.get("compat", "")),
        "Compat": settings.get("compat"),
        "Guidance kind": settings.get("guidance_kind"),
        "Version": f"limner {settings['limner']}" if "limner" in settings else None,
    }
    adapters = settings.get("adapters", [])
    for k, one in enumerate(settings.get("control", [])):
        told = {"Model": f"{one['name']} [{one['hash']}]", "Weight": one["weight"]}
        told |= {"Guidance Start": one.get("start", 0.0), "Guidance End": one.get("end", 1.0)}
        told = {"Module": one.get("maker", "none")} | told
        pairs[f"ControlNet {k}"] = ", ".join(f"{name}: {value}" for name, value in told.items())
    for k, one in enumerate(settings.get("ip_adapter", [])):
        pairs[f"IP-Adapter {k}"] = f"Model: {one['name']} [{one['hash']}], Weight: {one['weight']}"
    for key, weighted in (("Lora hashes", True), ("TI hashes", False)):
        hashes = [f"{one['name']}: {one['hash']}" for one in adapters if ("weight" in one) is weighted]
        pairs[key] = ", ".join(hashes) or None
    tags = "".join(f" <lora:{one['name']}:{one['weight']:.12g}>" for one in adapters if "weight" in one)
    lines = [settings.get("prompt", "") + tags]
    if settings.get("negative"):
        lines.append(f"Negative prompt: {settings['negative']}")
    lines.append(", ".join(f"{key}: {_quote(str(value))}" for key, value in pairs.items() if value is not None))
    return "\n".join(lines)


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:"\n') else value


TAG = re.compile(r"\s*<lora:([^:<>]{1,200})(?::(-?[\d.]{1,20}))?>")
PAIR = re.compile(r'\s*(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def from_infotext(text: str) -> dict[str, Any]:
    """The settings in a `parameters` text of any program that writes this grammar; what we have no word for is left.

    Raises ValueError where a number is none.
    """
    *lines, last = text.strip().split("\n")
    pairs = {k: json.loads(v) if v.startswith('"') else v.strip() for k, v in PAIR.findall(last)}
    if len(pairs) < 3:
        lines, pairs = [*lines, last], {}
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    settings: dict[str, Any] = {
        "prompt": "\n".join(lines[:start]).strip(),
        "negative": "\n".join(lines[start:]).removeprefix("Negative prompt:").strip(),
    }
    numbers = {"Steps": ("steps", int), "Seed": ("seed", int), "CFG scale": ("guidance", float)}
    numbers |= {"Denoising strength": ("strength", float), "Clip skip": ("clip_skip", int)}
    numbers |= {
        key: (name, int if name.endswith(("seed", "steps", "delta", "padding", "tile")) else float)
        for key, name in NUMBERS.items()
    }
    if pairs.get("Inpaint area") == ONLY_MASKED:
        settings["only_masked"] = True
    else:  # some programs say it of whole pictures too
        pairs.pop("Masked area padding", None)
    if "Hires upscale" in pairs:  # the strength is that of the second pass
        numbers["Denoising strength"] = ("hires_strength", float)
    for key, (name, kind) in numbers.items():
        if key in pairs:
            settings[name] = kind(pairs[key])
    hashes, learned = (
        dict(row.rpartition(": ")[::2] for row in pairs.get(key, "").split(", ") if ": " in row)
        for key in ("Lora hashes", "TI hashes")
    )
    adapters: list[dict[str, Any]] = [
        {"name": name, "hash": hashes.get(name) or "?", "weight": float(weight or 1)}
        for name, weight in TAG.findall(settings["prompt"])
    ]
    adapters += [{"name": name, "hash": value} for name, value in learned.items()]
    if adapters:
        settings |= {"adapters": adapters, "prompt": TAG.sub("", settings["prompt"])}
    if controls := [_control(text) for name, text in pairs.items() if re.fullmatch(r"ControlNet \d+", name)]:
        settings["control"] = controls
    if named := re.fullmatch(r"(.+) \[(\w*)\]", pairs.get("Refiner", "")):
        settings |= {"refiner": named[1], "refiner_hash": named[2]}
    if "Size" in pairs:
        width, height = pairs["Size"].split("x")
        settings |= {"width": int(width), "height": int(height)}
    for key, name in (("Prompt dialect", "prompt_dialect"), ("Model", "model"), ("Model hash", "model_hash"),
                      ("VAE", "vae"), ("VAE hash", "vae_hash")):  # fmt: skip
        if pairs.get(key):
            settings[name] = pairs[key]
    if "Sampler" in pairs:
        settings["sampler"] = names.find(pairs["Sampler"], names.SAMPLERS) or pairs["Sampler"]
    if "Schedule type" in pairs:
        settings["schedule"] = names.find(pairs["Schedule type"], names.SCHEDULES) or pairs["Schedule type"]
    return settings


def _control(text: str) -> dict[str, Any]:
    """What an infotext says of a ControlNet."""
    pairs = {name: value.strip() for name, value in PAIR.findall(text)}
    named = re.fullmatch(r"(.+) \[(\w+)\]", model := pairs.get("Model", "?"))
    told: dict[str, Any] = {"name": named[1] if named else model, "hash": named[2] if named else "?"}
    for key, name, usual in (("Weight", "weight", 1), ("Guidance Start", "start", 0), ("Guidance End", "end", 1)):
        told[name] = float(pairs.get(key, usual))
    return told


# --- reading ---------------------------------------------------------------------------------------------------------


def read_settings(path: Path) -> dict[str, Any]:
    """The settings inside a PNG of ours, or as many as another program's `parameters` text has words for.

    Every value is one of `SETTINGS`, of its type and in its range, and is text or a number: nothing is loaded.
    Raises FileProblem: no such file, no PNG, no settings inside, settings that cannot be.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            texts = {k: v for k, v in image.info.items() if k in ("limner", "parameters") and isinstance(v, str)}
    except OSError as error:
        reason = "it is a folder" if path.is_dir() else (error.strerror or "no PNG, or a damaged one").lower()
        raise FileProblem(
            f"cannot read settings from {str(path)!r}: {reason}; name a picture that was saved"
        ) from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileProblem(f"cannot read settings from {str(path)!r}: a damaged PNG; name another picture") from error
    if not texts:
        raise FileProblem(f"{str(path)!r} has no settings inside: some programs strip them; give a prompt instead")
    try:
        if any(len(text) > MAX_TEXT for text in texts.values()):
            raise ValueError(f"longer than {MAX_TEXT:,} characters")
        settings = _from_json(texts["limner"]) if "limner" in texts else from_infotext(texts["parameters"])
        check_settings(settings)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileProblem(f"the settings inside {str(path)!r} cannot be: {reason}; give a prompt instead") from error
    return settings


def _from_json(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    settings = json.loads(text, parse_constant=refuse)
    if not isinstance(settings, dict):
        raise ValueError("not a JSON object")
    return settings


def check_settings(settings: dict[str, Any]) -> None:
    """Raise ValueError unless every setting is known, of its type and in its range."""
    _check(settings, SETTINGS)
    for name, what, known in (("control", "ControlNet", CONTROL), ("ip_adapter", "IP-Adapter", IP_ADAPTER)):
        for one in settings.get(name, []):
            if not isinstance(one, dict) or not {"name", "hash", "weight"} <= one.keys():
                raise ValueError(f"{one!r:.40} is no {what}")
            _check(one, known)
            if problem := misnamed(one.get("maker_name", "-")):
                raise ValueError(f"the name of a model is {one['maker_name']!r:.40}: {problem}")
            for block, factor in one.get("blocks", {}).items():
                _check({"name": block, "weight": factor}, ADAPTER)
    for one in settings.get("adapters", []):
        if not isinstance(one, dict) or not {"name", "hash"} <= one.keys():
            raise ValueError(f"{one!r:.40} is no adapter")
        _check(one, ADAPTER)
        if problem := misnamed(one["name"]):
            raise ValueError(f"the name of an adapter is {one['name']!r:.40}: {problem}")
        for block, factor in one.get("blocks", {}).items():
            _check({"name": block, "weight": factor}, ADAPTER)


def misnamed(name: str) -> str:
    """Why an adapter cannot be called so, "" if it can."""
    _, least, most = ADAPTER["name"]
    if not least <= len(name) <= most:
        return f"{len(name)} characters, not {least} to {most}"
    return "" if set("/\\:\0").isdisjoint(name) else "a path, or one with a colon"


def _check(settings: dict[str, Any], known: dict[str, tuple[type, float, float]]) -> None:
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{name[:50]!r} is no setting this version knows")
        kind, low, high = known[name]
        fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) is (kind is bool)
        measured = len(value) if isinstance(value, str | list | dict) else value
        if not fits or not low <= measured <= high:  # NaN is in no range
            what = {"str": "a text of {:g} to {:g} characters", "list": "a list of {:g} to {:g}"}
            wanted = what.get(kind.__name__, f"{kind.__name__} {{:g}} to {{:g}}").format(low, high)
            raise ValueError(f"{name} is {value!r:.40}, not {wanted}")
