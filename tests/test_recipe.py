import json

import pytest

from fasttrain.checkpoint.fingerprint import differences, recipe_flags
from fasttrain.errors import UserError
from fasttrain.recipe import PRESETS, Recipe, flag, load_recipe


def test_the_assignment_is_faithful() -> None:
    recipe = PRESETS["assignment"]
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer, recipe.max_lr) == (24, 512, "adam", "auto")
    assert recipe.pct_start * recipe.epochs == 5
    assert recipe.final_div_factor == 1  # no annihilation
    assert recipe.label_smoothing == 0 and recipe.weight_decay == 0 and recipe.cycle_momentum
    assert (recipe.init, recipe.flip_order, recipe.bn_momentum) == ("default", "random", 0.1)
    assert recipe.logit_scale == recipe.bn_bias_lr_scale == 1 and recipe.ema_epochs == 0
    assert recipe.test_views == "none" and recipe.early_scale == 1


def test_only_where_speed_counts_most_are_network_and_optimizer_others_than_the_assignments() -> None:
    others = {name for name, recipe in PRESETS.items() if recipe.optimizer not in ("adam", "adamw")}
    assert others == {"speedrun", "laptop"}
    assert others == {name for name, recipe in PRESETS.items() if recipe.network != "resnet"}


def test_early_images_are_smaller_at_any_resolution() -> None:
    sizes = {}
    for resolution in (16, 24, 32, 64, 224):
        recipe = Recipe(resolution=resolution, early_scale=0.75, early_share=0.5)
        sizes[resolution] = [recipe.training_resolution(step, 4) for step in range(4)]
    assert sizes[32] == [24, 24, 32, 32] and sizes[224] == [168, 168, 224, 224]
    assert [early[0] for early in sizes.values()] == [12, 16, 24, 48, 168]  # 18 rounds to 16
    assert Recipe(resolution=16, early_scale=0.25).training_resolution(0, 4) == 12
    assert {Recipe(resolution=24).training_resolution(step, 4) for step in range(4)} == {24}


def test_a_schedule_has_the_phases_that_its_shares_make() -> None:
    recipe = Recipe(early_scale=0.75, early_share=0.5, first_layer_share=0.25)
    assert recipe.phases_from(0, 8) == [(24, True), (24, False), (32, False)]
    assert recipe.phases_from(3, 8) == [(24, False), (32, False)] and recipe.phases_from(8, 8) == []
    assert [recipe.phase(step, 8) for step in (1, 2, 4)] == [(24, True), (24, False), (32, False)]
    assert Recipe().phases_from(0, 8) == [(32, True)]


@pytest.mark.parametrize(("pixels", "scale"), [(0, 1.0), (24, 0.75), (16, 0.5)])
def test_a_file_that_gives_early_images_in_pixels_keeps_its_meaning(pixels: int, scale: float) -> None:
    values = Recipe().to_dict()
    del values["early_scale"]
    recipe = Recipe.from_dict(values | {"early_resolution": pixels})
    assert recipe.early_scale == scale and recipe.training_resolution(0, 10) == (pixels or 32)


def test_a_checkpoint_from_before_the_renaming_belongs_to_its_run() -> None:
    recipe = Recipe(early_scale=0.75, test_views="mirror")
    then = recipe_flags(recipe)
    del then["--early-scale"], then["--test-views"]
    then |= {"--early-resolution": 24, "--test-flip": True}
    assert differences(recipe_flags(recipe), then) == []
    [found] = differences(recipe_flags(recipe), then | {"--early-resolution": 16})
    assert found == "--early-scale is 0.75 and was 0.5"
    with pytest.raises(UserError, match="unknown recipe key 'early_resolution'"):
        Recipe.from_dict({"early_resolution": 24, "resolution": "wide"})


@pytest.mark.parametrize(("test_flip", "test_views"), [(True, "mirror"), (False, "none")])
def test_a_file_from_before_there_were_views_keeps_its_meaning(test_flip: bool, test_views: str) -> None:
    values = Recipe().to_dict()
    del values["test_views"]
    assert Recipe.from_dict(values | {"test_flip": test_flip}).test_views == test_views
    with pytest.raises(UserError, match="unknown recipe key 'test_flip'"):
        Recipe.from_dict(values | {"test_flip": "often"})


