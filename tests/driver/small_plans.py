"""Plans that nobody trains by: as many blocks as a test wants, each of one unit and one layer, in a chain."""

from nf_pipeline.plans import BlockPlan, LayerSpec, Plan, UnitProfile
from nf_pipeline.samples import InputSpec, TargetSpec


def chain_plan(num_blocks: int) -> Plan:
    """Returns a plan whose blocks each read what the one before stores."""
    return Plan(
        model="convnet",
        target=TargetSpec(size=10),
        inputs=InputSpec(shape=(1, 8, 8)),
        budget_bytes=2**26,
        layers=tuple(
            LayerSpec(layer_idx=i, name=f"features.{i}", out_shape=(8, 8, 8), params=1, flops=1)
            for i in range(num_blocks)
        ),
        units=tuple(
            UnitProfile(
                unit_idx=i,
                start=i,
                stop=i + 1,
                bytes_per_sample=1,
                constant_bytes=1,
                resident_bytes=1,
                head_params=1,
                head_flops=1,
            )
            for i in range(num_blocks)
        ),
        blocks=tuple(
            BlockPlan(
                block_idx=i,
                units=(i, i + 1),
                layers=(i, i + 1),
                batch_size=8,
                budget_bytes=2**26,
                predicted_peak_bytes=1,
                shard_bytes=0,
                reason="",
            )
            for i in range(num_blocks)
        ),
        params_full=1,
        flops_full=1,
        profile_s=0.0,
    )
