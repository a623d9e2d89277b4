"""Numbers and names of classes in place of words."""

from __future__ import annotations

import pytest

from limner.errors import UnknownName, UsageError
from limner.text.labels import Labels, LabelsConfig, imagenet
from limner.text.prompts import parse


def test_numbers_and_names_are_classes_and_nothing_is_none():
    labels = Labels(LabelsConfig())
    asked = ["207", "golden retriever", " Golden Retriever ", "tinca tinca", "tench, Tinca tinca", "000", ""]
    assert labels.classes(asked) == [207, 207, 207, 0, 0, 0, 1000]
    assert labels.classes(["cardigan", "Cardigan"]) == [474, 264]  # a jacket and a dog
    assert labels.encode(asked).labels.tolist() == [207, 207, 207, 0, 0, 0, 1000]
    (part,) = parse("otter", "plain").parts
    told = labels.read([(part.at(0), parse("", "plain").parts[0].at(0))], "plain", None)
    assert told.labels.tolist() == [360, 1000]
    assert {name for name, value in told.tensors().items() if value is not None} == {"labels"}


def test_the_classes_are_those_of_imagenet_in_its_order():
    names = imagenet()
    assert len(names) == 1000
    spots = {0: "tench", 88: "macaw", 279: "Arctic fox", 387: "lesser panda", 417: "balloon", 974: "geyser"}
    assert {number: names[number].split(",")[0] for number in spots} == spots  # as their programs draw them


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1000", "no class 1000: this model has 0 to 999"),
        ("9" * 100, "no class 9999999999999999999999999999999999999999: "),
        ("crane", "'crane' is the name of classes 134 and 517: give the number of one"),
        ("golden retreiver", "no class 'golden retreiver'. Did you mean 'golden retriever'? A number will do too"),
        ("-1", "no class '-1'"),
        ("²", "no class '²'"),
    ],
)
def test_what_is_no_class_is_refused_with_what_is_near(text, says):
    with pytest.raises(UsageError) as error:
        Labels(LabelsConfig()).classes([text])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_has_names_of_its_own_or_none():
    few = Labels(LabelsConfig(num_classes=3, names=("cat", "", "dog, hound")))
    assert few.classes(["hound", "2", "cat", ""]) == [2, 2, 0, 3]
    with pytest.raises(UnknownName, match="no class 'otter'"):
        few.classes(["otter"])
    with pytest.raises(UsageError, match="have no names here, give a number, 0 to 2"):
        Labels(LabelsConfig(num_classes=3)).classes(["cat"])
    with pytest.raises(UsageError, match="2 names are not those of num_classes=3"):
        LabelsConfig(num_classes=3, names=("cat", "dog"))
