"""s3queue doctor on stores that are set up wrongly: it names the fault, and what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from s3queue_async.testing import servers
from s3queue_async.testing.servers import Server
from tests.conftest import BUCKET
from tests.integration.cli.harness import Ended, Shell

pytestmark = pytest.mark.integration

NO_LIST, READ_ONLY, MINIMAL = "doctor-no-list", "doctor-read-only", "doctor-minimal"
VERSIONED = "doctor-versioned"
PREFIX = "team/queue"


@pytest.fixture(scope="module")
def weed() -> Iterator[Server]:
    """A SeaweedFS with keys that may do less, and a bucket with versioning."""
    rights = {
        NO_LIST: [f"Read:{BUCKET}", f"Write:{BUCKET}"],
        READ_ONLY: [f"Read:{BUCKET}", f"List:{BUCKET}"],
        MINIMAL: [f"Read:{BUCKET}", f"Write:{BUCKET}", f"List:{BUCKET}"],
    }
    identities = [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": servers.SECRET_KEY}], "actions": actions}
        for key, actions in rights.items()
    ]
    with servers.seaweedfs([BUCKET, VERSIONED], identities=identities) as server:
        client = server._client()
        client.put_bucket_versioning(Bucket=VERSIONED, VersioningConfiguration={"Status": "Enabled"})
        client.close()
        yield server


def examined(server: Server, directory: Path, *, bucket: str = BUCKET, key: str = "", skew_s: float = 0) -> Ended:
    environment = server.environment() | ({"AWS_ACCESS_KEY_ID": key} if key else {})
    command = [sys.executable, str(Path(__file__).with_name("skewed.py")), str(skew_s)] if skew_s else None
    shell = Shell(server.queue_url(bucket, PREFIX), directory, environment)
    if command:
        shell = Shell(shell.url, directory, environment, command)
    return shell.ends("doctor", "--json")


def faults(ended: Ended) -> dict[str, str]:
    return {check["name"]: check["found"] for check in ended.document["checks"] if check["state"] == "fault"}


def check(ended: Ended, name: str) -> Any:
    return next(check for check in ended.document["checks"] if check["name"] == name)


def test_healthy(weed: Server, tmp_path: Path) -> None:
    """Credentials that may read, write and list one bucket, and no more, are all that it takes; nothing stays behind."""
    before = weed.keys(BUCKET)
    ended = examined(weed, tmp_path, key=MINIMAL)
    assert ended.code == 0
    assert ended.document["ok"]
    assert faults(ended) == {}
    for name in ("store", "clock", "permissions", "conditional writes", "latency", "versioning", "leftovers"):
        assert check(ended, name)["state"] == "ok"
    assert weed.keys(BUCKET) == before


def test_no_permission_to_list(weed: Server, tmp_path: Path) -> None:
    """The missing permission is named, and the policy to paste has it for this bucket and prefix."""
    ended = examined(weed, tmp_path, key=NO_LIST)
    assert ended.code == 1
    assert faults(ended) == {"permissions": "the bucket may not be listed (lacking: s3:ListBucket)"}
    assert ended.document["lacking"] == ["s3:ListBucket"]
    listing, objects = ended.document["policy"]["Statement"]
    assert (listing["Action"], listing["Resource"]) == (["s3:ListBucket"], f"arn:aws:s3:::{BUCKET}")
    assert listing["Condition"] == {"StringLike": {"s3:prefix": [f"{PREFIX}/*"]}}
    assert objects["Action"] == ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"]
    assert objects["Resource"] == f"arn:aws:s3:::{BUCKET}/{PREFIX}/*"


def test_read_only(weed: Server, tmp_path: Path) -> None:
    """Neither writing nor deleting: said in these words, with both permissions."""
    ended = examined(weed, tmp_path, key=READ_ONLY)
    assert ended.code == 1
    (found,) = faults(ended).values()
    assert found.startswith("the bucket is read-only for these credentials")
    assert ended.document["lacking"] == ["s3:PutObject", "s3:DeleteObject"]
    shell = Shell(weed.queue_url(BUCKET, PREFIX), tmp_path, weed.environment() | {"AWS_ACCESS_KEY_ID": READ_ONLY})
    told = shell.ends("doctor").out
    policy = told[told.index("{") : told.rindex("}") + 1]
    assert json.loads(policy) == ended.document["policy"]


def test_ignores_conditions(rclone_server: Server, tmp_path: Path) -> None:
    """A store without conditional writes is named as such, with what it answered."""
    ended = examined(rclone_server, tmp_path)
    assert ended.code == 1
    assert list(faults(ended)) == ["conditional writes"]
    assert "PUT with If-None-Match: * on a key that exists with success" in faults(ended)["conditional writes"]


def test_versioned_bucket(weed: Server, tmp_path: Path) -> None:
    """Versioning is a fault, because it costs money for ever."""
    ended = examined(weed, tmp_path, bucket=VERSIONED)
    assert ended.code == 1
    assert list(faults(ended)) == ["versioning"]
    assert "billed" in faults(ended)["versioning"]


@pytest.mark.parametrize(("skew_s", "said"), [(3600, "60 min ahead of"), (-3600, "60 min behind")])
def test_clock_off_by_an_hour(weed: Server, tmp_path: Path, skew_s: float, said: str) -> None:
    """The store refuses the signatures' time; what is wrong is the clock, by how much, and in which direction."""
    ended = examined(weed, tmp_path, skew_s=skew_s)
    assert ended.code == 1
    assert list(faults(ended)) == ["clock"]
    assert said in faults(ended)["clock"]
    assert "Set this machine's clock" in check(ended, "clock")["advice"]


