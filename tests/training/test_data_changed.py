"""A run that goes on with other data does not end as it would have: it says so, and asks first."""

from __future__ import annotations

import io
import tarfile

import pytest
import torch
from PIL import Image
from toy import StopAt, ending, fit

from limner.data.batches import DataConfig, open_batches
from limner.errors import FileProblem
from limner.training import loop
from limner.training.state import changed


@pytest.fixture
def pictures(here):
    (here / "pictures").mkdir()
    for i, color in enumerate(("red", "blue", "green", "black", "white")):
        Image.new("RGB", (32, 32), color).save(here / "pictures" / f"{i}.png")
        (here / "pictures" / f"{i}.txt").write_text(f"a {color} square")
    return here / "pictures"


def account(pictures, **fields):
    told = {"source": "folder", "folder": str(pictures), "size": 32, **fields}
    return open_batches(DataConfig(**told), 0, torch.device("cpu")).account()


CHANGES = {
    "4 samples, where there were 5": lambda p: [(p / f"4.{ending}").unlink() for ending in ("png", "txt")],
    "other names": lambda p: [(p / f"4.{ending}").rename(p / f"5.{ending}") for ending in ("png", "txt")],
    "other captions": lambda p: (p / "4.txt").write_text("a snowman"),
    "other sizes of files": lambda p: Image.new("RGB", (90, 32), "red").save(p / "0.png"),
    "other captions and sizes of files": lambda p: [(p / "0.txt").unlink(), (p / "0.png").write_text("torn")],
    "": lambda p: [p.rename(p.with_name("moved")), p.with_name("moved").rename(p), (p / "0.png").touch()],
}


@pytest.mark.parametrize("said", CHANGES)
def test_what_changed_is_named(pictures, said):
    then = account(pictures)
    CHANGES[said](pictures)
    assert changed({"data": then}, {"data": account(pictures)}) == said


def test_masks_count_what_is_beyond_the_limit_does_not_and_what_nobody_knows_is_no_change(pictures):
    then, first = account(pictures), account(pictures, limit=3)
    (pictures / "4.txt").write_text("a snowman")
    assert account(pictures, limit=3) == first
    Image.new("L", (32, 32)).save(pictures / "0-mask.png")
    assert changed({"data": then}, {"data": account(pictures)}) == "other captions and sizes of files"
    assert changed({}, {"data": then}) == changed({"data": then}, {}) == ""
    two = {"data": then, "prior": first}
    assert changed(two, {"data": then, "prior": then}) == "prior: 5 samples, where there were 3"


def test_members_of_shards_and_pictures_in_memory_are_told_apart(tmp_path):
    def shard(size: int) -> dict:
        data = io.BytesIO()
        Image.new("RGB", (size, 8)).save(data, "PNG")
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for k in range(2):
                member = tarfile.TarInfo(f"{k}.png")
                member.size = len(data.getvalue())
                tar.addfile(member, io.BytesIO(data.getvalue()))
        return account(tmp_path / "a.tar", source="webdataset")

    one, again, other = shard(8), shard(8), shard(800)
    assert one == again
    assert changed({"data": one}, {"data": other}) == "other sizes of files"
    shapes = [account("", source="shapes", limit=n) for n in (4, 4, 5)]
    assert shapes[0] == shapes[1]
    assert changed({"data": shapes[0]}, {"data": shapes[2]}) == "5 samples, where there were 4"


def test_a_run_goes_on_with_other_data_only_if_told_and_from_there_these_are_its_data(tmp_path, capsys):
    run, then, now = tmp_path / "run", {"data": {"samples": 5}}, {"data": {"samples": 4}}
    assert fit(run, data=then, stop=StopAt(7)) == 1
    asked = r"the data are not those of step 7 of .*run, 4 samples, where there were 5: put them back.*--data-changed"
    for _ in range(2):
        with pytest.raises(FileProblem, match=asked):
            fit(run, data=now)
    assert fit(run, data=now, data_changed=True, stop=StopAt(4)) == 1
    assert "from step 7 on with other data: 4 samples, where there were 5" in (run / "log.txt").read_text()
    assert fit(run, data=now) == 0
    assert fit(tmp_path / "whole", data=now) == 0
    assert ending(run) == ending(tmp_path / "whole")
    assert "the data are what they were" not in capsys.readouterr().out


def test_a_folder_that_lost_a_picture_is_noticed_by_the_command(limner, here, pictures, tiny_model, monkeypatch):
    few = ("steps=4", "batch_size=2", "log_every=2", "warmup=0", "data.size=32", "adapter.rank=2")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequests", lambda *_: StopAt(2))
        told = ("prior.prompt=a dog", "prior.images=2", "--device", "cpu")
        assert limner("train", "lora", "-m", tiny_model, "-d", pictures, "-o", "run", *told, *few).code == 0
    assert limner("train", "icons-tiny", "-o", "other", "--data-changed").code == 2
    (here / "run" / "prior" / "000001.png").unlink()  # which is drawn again, and the same
    CHANGES["4 samples, where there were 5"](pictures)
    before = {path: path.read_bytes() for path in (here / "run").rglob("*.safetensors")}
    done = limner("train", "--resume", "run", "--device", "cpu")
    assert (done.code, done.err.count("\n")) == (3, 1)
    assert "step 2 of run, data: 4 samples, where there were 5: put" in done.err
    assert {path: path.read_bytes() for path in (here / "run").rglob("*.safetensors")} == before
    done = limner("train", "--resume", "run", "--device", "cpu", "--data-changed")
    assert done.code == 0, done.err
