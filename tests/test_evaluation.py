"""The evaluation on a miniature pack of drawn shapes, judged by eyes that see an 8 x 8 thumbnail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from limner import evaluation
from limner.data.icons import IconPack, IconRecord
from limner.errors import FileProblem, UnknownName, UsageError
from limner.metrics import retrieval
from limner.metrics.features import FEATURES, FINAL, Features, colours
from limner.metrics.scores import Figure
from limner.types import Defaults

COLOURS = {"red": "#e11", "green": "#1a1", "blue": "#22e", "black": "#000", "pink": "#f9c", "teal": "#088"}
SHAPES = {
    "square": '<rect x="4" y="4" width="24" height="24"/>',
    "disc": '<circle cx="16" cy="16" r="13"/>',
    "bar": '<rect x="2" y="12" width="28" height="8"/>',
    "post": '<rect x="12" y="2" width="8" height="28"/>',
    "roof": '<path d="M16 3 30 29H2z"/>',
    "bowl": '<path d="M2 6H30L16 28z"/>',
    "gem": '<path d="M16 2 30 16 16 30 2 16z"/>',
    "gate": '<path d="M4 4H28V28H20V14H12V28H4z"/>',
}
STYLES = {"plain": "", "framed": '<rect x="1" y="1" width="30" height="30" fill="none" stroke="gray"/>'}
SIZE = 32
HASTE = {"size": SIZE, "steps": 60, "batch": 64}


class Thumbnails:
    """In the place of EffLite0: an 8 x 8 thumbnail, filled up to 1280 numbers, and the true description of colours."""

    device = torch.device("cpu")

    def __init__(self, device="cpu"):
        pass

    def __call__(self, images):
        x = evaluation.to_float(images) if images.dtype == torch.uint8 else images.float()
        small = torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)
        pad = torch.nn.functional.pad
        seen = colours(x)
        return Features(pad(small, (0, FINAL - small.shape[1])), pad(seen, (FEATURES - FINAL - seen.shape[1], 0)))


class Words(torch.nn.Module):
    """In the place of MiniLM: a bag of hashed words."""

    def sentences(self, texts):
        found = torch.zeros(len(texts), 384)
        for row, text in zip(found, texts, strict=True):
            for word in text.replace(":", "").replace(",", "").split():
                row[sum(ord(c) * 31**k for k, c in enumerate(word)) % 384] += 1
        return torch.nn.functional.normalize(found, dim=1)


class Painter(torch.nn.Module):
    """A system that paints for each prompt the picture that `pictures` has for it; its autoencoder errs by `error`."""

    task, name, family, grid = "diffusion", "painter", "tests", 1
    device = torch.device("cpu")
    defaults = Defaults(width=SIZE, height=SIZE, steps=1, guidance=4.0, min_size=16, max_size=64)

    def __init__(self, pictures, error=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.pictures = pictures
        self.autoencoder = SimpleNamespace(encode=lambda x: x, decode=lambda x: x + error)
        self.seen = []

    def check(self, request):
        pass

    def condition(self, prompts, request, negatives):
        return prompts

    def given(self, request, count):
        return {}

    def widen(self):
        return False

    def sample(self, cond, request, noise):
        self.seen += cond
        blank = torch.zeros(4, SIZE, SIZE)
        return torch.stack([self.pictures.get(p, blank) for p in cond])

    def decode(self, latents, tile=None):
        return latents


@pytest.fixture(scope="module")
def pack():
    records, svgs = [], []
    for style, frame in STYLES.items():
        for shape, drawing in SHAPES.items():
            for tint, code in COLOURS.items():
                label = f"{tint} {shape}"
                k = len(records)
                texts = (label, f"{style} icon: {label}", f"{label}, {style} icon", f"a {style} icon of a {label}")
                same = {"set": "test", "group": "object", "tone": None, "tint": None, "tags": (), "weight": 1.0}
                same |= {"licence": "CC0-1.0", "part": "icon", "core": True, "hex": None, "colors": (tint,)}
                names = {"id": f"{style}/{label}", "style": style, "concept": label, "label": label}
                records.append(IconRecord(**names, **same, captions=texts, split="train" if k % 7 else "val"))
                inside = f'<g fill="{code}">{drawing}</g>{frame}'
                svgs.append(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{inside}</svg>')
    offsets = np.zeros(len(records) + 1, dtype=np.int64)
    return IconPack(Path("pack"), records, svgs, np.zeros(0, np.uint8), offsets, "0" * 64)


@pytest.fixture(scope="module")
def blind():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "EffLite0", Thumbnails)
        patch.setattr(evaluation.catalog, "minilm", lambda max_tokens: Words())
        yield


@pytest.fixture(scope="module")
def judge(pack, blind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    evaluation.prepare_judge(pack, folder, **HASTE)
    return folder


def real_pictures(pack):
    held = pack.image_set("val", SIZE)
    return {c[1]: evaluation.to_float(x) for c, x in zip(held.captions, held.images, strict=True)}


def measured(report):
    return {row["name"]: row for row in report["figures"]}


def test_a_painter_of_the_real_pictures_reaches_every_ceiling(pack, judge, tmp_path):
    real = real_pictures(pack)
    report = evaluation.evaluate_system(Painter(real), pack, tmp_path / "out", judge_folder=judge, batch=5)
    rows = measured(report)
    assert rows["prompt accuracy, all"]["value"] == rows["prompt accuracy, all"]["real"] > 0.5
    assert rows["prompt accuracy, new pictures (val)"]["ratio"]["value"] == 1
    assert rows["style accuracy"]["value"] > 0.9
    assert rows["style accuracy"]["met"]
    assert rows["KID-EffLite0 of drawings"]["value"] == pytest.approx(0, abs=1e-9)
    assert rows["autoencoder PSNR on white (val)"]["value"] == pytest.approx(100)  # the cap: no error
    assert rows["copying, against real held-out pictures"]["value"] == pytest.approx(1)
    assert rows["copying, against the same reconstructed"]["value"] == pytest.approx(1)
    assert report["not_measured"] == []
    assert Image.open(tmp_path / "out" / "grid.png").size == (8 * 40 + 8, 8 * 40 + 8)
    assert Image.open(tmp_path / "out" / "pairs.png").mode == "RGB"


def test_a_painter_of_other_pictures_does_not(pack, judge, tmp_path):
    real = real_pictures(pack)
    prompts, pictures = list(real), list(real.values())
    wrong = dict(zip(prompts, pictures[8:] + pictures[:8], strict=True))  # the same shape elsewhere in the other style
    rows = measured(evaluation.evaluate_system(Painter(wrong), pack, tmp_path / "out", judge_folder=judge))
    assert rows["prompt accuracy, all"]["value"] == 0
    assert rows["style accuracy"]["value"] < 0.3
    assert rows["style accuracy"]["met"] is False
    assert rows["KID-EffLite0 of drawings"]["value"] < 0.01  # as a set they are the very same pictures


def test_a_painter_of_training_pictures_is_caught(pack, judge, tmp_path):
    train = pack.image_set("train", SIZE)
    known = dict(zip(real_pictures(pack), map(evaluation.to_float, train.images), strict=False))
    rows = measured(evaluation.evaluate_system(Painter(known), pack, tmp_path / "out", judge_folder=judge))
    assert rows["share nearer to a training picture than the nearest 5 % of real ones"]["value"] == 1
    assert rows["copying, against real held-out pictures"]["met"] is False


def test_copying_is_measured_against_reconstructions_too(pack, judge, tmp_path):
    """Where these are all far from the training pictures, being as near as a real picture is suspicious."""
    painter = Painter(real_pictures(pack), torch.linspace(-1, 1, SIZE))
    rows = measured(evaluation.evaluate_system(painter, pack, tmp_path, judge_folder=judge))
    assert rows["copying, against real held-out pictures"]["value"] == pytest.approx(1)
    assert rows["copying, against the same reconstructed"]["value"] > 1.5


def test_errors_of_the_autoencoder_are_measured_in_the_right_units(pack, judge, tmp_path):
    """Everything 0.1 of the range too bright, where it is not clipped: alpha by 0.1, white by nothing, black by 0."""
    painter = Painter(real_pictures(pack), error=-0.2)
    painter.task = "autoencoding"  # measured without drawing
    report = evaluation.evaluate_system(painter, pack, tmp_path / "out", judge_folder=judge)
    with pytest.raises(UsageError, match="is an autoencoder"):
        evaluation.evaluate_system(painter, pack, tmp_path / "out", judge_folder=judge, steps=7)
    rows = measured(report)
    assert painter.seen == []
    held = evaluation.to_float(pack.image_set("val", SIZE).images)
    again = evaluation.to_float(evaluation.to_bytes(held - 0.2))
    alpha = ((held[:, 3] - again[:, 3]).abs() / 2).mean()
    assert rows["autoencoder alpha error (val)"]["value"] == pytest.approx(float(alpha), rel=1e-5)
    white = lambda x: x[:, :3] * 0.5 + 0.5 + (1 - (x[:, 3:] + 1) / 2)  # noqa: E731
    errors = (white(held).clamp(0, 1) - white(again).clamp(0, 1)).square().mean((1, 2, 3)).clamp(min=1e-10)
    assert rows["autoencoder PSNR on white (val)"]["value"] == pytest.approx(
        float(-10 * errors.log10().mean()), rel=1e-4
    )


def test_the_seed_of_a_prompt_is_its_place_in_the_whole_list(pack, judge, tmp_path, monkeypatch):
    calls = []
    true_draw = evaluation.pipeline.draw
    monkeypatch.setattr(
        evaluation.pipeline,
        "draw",
        lambda s, p, seeds, r, chunk: calls.append(seeds) or true_draw(s, p, seeds, r, chunk),
    )
    evaluation.evaluate_system(Painter(real_pictures(pack)), pack, tmp_path / "o", judge_folder=judge, limit=8)
    assert calls == [[0, 1, 3, 5, 7, 8, 10, 12], list(range(64))]


def test_without_a_judge_the_rest_is_measured_and_the_report_says_so(pack, judge, tmp_path):
    report = evaluation.evaluate_system(Painter(real_pictures(pack)), pack, tmp_path / "o", judge_folder=tmp_path)
    assert "KID-EffLite0 of drawings" in measured(report)
    assert "prompt accuracy, all" not in measured(report)
    assert len(report["not_measured"]) == 1
    assert "Not measured: prompt and style accuracy: no judge in" in evaluation.table(report)


def test_a_judge_of_other_prompts_or_other_weights_is_refused(pack, judge, tmp_path):
    with pytest.raises(FileProblem, match="other prompts"):
        evaluation.read_frozen(judge, "0" * 64)
    torn = Path(shutil.copytree(judge, tmp_path / "torn"))
    with (torn / "judge.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(FileProblem, match="is not the judge of"):
        evaluation.read_frozen(torn, evaluation.sha256_of(evaluation.held_out_prompts(pack.records)))


def test_the_judge_is_told_real_from_wrong_pictures_and_is_the_same_when_made_again(pack, judge, tmp_path):
    first = json.loads((judge / "judge.json").read_text())
    assert first["ceilings"]["all"]["value"] > 0.5
    assert first["floors"]["all"]["value"] == 0
    assert first["kid_scale"]["blur of 2 px"]["value"] > first["kid_scale"]["real against real"]["value"]
    again = evaluation.prepare_judge(pack, tmp_path / "again", **HASTE)
    assert again["judge_sha256"] == first["judge_sha256"]


def test_the_judge_is_trained_on_the_train_split_only(pack, blind, tmp_path, monkeypatch):
    seen = []
    true_train = retrieval.train_judge
    monkeypatch.setattr(
        retrieval, "train_judge", lambda data, **options: seen.append(data) or true_train(data, **options)
    )
    evaluation.prepare_judge(pack, tmp_path, size=SIZE, steps=1, batch=8)
    held = {r.concept for r in pack.records if r.split == "val"} - {
        r.concept for r in pack.records if r.split == "train"
    }
    assert len(seen[0].features) == sum(r.split == "train" for r in pack.records)
    assert not held & {thing.split("|")[0] for thing in seen[0].things}


def test_features_of_training_pictures_are_kept_and_read_again(pack, blind, tmp_path, monkeypatch):
    train = pack.image_set("train", SIZE)
    first = evaluation.features_of_train(train, Thumbnails(), pack, tmp_path, views=4)
    assert first.shape == (len(train), 4, FEATURES)
    assert torch.equal(first[:, 0], Thumbnails()(train.images).whole.half())
    mirrored = evaluation.to_float(train.images).flip(-1)
    want = torch.where(train.mirror[:, None], Thumbnails()(mirrored).whole, Thumbnails()(train.images).whole)
    assert torch.equal(first[:, 1], want.half())
    assert not torch.equal(first[:, 1], first[:, 2])  # the same, worn
    assert not torch.equal(first[:, 2], first[:, 3])  # each jittered view is another
    monkeypatch.setattr(Thumbnails, "__call__", lambda *_: pytest.fail("computed again"))
    again = evaluation.features_of_train(train, Thumbnails(), pack, tmp_path, views=2)
    assert torch.equal(again, first[:, :2])
    assert torch.equal(evaluation.features_of_train(train, Thumbnails(), pack, tmp_path, views=4), first)


def test_an_evaluation_computes_nothing_of_the_training_pictures_that_the_judge_was_made_of(
    pack, blind, tmp_path, monkeypatch
):
    evaluation.prepare_judge(pack, tmp_path / "judge", **HASTE | {"steps": 1}, cache=tmp_path)
    counts = []
    true_call = Thumbnails.__call__
    monkeypatch.setattr(Thumbnails, "__call__", lambda self, x: counts.append(len(x)) or true_call(self, x))
    monkeypatch.setattr(IconPack, "_draw_into", lambda *_: pytest.fail("drawn again"))
    evaluation.evaluate_system(Painter({}), pack, tmp_path / "out", judge_folder=tmp_path / "judge", cache=tmp_path)
    held = sum(r.split == "val" for r in pack.records)
    assert counts == [held] * 6  # real, reconstructed, drawn; all three again as the judge sees them


def test_the_judge_sees_worn_pictures_only(pack, blind, tmp_path, monkeypatch):
    seen, worn = [], []
    true_train, true_worn = retrieval.train_judge, evaluation.worn
    monkeypatch.setattr(retrieval, "train_judge", lambda data, **how: seen.append(data) or true_train(data, **how))
    monkeypatch.setattr(evaluation, "worn", lambda *x: worn.append(Thumbnails()(y := true_worn(*x)).whole) or y)
    judged, true_styled = [], retrieval.styled
    monkeypatch.setattr(retrieval, "styled", lambda judge, x, styles: judged.append(x) or true_styled(judge, x, styles))
    evaluation.prepare_judge(pack, tmp_path, size=SIZE, steps=1, batch=8, views=4)
    assert torch.equal(seen[0].features, torch.stack(worn[:2], 1).half())
    assert seen[0].features.shape[1] == 2
    assert len(judged) == 3
    assert all(torch.equal(x, y) for x, y in zip(judged, worn[2:], strict=True))


def test_pictures_are_worn_as_the_judge_was_made(pack, blind, tmp_path, monkeypatch):
    evaluation.prepare_judge(pack, tmp_path / "judge", **HASTE | {"steps": 1}, cache=tmp_path)
    frozen = json.loads((tmp_path / "judge" / "judge.json").read_text())
    assert frozen["wear"] == list(evaluation.WEAR)
    (tmp_path / "judge" / "judge.json").write_text(json.dumps(frozen | {"wear": [0.5, 2.0]}))
    wears, true_worn = [], evaluation.worn
    monkeypatch.setattr(evaluation, "worn", lambda x, g, wear: wears.append(wear) or true_worn(x, g, wear))
    evaluation.evaluate_system(Painter({}), pack, tmp_path / "out", judge_folder=tmp_path / "judge", cache=tmp_path)
    assert wears == [[0.5, 2.0]] * 3  # drawn, real, reconstructed


def test_an_evaluation_shows_the_judge_worn_pictures_only(pack, judge, tmp_path, monkeypatch):
    """Drawn, real and reconstructed ones alike: a judge of worn pictures takes a whole one for something else."""
    worn, judged = [], []
    true_worn, true_picked, true_styled = evaluation.worn, retrieval.picked, retrieval.styled
    monkeypatch.setattr(evaluation, "worn", lambda *x: worn.append(Thumbnails()(y := true_worn(*x)).whole) or y)
    monkeypatch.setattr(retrieval, "picked", lambda j, x, *told: judged.append(x) or true_picked(j, x, *told))
    monkeypatch.setattr(retrieval, "styled", lambda j, x, styles: judged.append(x) or true_styled(j, x, styles))
    painter = Painter({}, error=-0.1)
    evaluation.evaluate_system(painter, pack, tmp_path, judge_folder=judge, copying=False)
    assert len(judged) == 6  # drawn and real ones for words, and for style; reconstructions and the real ones for style
    assert len(worn) == 3
    assert {next(k for k, seen in enumerate(worn) if torch.equal(x, seen)) for x in judged} == {0, 1, 2}


def test_drawings_may_be_as_far_as_reconstructions_and_a_hundredth_more(pack, judge, tmp_path):
    for error in (0.0, torch.linspace(-1, 1, SIZE)):
        painter = Painter(real_pictures(pack), error)
        rows = measured(evaluation.evaluate_system(painter, pack, tmp_path, judge_folder=judge, copying=False))
        again = rows["reconstruction KID-EffLite0 (all prompts)"]["value"]
        assert again > 0.1 or not isinstance(error, torch.Tensor)
        assert rows["KID-EffLite0 of drawings"]["target"] == f"<= {max(0.0, again) + 0.01:.4g}"


def test_views_do_not_depend_on_how_many_are_asked_for(pack, blind):
    train = pack.image_set("train", SIZE)
    few, many = (evaluation.features_of_train(train, Thumbnails(), pack, None, views=n) for n in (3, 5))
    assert torch.equal(many[:, :3], few)


def test_the_judge_is_tried_on_real_pictures_saved_again(pack, blind, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "resaved", torch.zeros_like)  # nothing left to see
    report = evaluation.prepare_judge(pack, tmp_path, **HASTE)
    assert report["ceilings"]["all"]["value"] > 0.5 > 0.2 > report["resaved"]["all"]["value"]
    lines = evaluation.judge_table(report).splitlines()
    (style,) = (line for line in lines if line.startswith("| style"))
    assert [cell.split()[0] for cell in style.strip("| ").split(" | ")[1:]] == [
        f"{report[kind]['style']['value']:.4f}" for kind in ("ceilings", "resaved", "floors")
    ]


def test_wear_is_slight_differs_from_picture_to_picture_and_leaves_what_is_transparent():
    images = torch.full((64, 4, 32, 32), -1.0)
    images[:, :, 8:24, 8:24] = 0
    images[:, 3, 8:24, 8:24] = 1
    worn = evaluation.worn(images, torch.Generator().manual_seed(0))
    assert torch.allclose(worn[:, :, :2], images[:, :, :2], atol=1e-6)
    assert (worn[:, :3] <= worn[:, 3:]).all()  # premultiplied
    inside = (worn - images)[:, :3, 12:20, 12:20] * 255 / 2
    strength = inside.square().mean((1, 2, 3)).sqrt()
    assert strength.min() < 2.5 < 6 < strength.max() < 16
    coarse = torch.nn.functional.avg_pool2d((worn - images)[:, :3, 10:22, 10:22] * 255 / 2, 4).std((1, 2, 3))
    assert coarse.max() > 3  # what is fine alone would leave 8 / 4 = 2 at most
    edge = worn[:, 3, 16, 7:9].diff()[:, 0]
    assert edge.min() < 1.5 < 2 <= edge.max()  # softened, and sharp


def test_a_picture_saved_again_is_nearly_the_same(pack):
    images = pack.image_set("val", SIZE).images
    again = evaluation.resaved(images)
    assert again.shape == images.shape
    assert not torch.equal(again, images)
    assert (again.float() - images.float()).abs().mean() < 6
    assert torch.equal(evaluation.resaved(again[:0]), again[:0])


def test_blur_of_an_edge_is_the_gaussian_integral():
    edge = torch.zeros(1, 1, 9, 41)
    edge[..., 21:] = 1
    found = evaluation.blurred(edge, 2.0)[0, 0, 4, 16:26]
    x = torch.arange(16, 26) - 20.5
    assert torch.allclose(found, (1 + torch.erf(x / 2 / 2**0.5)) / 2, atol=3e-3)


def test_jittered_pictures_move_but_stay_transparent_outside():
    images = torch.full((64, 4, 32, 32), -1.0)
    images[:, :, 12:20, 12:20] = 1
    moved = evaluation.jittered(images, torch.zeros(64, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert moved[:, :, 0].max() == -1
    area = (moved[:, 3] > 0).sum((1, 2)) / 64
    assert 0.55 < area.min() < 0.8 < 1 < area.max() < 1.4
    assert len({tuple(m[3].flatten().tolist()) for m in moved}) == 64


def test_grid_lays_premultiplied_pictures_on_the_ground():
    half_red = torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
    half_red[0, 0], half_red[0, 3] = 128, 128  # red at half strength, premultiplied
    sheet = evaluation.draw_grid(half_red, columns=2, ground="white", gap=1)
    assert sheet.size == (11, 6)
    assert sheet.getpixel((2, 2)) == pytest.approx((255, 127, 127), abs=1)
    assert sheet.getpixel((8, 2)) == (255, 255, 255)


def test_rows_say_whether_a_target_is_met():
    figure = Figure(0.5, 0.4, 0.6, 10)
    assert evaluation.row("a", figure, at_least=0.5)["met"] is True
    assert evaluation.row("a", figure, at_least=0.51)["met"] is False
    assert evaluation.row("a", figure, at_most=0.5)["met"] is True
    assert evaluation.row("a", figure, at_most=0.49)["met"] is False
    assert evaluation.row("a", figure)["met"] is None
    none = torch.zeros(10, dtype=torch.bool)
    undefined = evaluation.compared("a", none, none, {"value": 0.1}, 0.9)
    assert undefined["met"] is None
    assert undefined["ratio"]["value"] is None  # JSON has no infinity


def test_settings_reach_the_drawing_and_the_report_names_them_all(pack, judge, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Painter, "sample", lambda self, cond, r, noise: asked.append(r) or torch.zeros(len(cond), 4, SIZE, SIZE)
    )
    report = evaluation.evaluate_system(
        Painter({}), pack, tmp_path, judge_folder=judge, copying=False, steps=7, guidance=2.5, sampler="heun"
    )
    assert {(r.steps, r.guidance, r.sampler) for r in asked} == {(7, 2.5, "heun")}
    wanted = {"steps": 7, "guidance": 2.5, "sampler": "heun", "schedule": Painter.defaults.schedule}
    assert report["settings"] == wanted | {"guidance_kind": "cfg", "guidance_rescale": 0.0}
    assert "steps 7, guidance 2.5, sampler heun" in evaluation.table(report)
    with pytest.raises(UnknownName, match="hein"):
        evaluation.evaluate_system(Painter({}), pack, tmp_path, judge_folder=judge, sampler="hein")


def test_reports_are_json_and_a_table_with_a_line_for_each_figure(pack, judge, tmp_path):
    report = evaluation.evaluate_system(
        Painter(real_pictures(pack)), pack, tmp_path / "out", judge_folder=judge, copying=False
    )
    evaluation.write({"model": "painter", **report}, tmp_path / "out")
    read = json.loads((tmp_path / "out" / "evaluation.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert read["figures"] == report["figures"]
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "limner evaluate painter" in text
    assert all(f"| {row['name']} | " in text for row in report["figures"])
    assert not any("copying" in row["name"] for row in report["figures"])


def test_positions_are_spread_evenly():
    assert evaluation.evenly(10, 4) == [0, 2, 5, 7]
    assert evaluation.evenly(3, None) == evaluation.evenly(3, 9) == [0, 1, 2]


def test_a_speed_run_that_fails_says_why(monkeypatch):
    with pytest.raises(FileProblem, match="no file nowhere"):
        evaluation.speed_of("nowhere.safetensors", runs=1)


@pytest.mark.slow
def test_speed_and_memory_are_of_a_whole_process(tiny_model):
    seconds, megabytes = evaluation.speed_of(str(tiny_model), runs=1)
    assert 0.3 < seconds.value < 60
    assert 100 < megabytes.value < 4000
