"""Models of the Hub, from a small Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from limner import catalog
from limner.checkpoints import hub
from limner.errors import FileProblem
from systems import stable_diffusion

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(the address of a Hub that has one model, its folder, what was asked for)"""
    folder = stable_diffusion.sd1(tmp_path_factory.mktemp("hub"))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"large")
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            if self.path.startswith("/api/models/someone/fox") and "tree" not in self.path:
                names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
                body = json.dumps({"id": "someone/fox", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]})
                self.answer(body.encode(), {"Content-Type": "application/json"})
            elif self.path.startswith("/api/models/someone/fox/tree"):
                rows = [
                    {
                        "type": "file",
                        "path": p.relative_to(folder).as_posix(),
                        "size": p.stat().st_size,
                        "oid": "0" * 40,
                    }
                    for p in sorted(folder.rglob("*"))
                    if p.is_file()
                ]
                self.answer(json.dumps(rows).encode(), {"Content-Type": "application/json"})
            elif self.path.startswith(f"/someone/fox/resolve/{COMMIT}/"):
                path = folder / self.path.removeprefix(f"/someone/fox/resolve/{COMMIT}/")
                body = path.read_bytes()
                self.answer(body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET

        def answer(self, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder, asked
    server.shutdown()


def python(*command: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: where the Hub is, is read once."""
    told = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": ":".join(sys.path), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=told, timeout=120)


def inspected(source: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "limner", "inspect", source, "--json", endpoint=endpoint, home=home)


def test_a_model_of_the_hub_is_fetched_once_and_kept(served, tmp_path):
    endpoint, folder, asked = served
    twice = "from limner.checkpoints.hub import fetch; print(fetch('hf:someone/fox') == fetch('hf:someone/fox'))"
    done = python("-c", twice, endpoint=endpoint, home=tmp_path)
    assert done.stdout == "True\n", done.stderr
    done = inspected("hf:someone/fox", "http://127.0.0.1:9", tmp_path)  # nobody answers there
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["family"] == "Stable Diffusion 1"
    fetched = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    kept = next(tmp_path.rglob(COMMIT))
    assert {p.relative_to(kept).as_posix() for p in kept.rglob("*") if p.is_file()} == {
        name for name in fetched if not name.startswith(("safety_checker", "feature_extractor"))
    }
    files = [line for line in asked if line.startswith("GET /someone")]
    assert len(files) == len(set(files)) > 3


def test_what_the_hub_has_not_is_said_in_one_line(served, tmp_path, limner):
    done = inspected("hf:someone/cat", served[0], tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "the Hub has no hf:someone/cat" in done.stderr.splitlines()[-1]
    assert limner("inspect", "hf:fox").err.startswith("limner: 'hf:fox' is not hf:owner/name")


def test_a_file_is_taken_by_its_name_or_not_at_all(tmp_path, monkeypatch):
    """Never another one of the same model."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    (tmp_path / "a.safetensors").write_bytes(b"")

    def download(name, file, revision=None, local_files_only=False):
        if not local_files_only:
            raise failure
        if file != "a.safetensors":
            raise LocalEntryNotFoundError("not here")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    failures = [ConnectionError("down"), LocalEntryNotFoundError("offline")]
    while failures:
        failure = failures.pop()
        assert hub.fetch("hf:o/n/a.safetensors") == tmp_path / "a.safetensors"
        with pytest.raises(
            FileProblem, match=r"hf:o/n/b.safetensors is not on this machine, and the Hub does not answer"
        ):
            hub.fetch("hf:o/n/b.safetensors")
    failure = OSError(28, "No space left on device")
    with pytest.raises(FileProblem, match="cannot be kept on this machine: No space left"):
        hub.fetch("hf:o/n/a.safetensors")


def test_where_nobody_answers_and_nothing_is_kept_it_is_said(tmp_path):
    done = inspected("hf:someone/fox", "http://127.0.0.1:9", tmp_path)
    assert done.returncode == 3
    assert "hf:someone/fox is not on this machine, and the Hub does not answer" in done.stderr


def test_each_part_is_chosen_once_in_half_precision_where_it_is_there():
    names = [
        "model_index.json", "README.md", "v1-5-pruned.ckpt", "scheduler/scheduler_config.json",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin", "vae/config.json", "vae/diffusion_pytorch_model.bin",
        "text_encoder/config.json", "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors", "text_encoder/model.safetensors.index.json",
        "text_encoder/flax_model.msgpack", "safety_checker/model.safetensors", "vae/onnx/model.onnx",
        "depth_estimator/model.safetensors",
    ]  # fmt: skip
    assert sorted(hub.choose(names, "hf:a/b")) == sorted([
        "model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
        "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.bin", "text_encoder/config.json", "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors", "text_encoder/model.safetensors.index.json",
    ])  # fmt: skip
    early = ["model_index.json", "config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"]
    beside = ["README.md", "diffusion_pytorch_model.bin", "images/one.png"]
    assert hub.choose([*beside, *early], "hf:google/ddpm-cifar10-32") == early
    assert hub.choose(["a.safetensors", "README.md", "vae/x.safetensors"], "hf:a/b") == ["a.safetensors"]
    with pytest.raises(FileProblem, match=r"2 files, such as a.safetensors: name one, hf:a/b/a.safetensors"):
        hub.choose(["a.safetensors", "b.safetensors"], "hf:a/b")
    with pytest.raises(FileProblem, match="holds no weights"):
        hub.choose(["README.md"], "hf:a/b")


def test_a_name_that_is_no_path_is_told_of_the_hub():
    with pytest.raises(FileProblem, match="hf:someone/fox for a model of the Hugging Face Hub"):
        catalog.find("someone/fox")
