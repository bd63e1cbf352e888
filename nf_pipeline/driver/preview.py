"""The plan of a run that has not begun: reads labels and one image, stores nothing."""

from nf_pipeline.config import RunConfig
from nf_pipeline.core.planner import make_plan
from nf_pipeline.data.survey import survey
from nf_pipeline.plans import Plan


def preview_plan(config: RunConfig) -> Plan:
    """Decides blocks and batch sizes as `train` would.

    Raises:
        DataError: the data set cannot be used.
        PlanError: the budget is too small; names the layer and the smallest budget.
    """
    surveyed = survey(config)
    return make_plan(
        config,
        image_shape=surveyed.image_shape,
        num_classes=len(surveyed.labels.class_names),
        split_rows=surveyed.split_rows,
    )
