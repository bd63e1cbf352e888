"""Whatever a model factory does, planning ends with a plan or with an error that names the factory."""

import inspect
from pathlib import Path

import odd_models
import pytest
from cases import documented, fuzz, tried
from hypothesis import strategies as st
from junk import odd_texts

from nf_pipeline.config import resolve_config, validate_config
from nf_pipeline.core.models import build_model
from nf_pipeline.core.planner import make_plan
from nf_pipeline.driver.run import train
from nf_pipeline.errors import ConfigError, NFError, PlanError
from nf_pipeline.plans import Plan
from nf_pipeline.samples import InputSpec, TargetSpec

SHAPE = (1, 8, 8)
ROWS = {"train": 100, "val": 20}
FINE = {
    *("small", "lambda_model", "cached_model", "one_by_one", "prints", "lazy", "changes_its_mind"),
    *("double", "half", "frozen", "holds_a_lock", "fails_late"),
}
NAMES = sorted(
    name
    for name, value in vars(odd_models).items()
    if not name.startswith("_") and not inspect.ismodule(value) and not inspect.isclass(value) and name != "Any"
)


def planned(name: str, budget: int | str = 2**30) -> Plan | NFError:
    config = validate_config({"memory": {"budget_bytes": budget}, "model": {"name": name}})
    return documented(
        lambda: make_plan(config, inputs=InputSpec(shape=SHAPE), target=TargetSpec(size=10), split_rows=ROWS)
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "many_large"])
def test_factory_that_is_odd_gives_a_plan_or_an_error_with_a_fix(name: str) -> None:
    tried("models: odd factories")
    outcome = planned(f"odd_models:{name}")
    if name not in FINE:
        assert isinstance(outcome, ConfigError), name
        assert outcome.fix and "Error: \n" not in str(outcome)


MODULES = (
    "os",
    "sys",
    "builtins",
    "..",
    ".",
    "",
    "torch.nn",
    "odd_models",
    "nf_pipeline",
    "a.b",
    "\0",
    "os.path",
    "-",
    "json",
)
ATTRIBUTES = (
    "x",
    "",
    "system",
    "abort",
    "_exit",
    "exit",
    "fork",
    "open",
    "list",
    "object",
    "a:b",
    "small.x",
    "Module",
    "path",
    "é",
)


@fuzz(
    "models: names",
    quick=200,
    thorough=1_000,
    module=st.one_of(st.sampled_from(MODULES), odd_texts),
    attribute=st.one_of(st.sampled_from(ATTRIBUTES), odd_texts),
)
def test_fuzz_factory_name_of_any_text_is_refused(module: str, attribute: str) -> None:
    outcome = documented(
        lambda: build_model(f"{module}:{attribute}", inputs=InputSpec(shape=SHAPE), num_outputs=10, seed=0)
    )
    assert isinstance(outcome, ConfigError)


budgets = st.one_of(
    st.integers(1, 2**63 - 1), st.sampled_from([1, 2, 1023, 2**20, 2**31, 2**53 + 1, 2**62, 2**63 - 1])
)


@fuzz("plan: budgets", quick=12, thorough=100, budget=budgets)
def test_fuzz_plan_for_any_budget_is_made_or_names_the_smallest(budget: int) -> None:
    outcome = planned("odd_models:small", budget)
    assert isinstance(outcome, Plan | PlanError)
    if isinstance(outcome, PlanError):
        assert outcome.smallest_budget_bytes > budget
        assert isinstance(planned("odd_models:small", outcome.smallest_budget_bytes), Plan)


@pytest.mark.parametrize(
    "name", ["os:abort", "os:fork", "os:_exit", "os:system", "builtins:input", "sys:exit", "signal:pause"]
)
def test_factory_that_is_a_built_in_function_is_never_called(name: str) -> None:
    with pytest.raises(ConfigError, match="built-in function"):
        build_model(name, inputs=InputSpec(shape=SHAPE), num_outputs=10, seed=0)


def test_factory_that_raises_is_an_error_with_type_text_and_place() -> None:
    with pytest.raises(ConfigError, match=r"ValueError: no such \(.*odd_models\.py:\d+\)$"):
        try:
            build_model("odd_models:raises_value_error", inputs=InputSpec(shape=SHAPE), num_outputs=10, seed=0)
        except ConfigError as error:
            raise ConfigError(error.what) from None


@pytest.mark.parametrize("name", ["exits", "exits_with_a_text", "forward_exits", "layers_exit", "exits_in_training"])
def test_factory_that_leaves_the_program_is_an_error_not_the_end(name: str) -> None:
    outcome = planned(f"odd_models:{name}")
    assert isinstance(outcome, ConfigError) and "SystemExit" in str(outcome)


@pytest.mark.parametrize("name", ["huge_linear", "huge_zeros", "many_large"])
def test_factory_with_more_weights_than_memory_is_refused_before_they_are_allocated(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nf_pipeline.core.user_code.memory_bytes", lambda: 2**28)
    before = peak_kib()
    outcome = planned(f"odd_models:{name}")
    assert isinstance(outcome, ConfigError) and "this machine has" in str(outcome)
    assert peak_kib() - before < 2**19  # half a GiB; the smallest of them asks for 16 GiB in pieces of 16 MiB


def peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def test_images_too_large_for_one_forward_pass_are_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nf_pipeline.core.user_code.memory_bytes", lambda: 2**29)
    config = validate_config({"memory": {"budget_bytes": 2**40}, "model": {"name": "vgg11_bn"}})
    with pytest.raises(ConfigError, match=r"its activations take .* this machine has"):
        make_plan(config, inputs=InputSpec(shape=(3, 2**10, 2**10)), target=TargetSpec(size=10), split_rows=ROWS)


def test_model_that_fails_only_while_it_is_trained_is_named_with_epoch_and_step(tmp_path: Path) -> None:
    flags = {"model.name": "odd_models:fails_late", "memory.budget_bytes": "8MiB", "cluster.executor": "inline"}
    # Planned without real steps, which would fail before.
    few = {"storage.uri": str(tmp_path), "data.max_train_images": 100, "train.unit_layers": 2}
    outcome = documented(lambda: train(resolve_config(flags={**flags, **few})))
    assert isinstance(outcome, ConfigError)
    assert "training fails in epoch 1, step 1: ValueError: no luck today" in str(outcome)
