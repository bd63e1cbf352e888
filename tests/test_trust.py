import pytest

from nf_pipeline.errors import ConfigError
from nf_pipeline.trust import confirm_factory


@pytest.mark.parametrize(
    ("recorded", "named"),
    [
        *((None, None), ("vgg11_bn", None), ("vgg11_bn", "other"), ("my.nets:small", "my.nets:small")),
        *(("torchvision:resnet50", None), ("timm:resnet10t", None)),
    ],
)
def test_names_of_lists_and_confirmed_factories_are_accepted(recorded: str | None, named: str | None) -> None:
    assert confirm_factory(recorded, named) is None


@pytest.mark.parametrize("recorded", ["torchvision.models:resnet50", "timm.models:create_model", "timm_x:y", ":x"])
def test_only_a_librarys_own_name_stands_for_its_list(recorded: str) -> None:
    with pytest.raises(ConfigError, match="which is code"):
        confirm_factory(recorded, None)


@pytest.mark.parametrize("named", [None, "my.nets:other", "vgg11_bn"])
def test_factory_that_the_user_did_not_name_is_refused_with_the_way_to_name_it(named: str | None) -> None:
    with pytest.raises(ConfigError, match=r"my\.nets:small") as caught:
        confirm_factory("my.nets:small", named)
    assert "--model my.nets:small" in caught.value.fix
