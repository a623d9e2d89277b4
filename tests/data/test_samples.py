"""Sources of samples: all give the same batches of the same pictures, and say what is wrong with their files."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest
import stored_pictures as make
import torch

from limner.data.batches import DataConfig, open_batches, open_samples
from limner.errors import FileProblem, ImageProblem, LimnerError, MissingExtra, UnknownName, UsageError

MAKERS = {
    "folder": make.folder,
    "webdataset": make.shards,
    "parquet": make.parquet,
    "hf": make.saved,
}


def config(source: str, folder: object, **fields: object) -> DataConfig:
    return DataConfig(source=source, folder=str(folder), size=32, **fields)


def opened(source: str, folder: object, **fields: object):
    return open_batches(config(source, folder, **fields), 0, torch.device("cpu"))


def needs_pyarrow(source: str) -> None:
    if source in ("parquet", "hf"):
        pytest.importorskip("pyarrow")


@pytest.mark.parametrize("source", ["table", "webdataset", "parquet", "hf"])
def test_every_source_gives_the_batches_of_a_folder(tmp_path, source):
    needs_pyarrow(source)
    maker = make.table_folder if source == "table" else MAKERS[source]
    fields = {"buckets": True, "bucket_step": 8, "crop": "random", "mirror": True, "shuffle_tags": True}
    wanted = opened("folder", make.folder(tmp_path / "a"), **fields)
    found = opened("folder" if source == "table" else source, maker(tmp_path / "b"), **fields)
    assert len(wanted) == len(found) == 10
    for step in range(8):
        one, other = wanted.batch(step, 4), found.batch(step, 4)
        assert torch.equal(one["images"], other["images"])
        assert one["captions"] == other["captions"]
        assert len(set(other["ids"])) == len(one["ids"])


@pytest.mark.parametrize("source", MAKERS)
def test_pictures_are_found_by_place(tmp_path, source):
    needs_pyarrow(source)
    samples = open_samples(config(source, MAKERS[source](tmp_path / "a")))
    assert [samples.size(i) for i in range(10)] == make.SIZES
    for i in reversed(range(10)):
        assert samples.load(i).getpixel((0, 0)) == (10 * i, 255, 255, 255)
        assert samples.captions[i] == (f"picture {i}, red, blue, of {make.SIZES[i]}",)
    assert len(set(samples.ids)) == 10
    assert len({samples.pictures[i].stamp() for i in range(10)}) == 10


def test_ids_say_where_a_sample_is(tmp_path):
    assert open_samples(config("webdataset", make.shards(tmp_path / "a"))).ids[4] == "shard-001.tar/./p04.png"
    one = open_samples(config("webdataset", tmp_path / "a" / "shard-001.tar"))
    assert (len(one), one.ids[0]) == (6, "shard-001.tar/./p04.png")
    pytest.importorskip("pyarrow")
    assert open_samples(config("parquet", make.parquet(tmp_path / "b"))).ids[3] == "b.parquet:0"
    assert open_samples(config("hf", make.saved(tmp_path / "c"))).ids[7] == "data-00001-of-00002.arrow:1"


def test_a_split_of_several_saved_datasets_is_chosen(tmp_path):
    pytest.importorskip("pyarrow")
    folder = make.saved(tmp_path / "a", ("train", "test"))
    assert len(open_samples(config("hf", folder))) == 10
    assert len(open_samples(config("hf", folder, split="test"))) == 10
    with pytest.raises(UnknownName, match=r"no split of .* 'tests'. Did you mean 'test'"):
        open_samples(config("hf", folder, split="tests"))
    with pytest.raises(UsageError, match=r"data.split=test has no effect: .* is a single dataset"):
        open_samples(config("hf", folder / "train", split="test"))


def test_columns_may_have_any_name_and_captions_be_lists(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = make.picture(1, 8, 8)
    told = pa.table(
        {"bild": [data, data, None], "worte": [["ein", "zwei"], None, ["drei"]], "mask": [data, None, None]}
    )
    parquet.write_table(told, tmp_path / "a.parquet")
    with pytest.raises(FileProblem, match=r"no column of pictures among bild, worte, mask: name it, data.image_column"):
        open_samples(config("parquet", tmp_path / "a.parquet"))
    with pytest.raises(UnknownName, match=r"no column of .*a.parquet 'wort'. Did you mean 'worte'"):
        open_samples(config("parquet", tmp_path, image_column="bild", caption_column="wort"))
    samples = open_samples(config("parquet", tmp_path, image_column="bild", caption_column="worte"))
    assert samples.captions == [("ein", "zwei"), ("",), ("drei",)]
    assert samples.problems == {1: "a.parquet:1 has NoneType, not text, in the column worte"}
    assert [samples.mask(0).size, samples.mask(1)] == [(8, 8), None]
    with pytest.raises(ImageProblem, match=r"^a.parquet:2 holds no bytes of a picture$"):
        samples.load(2)
    assert open_samples(config("parquet", tmp_path, image_column="bild")).captions == [("",)] * 3


def test_members_of_shards_that_are_no_pictures_or_texts_are_of_no_matter(tmp_path):
    data, text = make.picture(1, 8, 8), b"a fox\n\na red fox"
    make.tar(
        tmp_path / "a.tar",
        {
            "x/1.jpg": data,
            "x/1.cls": b"3",
            "x/1.txt": text,
            "x/2.png": data,
            "x/2.mask.png": data,
            ".DS": b"",
            "y": b"",
        },
    )
    samples = open_samples(config("webdataset", tmp_path))
    assert samples.ids == ["a.tar/x/1.jpg", "a.tar/x/2.png"]
    assert samples.captions == [("a fox", "a red fox"), ("",)]
    assert [samples.mask(0), samples.mask(1).size] == [None, (8, 8)]
    assert open_samples(config("webdataset", tmp_path, masks="none")).mask(1) is None


def test_captions_of_shards_that_are_none_make_their_samples_unfit(tmp_path):
    data = make.picture(1, 8, 8)
    texts = {"a.txt": b"\xff", "b.json": b"{", "c.json": b"[]", "d.json": b'{"text": 3}', "e.json": b'{"text": "x"}'}
    make.tar(tmp_path / "s.tar", {f"{name[0]}.png": data for name in texts} | texts)
    problems = open_samples(config("webdataset", tmp_path)).problems
    starts = ["s.tar/a.txt is not UTF-8", "s.tar/b.json is not JSON", *[f"s.tar/{k}.json has no text" for k in "cd"]]
    assert [problems[i][: len(start)] for i, start in enumerate(starts)] == starts
    assert len(problems) == 4


def torn(path, keep=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def scribble(path):
    """Over the header of the fourth member."""
    data = bytearray(path.read_bytes())
    at = data.index(b"./p05.txt")
    data[at : at + 512] = b"x" * 512
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("source", "damage", "message"),
    [
        (
            "webdataset",
            lambda f: torn(f / "shard-001.tar"),
            r"shard-001.tar cannot be read as an uncompressed tar after",
        ),
        (
            "webdataset",
            lambda f: torn(f / "shard-001.tar", 0.33),
            r"shard-001.tar cannot be read .* after \d samples \(un",
        ),
        (
            "webdataset",
            lambda f: scribble(f / "shard-001.tar"),
            r"shard-001.tar cannot .*the mark at its end is missing",
        ),
        (
            "webdataset",
            lambda f: (f / "shard-001.tar").write_bytes(gzip.compress((f / "shard-001.tar").read_bytes())),
            r"shard-001.tar cannot be read as an uncompressed tar after 0 samples",
        ),
        ("webdataset", lambda f: [p.unlink() for p in f.iterdir()], r"no .tar in"),
        ("webdataset", lambda f: make.tar(f / "x.tar", {"a.txt": b""}), r"1 captions in .* no picture: x.tar/a.txt"),
        ("webdataset", lambda f: make.tar(f / "x.tar", {"a.png": b"", "a.PNG": b""}), r"x.tar has two members a.PNG"),
        ("parquet", lambda f: torn(f / "b.parquet"), r"b.parquet cannot be read \("),
        ("parquet", lambda f: [p.unlink() for p in f.iterdir()], r"no .parquet in"),
        ("hf", lambda f: torn(f / "data-00001-of-00002.arrow"), r"data-00001-of-00002.arrow cannot be read \("),
        ("hf", lambda f: (f / "data-00001-of-00002.arrow").unlink(), r"data-00001-of-00002.arrow cannot be read \("),
        ("hf", lambda f: (f / "state.json").unlink(), r"has no state.json: name a folder that save_to_disk"),
        ("hf", lambda f: (f / "state.json").write_text("{"), r"state.json cannot be read as JSON"),
        ("hf", lambda f: (f / "state.json").write_text("{}"), r"state.json names no files of data"),
        (
            "hf",
            lambda f: (f / "state.json").write_text(json.dumps({"_indices_data_files": [{"filename": "x"}]})),
            r"keeps its rows in an order of their own: save it again after flatten_indices",
        ),
        ("folder", lambda f: [p.unlink() for p in f.iterdir()], r"no picture in"),
        ("folder", shutil.rmtree, r"data.folder=.* does not exist"),
    ],
)
def test_files_that_cannot_be_read_are_named_before_the_first_step(tmp_path, source, damage, message):
    needs_pyarrow(source)
    folder = MAKERS[source](tmp_path / "a")
    damage(folder)
    with pytest.raises(FileProblem, match=message) as caught:
        opened(source, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["parquet", "hf"])
def test_what_is_to_be_installed_is_said(tmp_path, monkeypatch, source):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=rf"data.source={source} needs .* 'pyarrow': pip install 'limner\[data\]'"):
        opened(source, tmp_path)


def test_parquet_that_the_memory_cannot_hold_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr("limner.data.tables.memory_of", lambda device: 100)
    with pytest.raises(FileProblem, match="more than half of this machine's memory: save it with save_to_disk"):
        opened("parquet", make.parquet(tmp_path / "a"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "folders"}, "no data source 'folders'. Did you mean 'folder'"),
        ({"source": "folder", "folder": ""}, "data.source=folder needs data.folder=PATH"),
        ({"source": "shapes", "buckets": True}, "data.buckets=True has no effect on data.source=shapes"),
        ({"source": "icons", "bad": "raise"}, "data.bad=raise has no effect on data.source=icons"),
        ({"image_column": "x"}, "data.image_column=x has no effect on data.source=folder"),
        ({"other_sizes": ((8, 8, 0.1),)}, "data.other_sizes=.* has no effect on data.source=folder"),
        ({"keep_tags": 1}, "data.keep_tags=1 has no effect without data.shuffle_tags=true"),
        ({"bucket_step": 8}, "data.bucket_step=8 has no effect without data.buckets=true"),
        ({"mirror": True, "augment": "autoencoder"}, "data.mirror=True has no effect with data.augment=autoencoder"),
        ({"buckets": True, "bucket_step": 0}, "data.bucket_step is of pixels"),
        ({"buckets": True, "bucket_ratio": 0.5}, "data.bucket_ratio of the longer"),
        ({"buckets": True}, "data.size=32 has no bucket in steps of data.bucket_step=64: give a smaller step"),
    ],
)
def test_fields_that_cannot_be_or_have_no_effect_are_refused(tmp_path, fields, message):
    given = {"source": "folder", "folder": make.folder(tmp_path / "a")} | fields
    if given["source"] in ("shapes", "icons"):
        given["folder"] = ""
    with pytest.raises(LimnerError, match=message):
        opened(given.pop("source"), given.pop("folder"), **given)
