"""The registry: what is found, what is refused, and that ours are complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphprune import registry
from graphprune.contract import Pass
from graphprune.errors import UsageError
from graphprune.pipeline import Pipeline
from tests.third_party.install import install, install_count_nodes

PASSES = Path(__file__).parents[1] / "graphprune" / "passes"


@pytest.mark.parametrize("name", registry.names())
def test_every_name_is_the_name_of_its_class(name: str) -> None:
    cls = registry.load(name)
    assert issubclass(cls, Pass)
    assert cls.name == name


@pytest.mark.parametrize("name", registry.names())
def test_every_pass_has_options_with_text_types_and_a_summary(name: str) -> None:
    info = registry.info(name)
    assert info.summary.endswith(".")
    assert info.kind in registry.KINDS
    assert all(text for text in info.options.values())


def test_every_file_in_passes_is_registered() -> None:
    files = {
        ".".join(("graphprune.passes", kind, path.stem))
        for kind in registry.KINDS
        for path in (PASSES / kind).glob("*.py")
        if not path.stem.startswith("_")
    }
    assert files
    assert files == {registry.load(name).__module__ for name in registry.names()}


def test_methods_score_channels_or_choose_them() -> None:
    infos = [registry.info(name) for name in registry.methods()]
    assert {"magnitude", "taylor", "random"} < {i.name for i in infos if i.kind == "importance"}
    chooses = {i.name for i in infos if i.cls.chooses}
    assert chooses == {"obs", "trainable-gates"}
    assert {i.name for i in infos if i.kind == "training"} == chooses


def test_an_unknown_name_is_answered_with_close_ones() -> None:
    with pytest.raises(UsageError, match=r"no pass is called 'magnitud'; did you mean magnitude\?"):
        registry.load("magnitud")


def test_an_unknown_name_without_close_ones_points_to_the_list() -> None:
    with pytest.raises(UsageError, match="`graphprune passes` lists the names"):
        registry.load("zzzzzz")


def test_a_third_partys_pass_is_found_and_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_count_nodes(tmp_path, monkeypatch)
    info = registry.info("count-nodes")
    assert info.to_json() == {
        "name": "count-nodes",
        "kind": "other",
        "summary": "Count the nodes of the graph.",
        "is_method": False,
        "options": {"inputs_too": "bool = true"},
        "owner": "third_party_passes",
        "class": "third_party_count_nodes:CountNodes",
    }
    assert str(Pipeline.parse("count-nodes{inputs_too=false}")) == "count-nodes{inputs_too=false}"


def test_a_duplicate_name_names_both_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, package="one", passes={"same": "one:Pass"})
    install(tmp_path, monkeypatch, package="two", passes={"same": "two:Pass"})
    with pytest.raises(
        UsageError, match="two passes are called 'same': .* of (one|two) and .* of "
    ):
        registry.names()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import missing_module_xyz", "cannot be imported from broken_a:Broken: No module named"),
        ("", "cannot be imported from broken_b:Broken: .* has no attribute 'Broken'"),
        ("Broken = 3", "expected a subclass of graphprune.Pass at broken_c:Broken, found 3"),
        (
            "from third_party_count_nodes import CountNodes as Broken",
            "broken_d:Broken calls itself 'count-nodes'; register it under that name",
        ),
    ],
    ids=["import", "attribute", "not-a-pass", "name"],
)
def test_a_broken_registration_says_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    text: str,
    message: str,
) -> None:
    install_count_nodes(tmp_path, monkeypatch)
    letter = {"import": "a", "attribute": "b", "not-a-pass": "c", "name": "d"}[
        request.node.callspec.id
    ]
    module = f"broken_{letter}"
    install(
        tmp_path,
        monkeypatch,
        package=module,
        passes={"broken": f"{module}:Broken"},
        modules={module: text},
    )
    with pytest.raises(UsageError, match=message):
        registry.load("broken")