def test_clock_off_by_an_hour_and_accepted(moto_server: Server, tmp_path: Path) -> None:
    """A store that does not look at the time of requests still tells its own."""
    ended = examined(moto_server, tmp_path, skew_s=3600)
    assert "60 min ahead of" in faults(ended)["clock"]


def test_unreachable(weed: Server, tmp_path: Path) -> None:
    """Nobody listens: that is what it says, and where."""
    (port,) = servers.free_ports(1)
    ended = examined(Server(f"http://127.0.0.1:{port}"), tmp_path)
    assert ended.code == 1
    assert list(faults(ended)) == ["store"]
    assert "is unreachable" in faults(ended)["store"]
    assert f"127.0.0.1:{port}" in faults(ended)["store"]


def test_no_bucket_and_no_such_key(weed: Server, tmp_path: Path) -> None:
    """A bucket that is missing and credentials that are unknown are told apart from a store that is away."""
    assert "does not exist" in faults(examined(weed, tmp_path, bucket="no-such-bucket"))["store"]
    assert "refused the credentials" in faults(examined(weed, tmp_path, key="nobody"))["store"]


def test_lifecycle_rules(moto_server: Server, tmp_path: Path) -> None:
    """A rule that deletes messages is a fault, one that moves them a warning; rules about other prefixes are none."""
    client = moto_server._client()
    moto_server.create_bucket("doctor-rules")
    rules = [
        {"ID": "tidy", "Status": "Enabled", "Filter": {"Prefix": "team/"}, "Expiration": {"Days": 7}},
        {
            "ID": "cheap",
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "Transitions": [{"Days": 30, "StorageClass": "GLACIER"}],
        },
        {"ID": "other", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 1}},
    ]
    client.put_bucket_lifecycle_configuration(Bucket="doctor-rules", LifecycleConfiguration={"Rules": rules})
    client.close()
    ended = examined(moto_server, tmp_path, bucket="doctor-rules")
    assert list(faults(ended)) == ["lifecycle rule tidy"]
    assert "after 7 days: delayed messages" in faults(ended)["lifecycle rule tidy"]
    assert check(ended, "lifecycle rule cheap")["state"] == "warn"
    assert "lifecycle rule other" not in ended.out


def test_sqlite(local: Shell) -> None:
    """A file that is not there is no fault of the store; a queue on which nobody works is told about."""
    assert local.ends("doctor").code == 3
    local.does("enqueue", "x")
    ended = local.does("doctor", "--json")
    assert check(ended, "queue")["state"] == "warn"
    assert "nobody works" in check(ended, "queue")["found"]
    assert ended.document["policy"] is None
    told = local.does("doctor").out
    assert "nobody works" in told
    assert "1 warning." in told
