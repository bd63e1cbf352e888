"""Synchronised batch norm in two and three processes against the native layer and the concatenated batch."""

import copy
from dataclasses import replace

import pytest
import torch
from gang_work import NormCase, measure_layer, measure_step, normalise
from gangs import run_gang
from torch import nn

from nf_pipeline.core.models import build_model
from nf_pipeline.core.sync_batch_norm import SynchronisedBatchNorm, synchronise_batch_norms
from nf_pipeline.gang import ALONE
from nf_pipeline.samples import InputSpec

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}

MAP = (3, 5, 6)
CASES = {
    "equal sizes": NormCase(sizes=(4, 4), rest=MAP),
    "unequal sizes": NormCase(sizes=(5, 2), rest=MAP),
    "three members, one with a single sample": NormCase(sizes=(1, 4, 2), rest=(5, 4, 4)),
    "vectors": NormCase(sizes=(3, 4), rest=(6,)),
    "two vectors": NormCase(sizes=(1, 1), rest=(6,)),
    "sequences": NormCase(sizes=(3, 2), rest=(4, 7)),
    "volumes": NormCase(sizes=(2, 3), rest=(3, 2, 3, 4)),
    "channels last": NormCase(sizes=(3, 2), rest=(8, 5, 6), layout="channels_last"),
    "samples larger than a piece": NormCase(sizes=(2, 3), rest=(4, 150, 151)),
    "cumulative average": NormCase(sizes=(3, 2), rest=MAP, options={"momentum": None}),
    "momentum and eps": NormCase(sizes=(3, 2), rest=MAP, options={"momentum": 0.3, "eps": 0.1}),
    "no weights": NormCase(sizes=(3, 2), rest=MAP, options={"affine": False}),
    "no running statistics": NormCase(sizes=(3, 2), rest=MAP, options={"track_running_stats": False}),
}
NARROW_CASES = {
    "maps": NormCase(sizes=(3, 2), rest=(8, 9, 9)),
    "no weights": NormCase(sizes=(3, 2), rest=(8, 9, 9), options={"affine": False}),
    "samples larger than a piece": NormCase(sizes=(2, 3), rest=(4, 150, 151)),
}


def in_dtype(cases, dtype_name):
    return [replace(case, dtype_name=dtype_name) for case in cases.values()]


def pair_up(cases, dtype_name):
    """By name: what one process computes, and what the members do; every size of gang is started once."""
    named = dict(zip(cases, in_dtype(cases, dtype_name), strict=True))
    pairs = {}
    for size in {len(case.sizes) for case in named.values()}:
        chosen = {name: case for name, case in named.items() if len(case.sizes) == size}
        by_member = run_gang(normalise, size, list(chosen.values()))
        expected = normalise(ALONE, list(chosen.values()))
        for name, whole, *members in zip(chosen, expected, *by_member, strict=True):
            pairs[name] = (whole, members)
    return pairs


@pytest.fixture(scope="module", params=["float64", "float32"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def pairs(dtype):
    return pair_up(CASES, dtype)


@pytest.fixture(scope="module")
def narrow_pairs():
    return pair_up(NARROW_CASES, "bfloat16")


def concatenated(results, name):
    """Outputs and input gradients of all members as one batch; what all must share once."""
    values = [result[name] for result in results]
    if "output" in name or "input gradient" in name:
        return torch.cat(values)
    assert all(torch.equal(value, values[0]) for value in values), f"{name} differs between members"
    return values[0]


@pytest.mark.parametrize("case", CASES)
def test_members_compute_what_one_process_does_with_the_whole_batch(pairs, dtype, case):
    whole, members = pairs[case]
    assert {"step 1 output", "step 1 input gradient", "eval output"} <= whole.keys()
    assert all(member.keys() == whole.keys() for member in members)
    for name, want in whole.items():
        if name == "eval output" and case == "no running statistics":
            continue  # evaluation then looks at each process's own batch, as natively
        error, scale = (concatenated(members, name) - want).abs().max(), want.abs().max()
        # The second term is for gradients that are next to nothing, differences of much larger numbers.
        assert error <= TOLERANCE[dtype] * (scale + 1e-2), f"{name}: {error} off, values up to {scale}"


@pytest.mark.parametrize("case", NARROW_CASES)
def test_bfloat16_inputs_lose_no_more_than_in_the_native_layer(narrow_pairs, case):
    (exact,) = normalise(ALONE, in_dtype({case: NARROW_CASES[case]}, "float32"))
    native, members = narrow_pairs[case]
    for name, want in exact.items():
        got = concatenated(members, name)
        assert got.dtype == native[name].dtype
        error, native_error = ((value - want).float().norm() for value in (got, native[name]))
        assert error <= 4 * native_error + 1e-6, f"{name}: {error} off, the native layer {native_error}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_takes_the_memory_of_the_native_layers(precision):
    native_bytes = measure_step(ALONE, 16, precision)
    for peak_bytes in run_gang(measure_step, 2, 16, precision):
        assert peak_bytes <= 1.02 * native_bytes


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((16, 32, 32, 32), "float32"), ((16, 32, 32, 32), "bfloat16"), ((8, 32, 112, 112), "bfloat16")],
)
def test_a_layer_takes_the_memory_of_the_native_one(shape, dtype):
    native_bytes = measure_layer(ALONE, shape, dtype)
    pieces_bytes = 2 * 2**17 * (torch.float32.itemsize // getattr(torch, dtype).itemsize)
    assert max(run_gang(measure_layer, 2, shape, dtype)) <= 1.01 * native_bytes + pieces_bytes


def test_replacing_keeps_weights_buffers_and_names():
    model = build_model("resnet18", inputs=InputSpec(shape=(3, 32, 32)), num_outputs=4, seed=0)
    model.eval()
    untouched, parameters, buffers = copy.deepcopy(model), list(model.parameters()), list(model.buffers())
    synchronise_batch_norms(model)
    kinds = {type(module) for module in model.modules()}
    assert SynchronisedBatchNorm in kinds
    assert nn.BatchNorm2d not in kinds
    assert model.state_dict().keys() == untouched.state_dict().keys()
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert all(now is before for now, before in zip(model.buffers(), buffers, strict=True))
    assert not any(module.training for module in model.modules())
    untouched.load_state_dict(model.state_dict())
    x_NCHW = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x_NCHW), untouched(x_NCHW))


def test_a_layer_that_stands_in_two_places_stays_one_layer():
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, nn.Sequential(nn.ReLU(), norm))
    synchronise_batch_norms(model)
    assert isinstance(model[0], SynchronisedBatchNorm)
    assert model[1][1] is model[0]
    synchronise_batch_norms(model)
    assert model[1][1] is model[0]


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_outside_a_group_the_layer_is_the_native_one(options):
    model = nn.Sequential(nn.BatchNorm2d(3, **options))
    native = copy.deepcopy(model)
    synchronise_batch_norms(model)
    for _ in range(2):
        x_NCHW = torch.randn(4, 3, 5, 5)
        assert torch.equal(model(x_NCHW), native(x_NCHW))
    assert all(torch.equal(value, native.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.eval()(x_NCHW), native.eval()(x_NCHW))
    with pytest.raises(ValueError, match="want"):
        SynchronisedBatchNorm(3)(torch.zeros(3))
