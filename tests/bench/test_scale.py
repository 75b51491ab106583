"""Scale: the table of measurements."""

from __future__ import annotations

from graphprune.bench.scale import DECODERS, Measurement, to_markdown


def test_a_row_says_what_a_layer_costs() -> None:
    row = Measurement(
        model="llama",
        layers=8,
        params=2_795_573_248,
        groups=27,
        capture_s=6.04,
        analyze_s=0.52,
        processor_s=6.4,
        memory_gib=0.866,
    )
    text = to_markdown([row], command="tools/bench_scale --layers 8", machine="a machine, 2 cores")
    assert "| llama | 8 | 2.80 | 27 | 6.0 | 0.5 | 6.4 | 0.80 | 0.87 |" in text
    assert "    tools/bench_scale --layers 8" in text


def test_decoders_share_keys_among_queries() -> None:
    for _, options in DECODERS.values():
        assert options["num_attention_heads"] == 4 * options["num_key_value_heads"]
