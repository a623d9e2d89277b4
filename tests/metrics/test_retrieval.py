import pytest
import torch
from torch import nn

from limner.errors import FileProblem
from limner.metrics.features import FEATURES
from limner.metrics.prompts import Prompt
from limner.metrics.retrieval import Judge, JudgeData, load, picked, save, styled, train_judge


class Plain(nn.Module):
    """A judge whose picture and text vectors are the first two numbers as they are."""

    styles = ("flat", "3d")

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def images(self, features):
        return features[:, :2]

    texts = images

    def style_logits(self, features):
        return features[:, :2]


def test_a_picture_is_right_when_its_own_text_beats_every_distractor():
    prompts = [Prompt(str(k), "val", "flat", "right", ("near", "far")) for k in range(3)]
    texts = ["right", "near", "far"]
    sentences = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]])
    features = torch.tensor([[1.0, 0.0], [0.9, 0.9], [0.0, -1.0]])  # right; nearer to "near"; "right" and "far" tie
    assert picked(Plain(), features, prompts, texts, sentences).tolist() == [True, False, False]


def test_a_short_list_of_distractors_is_not_filled_up_with_anything():
    prompts = [Prompt("0", "val", "flat", "left", ("up",)), Prompt("1", "val", "flat", "left", ("up", "right", "down"))]
    texts = ["down", "left", "right", "up"]  # "down" is in place 0 and best, but only the second prompt has it
    sentences = torch.tensor([[-2.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert picked(Plain(), torch.tensor([[-1.0, 0.0]] * 2), prompts, texts, sentences).tolist() == [True, False]


def test_a_feature_that_training_never_saw_does_not_drown_the_others():
    judge = Judge(("flat", "3d"), width=8, hidden=16).eval()
    judge.std[0] = 1e-3
    assert judge.standardise(torch.ones(1, FEATURES))[0, :2].tolist() == [8, 1]


def test_the_judge_that_ships_is_under_8_mb(tmp_path):
    save(Judge([str(k) for k in range(23)]), tmp_path / "judge.safetensors")
    assert (tmp_path / "judge.safetensors").stat().st_size < 8_000_000


def test_styles_are_compared_by_name_and_an_unknown_one_is_wrong():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert styled(Plain(), features, ["flat", "3d", "3d", "clay"]).tolist() == [True, True, False, False]


def toy(n=96, kinds=24):
    """Pictures and captions of `kinds` things in two styles, each a random direction of its own."""
    g = torch.Generator().manual_seed(0)
    seen, said = torch.randn(kinds, FEATURES, generator=g), torch.randn(kinds, 384, generator=g)
    styles = torch.randn(2, FEATURES, generator=g)
    things, looks = torch.arange(n) % kinds, torch.arange(n) // kinds % 2
    features = seen[things] + 0.3 * styles[looks] + 0.3 * torch.randn(n, FEATURES, generator=g)
    sentences = nn.functional.normalize(said, dim=1)
    return JudgeData(
        features[:, None], things[:, None], sentences, [str(int(t)) for t in things], [("flat", "3d")[k] for k in looks]
    )


def test_a_trained_judge_tells_things_and_styles_and_training_repeats():
    data = toy()
    judge = train_judge(data, steps=24, batch=48)
    scores = judge.images(data.features[:, 0]) @ judge.texts(data.sentences).T
    assert (scores.argmax(1) == data.captions[:, 0]).float().mean() > 0.95
    assert styled(judge, data.features[:, 0], data.styles).float().mean() > 0.95
    again = train_judge(data, steps=24, batch=48)
    assert all(torch.equal(a, b) for a, b in zip(judge.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_batch_of_a_single_style_teaches_no_style():
    """Step 0 is mixed and step 1 of one style: the style head stays as step 0 left it, the other two go on."""
    one, two = (train_judge(toy(), steps=steps, batch=16) for steps in (1, 2))
    assert torch.equal(one.style[1].weight, two.style[1].weight)
    assert not torch.equal(one.image[1].weight, two.image[1].weight)


def test_pictures_of_one_thing_are_not_each_others_negatives():
    """Every picture shows the one same thing: no negatives are left, so the loss is exactly zero from the start."""
    data = toy(n=300)
    data = JudgeData(data.features, data.captions, data.sentences, ["the same"] * 300, data.styles)
    losses = []
    train_judge(data, steps=100, batch=8, report=lambda step, clip: losses.append(clip))
    assert losses == [0.0]


def test_a_saved_judge_is_the_same_in_half_precision(tmp_path):
    judge = Judge(("flat", "3d", "pixel"), width=8, hidden=16).eval()
    save(judge, tmp_path / "judge.safetensors")
    found = load(tmp_path / "judge.safetensors")
    assert found.styles == judge.styles
    features = torch.randn(5, FEATURES)
    assert torch.allclose(found.images(features), judge.images(features), atol=3e-3)
    assert (tmp_path / "judge.safetensors").stat().st_size < 200_000


def test_what_is_not_a_judge_is_refused(tmp_path):
    path = tmp_path / "judge.safetensors"
    with pytest.raises(FileProblem, match="no judge at"):
        load(path)
    path.write_bytes(b"not tensors")
    with pytest.raises(FileProblem, match="is not a judge"):
        load(path)
