"""Depth and poses for ControlNets, found by models that a person brings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import estimators as models
from limner import exchange, hints, metadata, pictures, pipeline
from limner.adapters import control, makers
from limner.checkpoints import estimators, hub
from limner.errors import CheckpointMismatch, FileProblem, Ignored, UnknownName, UsageError

from . import stable_diffusion
from .test_control import drawn, picture, theirs

SHOWN = {
    "depth": {"size": {"height": 70, "width": 70}, "keep_aspect_ratio": True, "ensure_multiple_of": 14},
    "pose": {"size": {"height": 80, "width": 48}},
}
MAKE = {
    "depth": lambda: models.depth(models.DEPTHS["four layers by number"]),
    "pose": lambda: models.pose(models.POSES["simple"]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Of both models, a pipeline and a ControlNet."""
    diffusers.utils.logging.set_verbosity_error()
    found = {}
    for maker, make in MAKE.items():
        network = models.noised(make())
        (network.head.conv3 if maker == "depth" else network.head.conv).bias.data += 1
        network.save_pretrained(folder := tmp_path_factory.mktemp(maker) / f"small-{maker}")
        (folder / "preprocessor_config.json").write_text(json.dumps(SHOWN[maker]))
        found[maker] = folder
    theirs("sd1", 5).save_pretrained(found.setdefault("net", tmp_path_factory.mktemp("control") / "net5"))
    return found | {"sd1": stable_diffusion.sd1(tmp_path_factory.mktemp("sd1"))}


@pytest.fixture(scope="module")
def pipe(folders) -> Any:
    return pipeline.load(folders["sd1"])


READ = estimators.READERS


@pytest.mark.parametrize("maker", MAKE)
def test_a_network_is_told_what_the_model_finds_in_the_size_that_is_drawn(pipe, folders, maker, here, monkeypatch):
    photo = picture(side=100)
    photo.save(here / "in.png")
    found = READ[maker](folders[maker]).picture(hints.on_white(pictures.fit(photo, 32, 32)))
    assert len(found.getcolors()) > 3
    made = drawn(pipe, monkeypatch, control=f"{folders['net']}=in.png:0.7,{maker}={folders[maker]}")
    given, plain = (drawn(pipe, monkeypatch, control=[(folders["net"], im, 0.7)]) for im in (found, photo))
    assert torch.equal(made, given)
    assert not torch.equal(made, plain)


def test_on_the_command_line_and_in_what_a_picture_remembers(limner, here, folders):
    picture().save(here / "in.png")
    shutil.copytree(folders["depth"], here / "other-depth")
    weights = load_file(here / "other-depth" / "model.safetensors")
    save_file(weights | {"head.conv3.bias": torch.tensor([3.0])}, here / "other-depth" / "model.safetensors")
    plain, command = f"{folders['net']}=in.png", ("generate", "-m", folders["sd1"])
    ask = f"{plain}:0.7,depth={folders['depth']},end=0.9"
    done = limner(*command, "a red fox", "--steps", 4, "--control", ask, "-o", "out.png", "-s", 1)
    assert (done.code, done.out) == (0, "out.png\n"), done.err
    assert "net5: ControlNet by 0.7, told depth of a picture as small-depth finds it, from 0 to 0.9" in done.err
    told = metadata.read_settings(Path("out.png"))["control"][0]
    assert (told["maker"], told["maker_name"], len(told["maker_hash"])) == ("depth", "small-depth", 10)
    assert str(folders["depth"].parent) not in json.dumps(told)
    for more in ("", ",depth"):
        again = limner(*command, "-C", "out.png", "-o", "x.png", "--control", plain + more)
        assert again.code == 2
        assert f"painted after the depth that the model 'small-depth' (hash {told['maker_hash']}) finds" in again.err
        assert ", which the picture does not hold: add ,depth=MODEL to --control net5=IMAGE\n" in again.err
    again = limner(*command, "-C", "out.png", "-o", "again.png", "--control", f"{plain},depth={folders['depth']}")
    assert again.code == 0, again.err
    assert "expect another picture" not in again.err
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    other = limner(*command, "-C", "out.png", "--dry-run", "--control", f"{plain},depth=other-depth")
    assert f"the model of depth of net5 is not the one painted with (hash {told['maker_hash']})" in other.err
    changed = limner(*command, "-C", "out.png", "--dry-run", "--control", f"{plain},tile")
    assert changed.code == 0, changed.err
    assert "expect another picture" not in changed.err


