"""Make src/limner/weights/clip/merges.txt.gz from the PyPI wheel open-clip-torch 3.3.0, checked by hash.

    pip download --no-deps open-clip-torch==3.3.0
    python tools/build_clip_merges.py open_clip_torch-3.3.0-py3-none-any.whl

CLIP's vocabulary is 256 bytes, the same at the end of a word, a merge a row, and two marks: the published list has
262,144 merges, of which the first 48,894 are used.
"""

import gzip
import hashlib
import sys
import zipfile
from pathlib import Path

SOURCE = "open_clip/bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
USED = 49408 - 2 * 256 - 2
OUT = Path(__file__).parent.parent / "src/limner/weights/clip/merges.txt.gz"


def main() -> None:
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        packed = wheel.read(SOURCE)
    digest = hashlib.sha256(packed).hexdigest()
    assert digest == SHA256, f"{SOURCE} has SHA-256 {digest}, expected {SHA256}"

    merges = gzip.decompress(packed).decode().split("\n")[1 : USED + 1]  # the first line is a version
    assert all(len(merge.split(" ")) == 2 for merge in merges)
    plain = "\n".join(merges).encode()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_bytes(gzip.compress(plain, mtime=0))
    print(
        f"{len(merges)} merges, {OUT.stat().st_size / 1e6:.2f} MB; unpacked SHA-256 {hashlib.sha256(plain).hexdigest()}"
    )


if __name__ == "__main__":
    main()
