"""The pinned public packages that the icon set is made of, and how to get them with their own clients."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limner.errors import FileProblem

EMOJI_NAMES = "emojibase-data"
EMOJI_KEYWORDS = "emojilib"
EMOJI_3D = "@lobehub/fluent-emoji-3d"
CLIPART = "openclipart-svg"

# name, version and the SHA-256 of the file that the registry serves
NPM = {
    EMOJI_NAMES: ("17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
    EMOJI_KEYWORDS: ("4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303"),
    EMOJI_3D: ("1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "@iconify-json/circle-flags": ("1.2.11", "ee9a03f6a6fdd79cc6325bdcb7bb93b83d331e60b16e226188f154a64b6bb4a9"),
    "@iconify-json/emojione": ("1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "@iconify-json/emojione-monotone": ("1.2.1", "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e"),
    "@iconify-json/emojione-v1": ("1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
    "@iconify-json/flat-color-icons": ("1.2.3", "d8878a9b0f02d749bc8671eb7d47882eb711185cbcefbb365cbfb488773c4786"),
    "@iconify-json/fluent-color": ("1.2.21", "fa2ddaaac7a2a7b902659cea1b5b8c03017ce2ae56295138876b86a36177dfbe"),
    "@iconify-json/fluent-emoji": ("1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    "@iconify-json/fluent-emoji-flat": ("1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "@iconify-json/fluent-emoji-high-contrast": (
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
    "@iconify-json/fxemoji": ("1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "@iconify-json/game-icons": ("1.2.4", "f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4"),
    "@iconify-json/icon-park": ("1.2.4", "c1a25212a31602aca93c3fa6f6b3288e89b9d7811afc132dfd78506e9d586b6f"),
    "@iconify-json/meteocons": ("1.2.4", "1c0b49c6375c0e35c3ed65db6e41e9811a0cbd2368c13ee27f870f60c6185ff0"),
    "@iconify-json/noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "@iconify-json/noto-v1": ("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "@iconify-json/openmoji": ("1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "@iconify-json/ph": ("1.2.2", "e3a582a047d9829fc7e8842c660d8065e598d1b68bb58cb68e75a1f1e5a614cc"),
    "@iconify-json/streamline-emojis": ("1.2.4", "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"),
    "@iconify-json/streamline-freehand-color": (
        "1.2.2",
        "00d74cbddaf1bcf35c8614ac0544d10af69c7cee8801475473fe424ee0c0c642",
    ),
    "@iconify-json/streamline-pixel": ("1.2.0", "404d450254e0e205769f8b13d339f74339709fdad101d19297e34b57a671f6e3"),
    "@iconify-json/streamline-ultimate-color": (
        "1.2.2",
        "46133a11f3734bcef29066391d7edc141ed1d8056242ddfa1b5d36ce286420b6",
    ),
    "@iconify-json/twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
}
DEBIAN = {CLIPART: ("1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5")}
_TIMEOUT = 1800  # seconds for one client call


@dataclass(frozen=True)
class Package:
    """A downloaded file whose hash was checked. `members` reads it without unpacking it to disk."""

    file: Path

    def members(self, prefix: str = "", suffix: str = "") -> Iterator[tuple[str, bytes]]:
        """(path inside the package, bytes) of the files whose path starts and ends so; links are followed."""
        root = "./usr/share/" if self.file.suffix == ".deb" else "package/"
        with _open_tar(self.file) as tar:
            for member in tar:
                path = member.name.removeprefix(root)
                if path.startswith(prefix) and path.endswith(suffix) and not member.isdir():
                    stream = tar.extractfile(member)
                    if stream is None:
                        raise FileProblem(f"{member.name} of {self.file.name} is neither a file nor a link to one")
                    yield path, stream.read()

    def read_json(self, path: str) -> Any:
        found = dict(self.members(path, path))
        if path not in found:
            raise FileProblem(f"{self.file.name} holds no {path}; its pin in {__name__} is wrong")
        return json.loads(found[path])


def download(folder: Path, clipart: bool) -> dict[str, Package]:
    """Get every package into `folder` with npm (and apt-get for the clip art). Raises FileProblem."""
    _call("npm", ["pack", "--loglevel=error", *(f"{name}@{version}" for name, (version, _) in NPM.items())], folder, "")
    files = {name: f"{name.lstrip('@').replace('/', '-')}-{version}.tgz" for name, (version, _) in NPM.items()}
    if clipart:
        hint = " (or leave clip art out with --without-clipart)"
        _call("apt-get", ["download", *(f"{name}={version}" for name, (version, _) in DEBIAN.items())], folder, hint)
        files |= {name: f"{name}_{version.replace(':', '%3a')}_all.deb" for name, (version, _) in DEBIAN.items()}
    return {name: check(folder / file, *(NPM | DEBIAN)[name]) for name, file in files.items()}


def check(file: Path, version: str, sha256: str) -> Package:
    """The package in `file`, if it is the very one that is pinned. Raises FileProblem."""
    if not file.is_file():
        raise FileProblem(
            f"the client reported success and left no {file.name}; is its version {version} still served?"
        )
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise FileProblem(f"{file.name} has SHA-256 {found}, pinned is {sha256}: it is not the package that was tested")
    return Package(file)


def _call(client: str, arguments: list[str], folder: Path, hint: str) -> None:
    if shutil.which(client) is None:
        raise FileProblem(f"the icon set is made of packages that {client} fetches, and there is no {client}{hint}")
    try:
        done = subprocess.run([client, *arguments], cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise FileProblem(f"{client} got no answer within {_TIMEOUT} s; try again{hint}") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("npm error", "npm ERR!", "E:"))] or lines or ["nothing"]
        said = "; ".join(errors)[:300]
        raise FileProblem(f"{client} could not fetch the packages, it said: {said}{hint}")


def _open_tar(file: Path) -> tarfile.TarFile:
    if file.suffix != ".deb":
        return tarfile.open(file)
    return tarfile.open(fileobj=io.BytesIO(lzma.decompress(_ar_member(file.read_bytes(), b"data.tar.xz"))))


def _ar_member(archive: bytes, name: bytes) -> bytes:
    """One file of a Unix ar archive, which is what a .deb is: 60-byte headers, contents padded to even length."""
    at = len(b"!<arch>\n")
    while at + 60 <= len(archive):
        header = archive[at : at + 60]
        length = int(header[48:58])
        if header[:16].rstrip(b" /") == name:
            return archive[at + 60 : at + 60 + length]
        at += 60 + length + length % 2
    raise FileProblem(f"the Debian package holds no {name.decode()}")
