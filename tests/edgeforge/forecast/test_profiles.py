"""The profiles that ship: every figure has a source that is in the file, and none is unread."""

import json
import math
import re

import pytest

from edgeforge.errors import UsageError
from edgeforge.families.registry import read_spec
from edgeforge.forecast.limits import parse_version
from edgeforge.forecast.profiles import FILE, load_profiles, read_profiles
from edgeforge.synth.synthesise import PRESETS

PROFILES = load_profiles()
KINDS = {"maker", "measured", "specifications", "before the launch", "computed"}
# Shapes that no preset has, as released: layers, hidden, ffn, rows of keys, vocabulary.
SHAPES = {
    "Llama-2-7B": (32, 4096, 11008, 4096, 32000),
    "Phi-4-mini": (32, 3072, 8192, 1024, 200064),
}
BITS = {
    "layers at 4.5 bits a weight, head at 8": (4.5, 8),
    "layers and head at 16 bits a weight": (16, 16),
    "layers and head at 4.125 bits a weight": (4.125, 4.125),
    "layers and head at 4.5 bits a weight": (4.5, 4.5),
}


def data():
    return json.loads(FILE.read_text("utf-8"))


def read(changed):
    return read_profiles(json.dumps(changed).encode())


def test_there_are_a_dozen_phones_of_both_systems():
    assert len(PROFILES.phones) >= 12
    assert {phone.os for phone in PROFILES.phones.values()} == {"ios", "android"}


def test_every_source_says_who_and_where_and_is_cited():
    cited = {
        key
        for phone in PROFILES.phones.values()
        for figure in (*phone.figures().values(), *phone.limits)
        for key in figure.sources
    } | {key for each in PROFILES.published for key in each.sources}
    for key, source in PROFILES.sources.items():
        assert source.kind in KINDS and source.title
        assert (source.url is None) == (source.kind == "computed")
        assert source.url is None or re.fullmatch(r"https?://\S+", source.url)
        # The one that speaks of all phones with Android is cited by the limits themselves.
        assert key in cited or key == "android-17"


def test_a_computed_figure_stands_beside_what_it_is_computed_from():
    for phone in PROFILES.phones.values():
        for figure in phone.figures().values():
            if "computed" in figure.sources:
                assert len(figure.sources) > 1 or figure.note


@pytest.mark.parametrize("name", PROFILES.phones)
def test_figures_are_plausible(name):
    phone = PROFILES.phones[name]
    assert 2 <= phone.memory.number <= 24
    assert phone.bandwidth is None or 20 <= phone.bandwidth.number <= 200
    assert phone.npu is None or 5 <= phone.npu.number <= 200
    for limit in phone.limits:
        assert 0 < limit.nbytes < phone.memory.number * 1e9
        assert limit.until is None or parse_version(limit.since) <= parse_version(limit.until)


def test_with_the_entitlement_an_app_never_gets_less():
    for phone in PROFILES.phones.values():
        for entitled in (limit for limit in phone.limits if limit.entitlement):
            plain = [
                limit.nbytes
                for limit in phone.limits
                if not limit.entitlement and limit.since == entitled.since
            ]
            assert all(nbytes <= entitled.nbytes for nbytes in plain)


@pytest.mark.parametrize("number", range(len(PROFILES.published)))
def test_the_bytes_that_a_measurement_reads_follow_from_the_models_shape(number):
    each = PROFILES.published[number]
    if each.read_from == "the size of the file":
        return
    preset = each.model.lower()
    if preset in PRESETS:
        spec = read_spec(PRESETS[preset].config_json("bfloat16"))
        weights = spec.weights.values()
        layers = sum(math.prod(w.shape) for w in weights if w.role == "linear")
        head = spec.vocab_size * spec.hidden_size
    else:
        count, hidden, ffn, kv, vocabulary = SHAPES[each.model]
        layers = count * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn)
        head = vocabulary * hidden
    in_layers, in_head = BITS[each.read_from]
    assert each.read_bytes == (layers * in_layers + head * in_head) // 8


def test_no_measurement_exceeds_its_bound():
    for each in PROFILES.published:
        bandwidth = PROFILES.phones[each.phone].bandwidth
        assert bandwidth is not None, "without a bound a measurement is not comparable"
        assert 0.2 < each.decode * each.read_bytes / (bandwidth.number * 1e9) < 1


def test_a_source_that_is_not_in_the_file_is_refused():
    changed = data()
    changed["phones"]["iphone-13"]["soc"]["sources"] = ["hearsay"]
    with pytest.raises(ValueError, match=r"iphone-13: a figure names \['hearsay'\]"):
        read(changed)
    changed["phones"]["iphone-13"]["soc"]["sources"] = []
    with pytest.raises(ValueError, match="iphone-13: a figure names no source"):
        read(changed)


def test_what_no_one_reads_is_refused():
    changed = data()
    changed["phones"]["iphone-13"]["isa"] = {"value": "armv8.6-a", "sources": ["kuo-14"]}
    with pytest.raises(ValueError, match=r"fields that no one reads: \['isa'\]"):
        read(changed)
    changed = data()
    changed["published"][0]["phone"] = "iphone-99"
    with pytest.raises(ValueError, match="have no profile"):
        read(changed)
    with pytest.raises(ValueError, match="schema version 2"):
        read({**data(), "schema_version": 2})


def test_an_unknown_phone_is_refused_with_the_nearest():
    with pytest.raises(UsageError) as caught:
        PROFILES.phone("iphone-15pr")
    assert "(did you mean 'iphone-15-pro'?); known: iphone-13," in str(caught.value)
