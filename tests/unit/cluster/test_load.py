"""A configuration file: what is taken, and every way to get it wrong."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from baton.protocol.config import ClusterConfig, Replicas
from cluster.load import load_config, parse_config
from cluster.problems import ConfigErrors
from cluster.ray_launcher import bundle

EXAMPLES = Path(__file__).parents[3] / "deploy" / "examples"

GOOD = """\
version: 1
model: {path: baton-tiny}
pools:
  - name: p
    role: prefill
  - name: d
    role: decode
"""


def parse(text: str) -> ClusterConfig:
    return parse_config(text, file="c.yaml", folder=Path("/nowhere"))


def problems(text: str) -> list[tuple[int, str, str]]:
    with pytest.raises(ConfigErrors) as caught:
        parse(text)
    assert all(problem.file == "c.yaml" for problem in caught.value.problems)
    return [(p.line, p.path, p.message) for p in caught.value.problems]


def only(text: str) -> tuple[int, str, str]:
    found = problems(text)
    assert len(found) == 1, found
    return found[0]


def test_good_file_gives_the_structs_with_their_defaults() -> None:
    config = parse(GOOD + "router: {slo: {ttft_ms: 250}}\n")
    assert [pool.role for pool in config.pools] == ["prefill", "decode"]
    assert config.router.slo.ttft_ms == 250
    assert config.router.grpc_port == 50_051
    assert config.kv_transfer.quality_floor == "lossless"


def test_a_lossy_codec_wants_a_floor_that_allows_it() -> None:
    transfer = "kv_transfer: {codec: int8}\n"
    line, path, message = only(GOOD + transfer)
    assert (line, path) == (8, "kv_transfer.codec")
    assert message.startswith("is int8, which changes KV, and quality_floor is lossless")
    config = parse(GOOD + "kv_transfer: {codec: int8, quality_floor: high}\n").kv_transfer
    assert (config.codec, config.quality_floor) == ("int8", "high")
    assert parse(GOOD + "kv_transfer: {codec: entropy}\n").kv_transfer.codec == "entropy"


@pytest.mark.parametrize("name", ["local.yaml", "colocated.yaml"])
def test_examples_are_valid(name: str) -> None:
    config = load_config(EXAMPLES / name)
    assert config.model.path == "baton-tiny"


def test_replicas_take_a_number_or_a_range() -> None:
    text = GOOD.replace("role: prefill", "role: prefill\n    replicas: {min: 1, max: 3}")
    assert parse(text).pools[0].replicas == Replicas(min=1, max=3)
    line, path, message = only(text.replace("min: 1", "min: 5"))
    assert (line, path) == (6, "pools[0].replicas")
    assert "min 5 is above max 3" in message


def test_all_problems_come_at_once_in_the_order_of_lines() -> None:
    found = problems(
        """\
version: 2
modle: {path: baton-tiny}
model: {path: baton-tiny, dtype: int4}
pools:
  - name: P1
    role: prefill
    engine: {block_sise: 16, num_blocks: -3, watermark: 1.5}
  - name: d
    role: decode
    replicas: many