def test_what_is_asked_for_and_cannot_be_is_said_in_a_line(pipe, folders, here):
    def ask(**told: Any) -> Any:
        return control.open_control(pipe.system, **{"file": folders["net"], "image": picture()} | told)

    assert control.parse("net=in.png:0.5,pose=hf:a/b,end=0.5") == {
        "file": "net", "image": "in.png", "weight": 0.5, "maker": "pose", "maker_model": "hf:a/b", "end": 0.5,
    }  # fmt: skip
    with pytest.raises(UnknownName, match=r"option of --control 'depht=x'\. Did you mean 'depth=MODEL'"):
        control.parse("net=in.png,depht=x")
    for maker, name in hints.WITH_MODELS.items():
        with pytest.raises(UsageError, match=f"{maker} is found .* say which, {maker}=hf:{name} or {maker}=FOLDER"):
            ask(**control.parse(f"net=in.png,{maker}") | {"file": folders["net"], "image": picture()})
    with pytest.raises(UsageError, match="canny takes no model: leave it out, or ask for depth or pose"):
        ask(maker="canny", maker_model=folders["depth"])
    with pytest.raises(UsageError, match="small-depth' is a model of which maker"):
        ask(maker_model=folders["depth"])
    with pytest.raises(UsageError, match="the model of depth is ''"):
        ask(maker="depth", maker_model="")
    with pytest.raises(FileProblem, match="no file or folder 'none': depth is found by a model in the folder"):
        ask(maker="depth", maker_model="none")
    with pytest.raises(
        CheckpointMismatch, match="model_type is 'vitpose', and depth is found by one that says 'depth_"
    ):
        ask(maker="depth", maker_model=folders["pose"])
    with pytest.raises(UsageError, match=r"openpose is found .* which Limner has not: .*, depth=MODEL, pose=MODEL"):
        ask(maker="openpose")
    shutil.copy(folders["depth"] / "model.safetensors", here / "alone.safetensors")
    with pytest.raises(FileProblem, match=r"alone\.safetensors has no config\.json beside it"):
        ask(maker="depth", maker_model="alone.safetensors")


@pytest.mark.parametrize("maker", MAKE)
def test_a_model_that_is_not_whole_is_refused_with_its_file_and_key(folders, maker, tmp_path):
    shutil.copytree(folders[maker], folder := tmp_path / "bad")
    file, whole = folder / "model.safetensors", load_file(folders[maker] / "model.safetensors")
    key = next(name for name in sorted(whole) if "query" in name)
    for tensors, words in (
        ({k: t for k, t in whole.items() if k != key}, f"missing (first: {key})"),
        (whole | {"extra": torch.zeros(1)}, "unknown (first: extra)"),
        (whole | {key: torch.zeros(3, 3)}, f"{key} is (3, 3) in the file"),
        (whole | {key: whole[key].int()}, f"{key} is of torch.int32"),
    ):
        save_file(tensors, file)
        with pytest.raises(CheckpointMismatch) as error:
            READ[maker](folder)
        assert words in str(error.value)
        assert str(folder) in str(error.value)
    file.write_bytes((folders[maker] / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(FileProblem, match=r"bad/model\.safetensors is not a whole safetensors file"):
        READ[maker](folder)


@pytest.mark.parametrize("maker", MAKE)
def test_no_settings_crash_it(folders, maker, tmp_path):
    """Each that is read is in turn of another type, out of range, or left out; what is refused is named."""
    shutil.copytree(folders[maker], folder := tmp_path / "bad")
    known, told = Path(estimators.__file__).read_text(encoding="utf-8"), []
    for name in ("config.json", "preprocessor_config.json"):
        good = json.loads((folder / name).read_text())
        for inside in [good, *(v for v in good.values() if isinstance(v, dict))]:
            for key in [key for key in inside if f'"{key}"' in known]:
                before = inside[key]
                for value in (None, -1, 10**9, 1.5, "x", [7, "x"], {}):
                    inside[key] = value
                    (folder / name).write_text(json.dumps(good))
                    try:
                        READ[maker](folder)
                    except FileProblem as error:
                        told.append(str(error))
                inside[key] = before
        (folder / name).write_text(json.dumps(good))
    READ[maker](folder)
    assert len(told) > 50
    assert [text for text in told if "\n" in text or str(folder) not in text or len(text) > 500] == []


def test_experts_and_other_key_points_are_refused_by_name(folders, tmp_path):
    shutil.copytree(folders["pose"], folder := tmp_path / "plus")
    settings = json.loads((folder / "config.json").read_text())
    settings["backbone_config"]["num_experts"] = 6
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        CheckpointMismatch, match=r"num_experts is 6: ViTPose\+ with its mixture of experts is not read"
    ):
        estimators.read_pose(folder)
    settings["backbone_config"]["num_experts"] = 1
    (folder / "config.json").write_text(json.dumps(settings))
    weights = load_file(folder / "model.safetensors")
    weights |= {f"head.conv.{n}": weights[f"head.conv.{n}"].repeat_interleave(2, 0) for n in ("weight", "bias")}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointMismatch, match="finds 34 key points, and COCO's 17 are drawn"):
        estimators.read_pose(folder)


