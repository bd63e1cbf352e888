"""infra/grafana and infra/prometheus.yml: the dashboard asks for exactly the metrics that runs export."""

import json
import re

import yaml
from compose_file import ROOT, read_services

from nf_pipeline.executors.ray_metrics import COUNTERS, EXPORTED_PREFIX, GAUGES, TAGS

DASHBOARD = json.loads((ROOT / "infra" / "grafana" / "nf_pipeline.json").read_text(encoding="utf8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
EXPORTED = {EXPORTED_PREFIX + name for name in (*GAUGES, *COUNTERS)}


def test_dashboard_shows_every_metric_and_no_other():
    assert {name for query in QUERIES for name in re.findall(r"ray_\w+", query)} == EXPORTED
    assert re.findall(r"ray_\w+", VARIABLES["run"]["query"]["query"]) == ["ray_nf_pipeline_epoch"]


def test_queries_use_the_tags_of_the_metrics():
    for query in QUERIES:
        assert re.search(r'\{run=~"\$run"\}', query)
        assert re.findall(r"by \(([^)]*)\)", query) == [", ".join(TAGS)]
        assert query.count("(") == query.count(")")


def test_panels_have_titles_places_and_the_data_source_that_is_chosen():
    assert len({panel["title"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]}) == len(QUERIES)
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {"${datasource}"}
    assert VARIABLES["datasource"]["type"] == "datasource"


def test_prometheus_scrapes_the_services_of_compose_at_their_metrics_port():
    jobs = yaml.safe_load((ROOT / "infra" / "prometheus.yml").read_text(encoding="utf8"))["scrape_configs"]
    (discovery,) = next(job for job in jobs if job["job_name"] == "ray-compose")["dns_sd_configs"]
    services = read_services({"NF_S3_KEY": "k", "NF_S3_SECRET": "s", "NF_RAY_TOKEN": "t"})
    exporting = {
        name
        for name, service in services.items()
        if f"--metrics-export-port={discovery['port']}" in " ".join(service.get("command", []))
    }
    assert set(discovery["names"]) == exporting == {"ray-head", "worker", "gpu-worker", "train"}
