"""What is said to a name that is not known."""

from nf_pipeline.near_names import did_you_mean, near_names

KNOWN = ("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn", "convnet")


def test_near_names_are_at_most_three_and_the_most_alike_comes_first() -> None:
    assert near_names("vgg13", KNOWN)[0] == "vgg13_bn"
    assert len(near_names("vgg1_bn", KNOWN)) == 3
    assert near_names("transformer", KNOWN) == []


def test_fix_names_what_is_near_with_its_prefix() -> None:
    assert did_you_mean("convnt", KNOWN) == "did you mean convnet?"
    assert did_you_mean("convnt", iter(KNOWN), prefix="timm:") == "did you mean timm:convnet?"


def test_fix_lists_all_names_or_says_something_else_where_none_is_near() -> None:
    assert did_you_mean("zzz", iter(KNOWN[:2])) == "one of vgg11_bn, vgg13_bn"
    assert did_you_mean("zzz", KNOWN, otherwise="look at the list") == "look at the list"