def test_a_picture_without_anybody_is_said_to_tell_nothing(pipe, folders, tmp_path, monkeypatch):
    for maker, words in (
        ("pose", "no joint of a person, who should be one"),
        ("depth", "nothing nearer than the rest"),
    ):
        monkeypatch.setattr(
            READ[maker](folders[maker]).__class__, "picture", lambda _, image: Image.new("RGB", image.size)
        )
        ask = {"file": folders["net"], "image": picture(), "maker": maker, "maker_model": folders[maker]}
        with pytest.warns(
            Ignored, match=f"{words}.* is found in net5's picture by small-{maker}: it is told of nothing"
        ):
            pipe.generate("a fox", steps=2, seed=1, control=[ask])
        pipe.system.adapters.finders.clear()


def test_a_picture_is_looked_at_once(folders, monkeypatch):
    known: dict[str, Any] = {}
    finder = makers.open_finder(known, "depth", folders["depth"])
    assert makers.open_finder(known, "depth", folders["depth"]) is finder
    seen: list[Image.Image] = []
    monkeypatch.setattr(finder.network, "picture", lambda image: (seen.append(image), image)[1])
    for k in (0, 0, 1):
        finder(picture(k))
    assert len(seen) == 2
    assert makers.open_finder(known, "pose", folders["pose"]) is not finder


# ------------------------------------------------------------------- of the Hub


def test_a_model_of_the_hub_comes_with_its_settings(folders, tmp_path, monkeypatch):
    """Each time by the name that it has there, in memory of which pictures are remembered."""
    import huggingface_hub

    asked: list[Any] = []
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", "pytorch_model.bin"]
    there = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: there)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download",
        lambda name, revision, allow_patterns: (asked.append(sorted(allow_patterns)), str(folders["depth"]))[1],
    )  # fmt: skip
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download",
        lambda name, file, revision: (asked.append(file), str(folders["depth"] / file))[1],
    )  # fmt: skip
    finder = makers.open_finder({}, "depth", "hf:someone/Depth-hf")
    assert finder.name == "Depth-hf"
    assert asked == [["config.json", "model.safetensors", "preprocessor_config.json"]]
    asked.clear()
    finder = makers.open_finder({}, "depth", "hf:someone/Depth-hf@main/model.safetensors")
    assert finder.name == "Depth-hf"
    assert asked == ["config.json", "preprocessor_config.json", "model.safetensors"]
    with pytest.raises(FileProblem, match=r"hf:a/b holds config.json, but no weights"):
        hub.choose(["config.json", "flax_model.msgpack"], "hf:a/b", makers.BESIDE)
    assert hub.choose(["a.safetensors"], "hf:a/b", makers.BESIDE) == ["a.safetensors"]


def test_a_model_is_called_by_its_folder_or_file(here):
    (here / "vitpose-base").mkdir()
    names = {
        "vitpose-base": "vitpose-base", "vitpose-base/model.safetensors": "vitpose-base", "x/vit.safetensors": "vit",
        "hf:usyd/vitpose@main": "vitpose",
    }  # fmt: skip
    assert {source: makers.called(source) for source in names} == names
    settings = {"control": [{"name": "net", "hash": "?", "weight": 1.0, "maker": "pose", "maker_name": "a/b"}]}
    with pytest.raises(ValueError, match="a path"):
        metadata.check_settings(settings)


@pytest.mark.parametrize("makers", ["canny,sobel", "pose=a,depth=b", "canny,depth=b", "depth=b,canny"])
def test_one_picture_is_made_one_way(makers):
    with pytest.raises(UsageError, match=r"asks for \w+ and \w+ of one picture"):
        control.parse(f"net.safetensors=photo.png:0.8,{makers}")


@pytest.mark.parametrize("maker", MAKE)
def test_inspect_says_what_a_model_finds(folders, maker, tmp_path):
    told = exchange.inspect(folders[maker])
    assert told["kind"] == f"model that finds {maker} in pictures"
    assert f",{maker}={folders[maker]}" in told["needs"]
    shutil.copytree(folders[maker], tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": ["vitpose"]}')
    assert exchange.inspect(tmp_path / "other")["kind"] == "unknown"
