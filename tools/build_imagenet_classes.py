"""Make src/limner/weights/imagenet/classes.txt from the PyPI wheel timm 1.0.31, checked by hash.

    pip download --no-deps timm==1.0.31
    python tools/build_imagenet_classes.py timm-1.0.31-py3-none-any.whl

A line is a class of ImageNet-1k, in the order in which all its networks count them: the words of a synset of WordNet.
"""

import hashlib
import sys
import zipfile
from pathlib import Path

ORDER, WORDS = "timm/data/_info/imagenet_synsets.txt", "timm/data/_info/imagenet_synset_to_lemma.txt"
SHA256 = "4eb3da435cf544e4a6f390f62c84cb9c9bb68cf8b14e97f8a063452382e5efd2"
OUT = Path(__file__).parent.parent / "src/limner/weights/imagenet/classes.txt"


def main() -> None:
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        order, words = (wheel.read(name).decode().splitlines() for name in (ORDER, WORDS))
    known = dict(line.split("\t") for line in words)
    plain = "".join(f"{known[synset]}\n" for synset in order).encode()
    digest = hashlib.sha256(plain).hexdigest()
    assert digest == SHA256, f"the classes have SHA-256 {digest}, expected {SHA256}"

    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_bytes(plain)
    print(f"{len(order)} classes, {len(plain)} bytes")


if __name__ == "__main__":
    main()
