"""Reads a profile as strictly as pprof does and says what is in it: profile.py PROFILE (needs protoc and python3-protobuf)."""

import gzip
import json
import pathlib
import subprocess
import sys
import tempfile

here = pathlib.Path(__file__).parent
data = pathlib.Path(sys.argv[1]).read_bytes()
if data[:2] == b"\x1f\x8b":
    data = gzip.decompress(data)
with tempfile.TemporaryDirectory() as out:
    subprocess.run(
        ["protoc", f"--proto_path={here}", f"--python_out={out}", "profile.proto"], check=True
    )
    sys.path.insert(0, out)
    sys.dont_write_bytecode = True
    import profile_pb2

    profile = profile_pb2.Profile()
    profile.ParseFromString(data)

texts = profile.string_table
assert texts[0] == "", "the first text is empty"
assert len(set(texts)) == len(texts), "every text once"


def unknown(message):
    """Fields that the format does not have."""
    assert not list(message.UnknownFields()), message


functions = {function.id: function for function in profile.function}
locations = {location.id: location for location in profile.location}
mappings = {mapping.id: mapping for mapping in profile.mapping}
for table, items in ((functions, profile.function), (locations, profile.location), (mappings, profile.mapping)):
    assert len(table) == len(items) and 0 not in table, "ids are unique and not zero"
for location in profile.location:
    unknown(location)
    assert location.mapping_id == 0 or location.mapping_id in mappings
    for line in location.line:
        assert line.function_id in functions
for function in profile.function:
    unknown(function)
    texts[function.name], texts[function.system_name], texts[function.filename]
totals = [0] * len(profile.sample_type)
for sample in profile.sample:
    unknown(sample)
    assert len(sample.value) == len(profile.sample_type)
    assert sample.location_id, "a stack has an innermost frame"
    for location in sample.location_id:
        assert location in locations
    for label in sample.label:
        texts[label.key], texts[label.str]
    totals = [total + value for total, value in zip(totals, sample.value)]
print(
    json.dumps(
        {
            "types": [[texts[kind.type], texts[kind.unit]] for kind in profile.sample_type],
            "totals": totals,
            "samples": len(profile.sample),
            "functions": sorted({texts[function.name] for function in profile.function}),
            "duration": profile.duration_nanos,
            "period": profile.period,
            "threads": sorted({texts[label.str] for sample in profile.sample for label in sample.label}),
        }
    )
)
