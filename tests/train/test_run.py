"""What a run folder is given at a start, and what a start makes of a damaged one."""

from __future__ import annotations

import json

import pytest
import yaml

from ldct_dist.errors import UserError
from ldct_dist.train.config import RunConfig
from ldct_dist.train.run import RunFolder
from ldct_dist.world import World

CONFIG = RunConfig.model_validate({"name": "run", "store": "ct.zarr", "steps": 8})
OTHER = CONFIG.model_copy(update={"seed": 1})


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(CONFIG)
    return folder


def test_a_config_that_did_not_change_is_not_written_again(folder):
    before = folder.config.stat()
    assert folder.open(CONFIG) == []
    assert (before.st_ino, before.st_mtime_ns) == (
        folder.config.stat().st_ino,
        folder.config.stat().st_mtime_ns,
    )


def test_any_key_may_change_until_something_is_saved_and_then_no_more(folder):
    assert folder.open(OTHER) == ["seed was 0, now 1"]
    folder.checkpoint(1).mkdir(parents=True)
    with pytest.raises(UserError, match="holds another run: seed was 1, now 0"):
        folder.open(CONFIG)
    assert folder.open(OTHER) == []


def test_a_run_from_before_a_setting_was_there_goes_on_with_its_default_alone(folder):
    recorded = yaml.safe_load(folder.config.read_text())
    del recorded["data"]["augment"]["lesions"]
    folder.config.write_text(yaml.safe_dump(recorded))
    folder.checkpoint(1).mkdir(parents=True)
    with pytest.raises(UserError, match=r"data\.augment\.lesions\.count was 0, now 3"):
        folder.open(with_lesions(3))
    assert folder.open(CONFIG) == []


def with_lesions(count):
    return RunConfig.model_validate(
        CONFIG.model_dump() | {"data": {"augment": {"lesions": {"count": count}}}}
    )


@pytest.mark.parametrize("damaged", ["", "[1, 2]", "a: {"])
def test_a_damaged_config_is_one_line_with_the_way_out(folder, damaged):
    folder.checkpoint(1).mkdir(parents=True)
    folder.config.write_text(damaged)
    with pytest.raises(UserError, match=r"config.yaml: damaged; delete it"):
        folder.open(CONFIG)
    folder.config.unlink()
    assert folder.open(CONFIG) == []


@pytest.mark.parametrize("damaged", ["", "{", "{}"])
def test_a_damaged_record_of_starts_does_not_stop_one(folder, damaged):
    folder.environment.write_text(damaged)
    folder.record_start(CONFIG, World(), generation=2, step=5)
    folder.record_start(CONFIG, World(), generation=3, step=7)
    assert [start["from_step"] for start in json.loads(folder.environment.read_text())] == [5, 7]