def test_a_field_that_a_file_lacks_is_off() -> None:
    """Files of finished runs must not change their meaning when a field is added."""
    values = Recipe().to_dict()
    for name in (
        "activation",
        "init",
        "flip_order",
        "bn_momentum",
        "logit_scale",
        "bn_bias_lr_scale",
        "ema_epochs",
        "early_scale",
        "network",
        "test_views",
    ):
        del values[name]
        assert getattr(Recipe.from_dict(values), name) == getattr(PRESETS["assignment"], name)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epochs": 0}, "--epochs 0"),
        ({"epochs": "3"}, "--epochs"),
        ({"epochs": True}, "--epochs"),
        ({"batch_size": 1}, "--batch-size 1"),
        ({"max_lr": float("nan")}, "--max-lr nan"),
        ({"max_lr": "fast"}, "float or auto"),
        ({"max_lr": -1.0}, "--max-lr -1.0"),
        ({"weight_decay": float("inf")}, "--weight-decay inf"),
        ({"pct_start": 1.0}, "--pct-start 1.0"),
        ({"optimizer": "sgd"}, "adam or adamw or muon"),
        ({"muon_lr_scale": 0.0}, "--muon-lr-scale 0.0"),
        ({"flip": 1}, "--flip"),
        ({"flip_order": "sometimes"}, "random or alternating"),
        ({"init": "zeros"}, "default or dirac"),
        ({"bn_momentum": 0.0}, "--bn-momentum 0.0"),
        ({"bn_bias_lr_scale": 0.0}, "--bn-bias-lr-scale 0.0"),
        ({"logit_scale": -1.0}, "--logit-scale -1.0"),
        ({"ema_epochs": float("inf")}, "--ema-epochs inf"),
        ({"cutout": 33}, "--cutout 33"),
        ({"cutout": 65, "resolution": 64}, "--cutout 65: expected from 0 to 64 pixels"),
        ({"crop_padding": 9, "resolution": 16}, "--crop-padding 9: expected from 0 to 8 pixels"),
        ({"resolution": 8}, "--resolution 8"),
        ({"resolution": 36}, "--resolution 36: expected a multiple of 8 from 16 to 256"),
        ({"resolution": 264}, "--resolution 264"),
        ({"early_scale": 0.0}, "--early-scale 0.0: expected from 0.25 to 1"),
        ({"early_scale": 1.5}, "--early-scale 1.5"),
        ({"early_share": 1.0}, "--early-share 1.0"),
        ({"first_layer_share": 0.0}, "--first-layer-share 0.0"),
        ({"seed": -1}, "--seed -1"),
        ({"learning_rate": 0.1}, "unknown recipe key 'learning_rate'"),
    ],
)
def test_a_bad_value_is_refused_by_name(values: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        Recipe.from_dict(values)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_survives_its_json_file(tmp_path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(PRESETS["laptop"].to_dict()))
    assert load_recipe(str(path)) == PRESETS["laptop"]


@pytest.mark.parametrize(
    "field", [key for key, value in Recipe().to_dict().items() if type(value) in (int, float)]
)
def test_no_number_is_too_large_for_a_float(field: str, tmp_path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({field: 10**400}))
    with pytest.raises(UserError, match=rf"{flag(field)} 1000.*: expected ") as error:
        load_recipe(str(path))
    assert len(str(error.value)) < 250 + len(str(path))


@pytest.mark.parametrize("content", ["", "[]", '{"epochs": 0}', '{"epoks": 3}', "{"])
def test_a_bad_recipe_file_is_refused_with_its_name(tmp_path, content: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"mine\.json"):
        load_recipe(str(path))


@pytest.mark.parametrize("name", ["fastest", "missing.json", ""])
def test_an_unknown_recipe_is_refused_with_the_names_that_exist(name: str) -> None:
    with pytest.raises(UserError, match="auto, default, assignment, fast, speedrun, laptop"):
        load_recipe(name)