router: {grpc_port: 70000, slo: {ttft_ms: fast}}
"""
    )
    assert [(line, path) for line, path, _ in found] == [
        (1, "version"),
        (2, "modle"),
        (3, "model.dtype"),
        (5, "pools[0].name"),
        (7, "pools[0].engine.block_sise"),
        (7, "pools[0].engine.num_blocks"),
        (7, "pools[0].engine.watermark"),
        (10, "pools[1].replicas"),
        (11, "router.grpc_port"),
        (11, "router.slo.ttft_ms"),
    ]
    by_path = {path: message for _, path, message in found}
    assert by_path["modle"] == "unknown key; did you mean model?"
    assert by_path["pools[0].engine.block_sise"] == "unknown key; did you mean block_size?"
    assert "bfloat16" in by_path["model.dtype"]
    assert "-3" in by_path["pools[0].engine.num_blocks"]
    assert "1 or more" in by_path["pools[0].engine.num_blocks"]
    assert "from 0 to 1" in by_path["pools[0].engine.watermark"]
    assert "a whole number of 1 or more, or a mapping with min, max" in by_path["pools[1].replicas"]
    assert "65535" in by_path["router.grpc_port"]


def test_unknown_key_without_a_near_one_lists_the_known_ones() -> None:
    _, path, message = only(GOOD + "zzz: 1\n")
    assert path == "zzz"
    assert message.startswith("unknown key; known here: version, model, pools, kv_transfer")


def test_missing_keys_are_named_at_the_line_of_their_mapping() -> None:
    assert problems("version: 1\npools:\n  - {name: p}\n  - {name: d, role: decode}\n") == [
        (
            1,
            "model",
            "is missing; allowed: a mapping with path, dtype, max_model_len, served_name, "
            "deterministic",
        ),
        (3, "pools[0].role", "is missing; allowed: decode, mixed, prefill"),
    ]


def test_keys_given_twice() -> None:
    line, path, message = only(GOOD + "router: {}\nrouter: {}\n")
    assert (line, path) == (9, "router")
    assert "first on line 8" in message


def test_pool_names_given_twice() -> None:
    line, path, message = only(GOOD.replace("name: d", "name: p"))
    assert (line, path) == (6, "pools[1].name")
    assert "already the name of pools[0]" in message


@pytest.mark.parametrize(
    ("role", "missing"), [("prefill", "role decode"), ("decode", "role prefill")]
)
def test_both_phases_need_a_pool(role: str, missing: str) -> None:
    text = GOOD.replace("role: prefill", f"role: {role}").replace("role: decode", f"role: {role}")
    line, path, message = only(text)
    assert (line, path) == (3, "pools")
    assert missing in message


def test_one_mixed_pool_is_enough() -> None:
    assert parse("version: 1\nmodel: {path: baton-tiny}\npools: [{name: m, role: mixed}]\n")


def test_missing_checkpoint_is_reported_beside_other_problems() -> None:
    found = problems(GOOD.replace("baton-tiny", "baton-tinny") + "rooter: {}\n")
    assert [(line, path) for line, path, _ in found] == [(2, "model.path"), (8, "rooter")]
    assert "baton-tinny" in found[0][2]
    assert "baton-tiny" in found[0][2].split("bundled:")[1]


def test_folder_without_weights_names_the_missing_file(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    (tmp_path / "c.yaml").write_text(GOOD.replace("baton-tiny", "./model"))
    with pytest.raises(ConfigErrors, match=r"c.yaml:2: model.path: .*model.safetensors"):
        load_config(tmp_path / "c.yaml")


def test_relative_model_path_counts_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = EXAMPLES.parent / "models" / "baton-tiny"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(bundled, target_is_directory=True)
    (tmp_path / "c.yaml").write_text(GOOD.replace("baton-tiny", "models/mine"))
    monkeypatch.chdir("/")
    assert Path(load_config(tmp_path / "c.yaml").model.path).is_absolute()


def test_cache_that_cannot_hold_one_request() -> None:
    text = GOOD.replace("baton-tiny", "baton-tiny, max_model_len: 1000")
    line, path, message = only(text.replace("decode", "decode\n    engine: {num_blocks: 62}"))
    assert (line, path) == (8, "pools[1].engine.num_blocks")
    assert "at least 63 blocks" in message
    assert parse(text.replace("decode", "decode\n    engine: {num_blocks: 63}"))


def test_more_ranks_than_the_checkpoint_has_parts() -> None:
    text = GOOD.replace("role: prefill", "role: prefill\n    tensor_parallel: SIZE")
    assert parse(text.replace("SIZE", "2")).pools[0].tensor_parallel == 2
    line, path, message = only(text.replace("SIZE", "8"))
    assert (line, path) == (6, "pools[0].tensor_parallel")
    assert "num_key_value_heads 2 is not a multiple of 8" in message
    assert message.endswith("allowed here: 1, 2")
    for value in ("0", "65", "two", "1.5"):
        _, path, message = only(text.replace("SIZE", value))
        assert path == "pools[0].tensor_parallel"
        assert "a whole number from 1 to 64" in message


def test_deterministic_pools_compute_alike() -> None:
    unlike = GOOD.replace("role: decode", "role: decode\n    tensor_parallel: 2")
    parse(unlike)
    line, path, message = only(unlike.replace("baton-tiny}", "baton-tiny, deterministic: true}"))
    assert (line, path) == (8, "pools[1].tensor_parallel")
    assert message.startswith("is 2 and 1 in pool p")
    assert "set model.deterministic to false" in message
    alike = GOOD.replace("baton-tiny}", "baton-tiny, deterministic: true}")
    assert parse(alike).model.deterministic


def test_a_worker_of_several_ranks_reserves_a_gpu_for_each() -> None:
    text = GOOD.replace(
        "role: prefill", "role: prefill\n    tensor_parallel: 2\n    placement: {device: cuda}"
    )
    prefill, decode = parse(text).pools
    assert bundle(prefill) == {"CPU": 0.5, "GPU": 2.0}
    assert bundle(decode) == {"CPU": 0.5}


def test_length_beyond_the_checkpoint() -> None:
    _, path, message = only(GOOD.replace("baton-tiny", "baton-tiny, max_model_len: 4097"))
    assert path == "model.max_model_len"
    assert "4096" in message


@pytest.mark.parametrize(
    ("router", "path"),
    [
        ("{host: 0.0.0.0}", "router.host"),
        ("{grpc_port: 9000, http_port: 9000}", "router.http_port"),
        ("{default_timeout_s: 10, max_timeout_s: 5}", "router.default_timeout_s"),
    ],
)
def test_rules_between_fields_of_the_router(router: str, path: str) -> None:
    assert only(f"{GOOD}router: {router}\n")[:2] == (8, path)


def test_two_free_ports_are_no_conflict() -> None:
    assert parse(GOOD + "router: {grpc_port: 0, http_port: 0}\n").router.http_port == 0


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        (".nan", False),
        (".inf", False),
        ("0", False),
        ("-1", False),
        ("true", False),
        ("'5'", False),
        ("1:30", False),
        ("[5]", False),
        ("", False),
        ("9" * 5_000, False),
        ("5", True),
        ("5.5", True),
        ("1e3", True),
    ],
)
def test_numbers(value: str, allowed: bool) -> None:
    text = GOOD + f"router: {{slo: {{ttft_ms: {value}}}}}\n"
    if allowed:
        assert parse(text).router.slo.ttft_ms == float(value)
    else:
        line, path, message = only(text)
        assert (line, path) == (8, "router.slo.ttft_ms")
        assert "a number above 0" in message
        assert len(message) < 300


@pytest.mark.parametrize("value", ["1.0", "true", "'1'"])
def test_version_is_the_number_one(value: str) -> None:
    assert only(GOOD.replace("version: 1", f"version: {value}"))[1] == "version"


def test_resources_map_names_to_numbers() -> None:
    text = GOOD.replace("prefill", "prefill\n    placement: {resources: {rack1: 1, rack2: no}}")
    line, path, message = only(text)
    assert (line, path) == (6, "pools[0].placement.resources.rack2")
    assert "a number above 0" in message


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 0, "is empty"),
        ("# only a comment\n", 0, "is empty"),
        ("- 1\n- 2\n", 1, "is a list; it must be a mapping"),
        ("hello", 1, "is a single value"),
        ("version: 1\nmodel:\n\tpath: x\n", 3, "a tab indents this line"),
        ("version: 1\nmodel: {path: x\n", 3, "is not YAML"),
        ("version: 1\n---\nversion: 1\n", 2, "a second document"),
        ("a: &x [1]\nb: *x\n", 1, "anchor &x"),
        ("a: 1\nb: *x\n", 2, "alias *x"),
        ("a: !!python/object:os.system {}\n", 1, "tag tag:yaml.org,2002:python/object:os.system"),
        ("a: !!int '5'\n", 1, "tags are not taken"),
        ("\n" + "[" * 1_000, 2, "nested deeper"),
        ("a: \x00\n", 0, "is not YAML"),
        ("a: 1\n" * 300_000, 0, "bytes; a config has at most"),
        ("- 1\n" * 60_000, 49_999, "more than 50000 values"),
    ],
)
def test_text_that_is_no_config(text: str, line: int, said: str) -> None:
    found_line, path, message = only(text)
    assert path == ""
    assert said in message
    assert found_line == line


def test_keys_that_are_not_words() -> None:
    found = problems(GOOD + "[1, 2]: 3\n7: 8\n<<: {router: {}}\n")
    assert [line for line, _, _ in found] == [8, 9, 10]


@pytest.mark.parametrize(
    ("raw", "line", "said"),
    [(b"version: 1\nmodel: \xff\n", 2, "not UTF-8"), (b"\xc3\xa9" * 600_000, 0, "at most")],
)
def test_bytes_that_are_no_text(tmp_path: Path, raw: bytes, line: int, said: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(raw)
    with pytest.raises(ConfigErrors, match=said) as caught:
        load_config(path)
    assert [problem.line for problem in caught.value.problems] == [line]


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"gone.yaml: cannot be read: No such file"):
        load_config(tmp_path / "gone.yaml")


def test_problems_as_json_and_as_lines() -> None:
    with pytest.raises(ConfigErrors) as caught:
        parse(GOOD + "zzz: 1\n")
    assert str(caught.value).startswith("c.yaml:8: zzz: unknown key")
    assert json.loads(json.dumps(caught.value.to_json()))[0]["path"] == "zzz"
    assert caught.value.code == "config_error"


def test_every_type_of_the_schema_has_words() -> None:
    # A file of empty values asks for the words of every field on the way.
    sections = [field.name for field in msgspec.structs.fields(ClusterConfig)]
    found = problems("".join(f"{section}:\n" for section in sections))
    assert [path for _, path, _ in found] == sections
