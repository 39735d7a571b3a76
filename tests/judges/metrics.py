"""Reads metrics with Prometheus' own parsers: metrics.py prometheus|openmetrics < PAGE (needs python3-prometheus-client)."""

import json
import sys

import prometheus_client.openmetrics.parser
import prometheus_client.parser

parse = {
    "prometheus": prometheus_client.parser.text_string_to_metric_families,
    "openmetrics": prometheus_client.openmetrics.parser.text_string_to_metric_families,
}[sys.argv[1]]
families = list(parse(sys.stdin.read()))
for family in families:
    assert family.documentation, f"{family.name} has no help"
    assert family.samples, f"{family.name} has no sample"
print(json.dumps({family.name: [family.type, len(family.samples)] for family in families}))
