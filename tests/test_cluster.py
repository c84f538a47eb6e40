"""A cluster of Ray: what it is asked for, and what is refused in words of ours. Ray itself is not needed here."""

import os
import socket
import sys

import pytest
from fake_ray import FakeRay, RayError

from d3llm_hf.cluster import Share, imported, joined


VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED", "RAY_worker_niceness")
NAMES = {"count": "--replicas", "num_cpus": "--num-cpus", "num_gpus": "--num-gpus", "address": "--ray-address"}


@pytest.fixture
def fake(monkeypatch):
    """`fake(...)`: the module `ray` is a [`FakeRay`] with these arguments, and no variable of Ray is set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def install(*args, **kwargs) -> FakeRay:
        ray = FakeRay(*args, **kwargs)
        monkeypatch.setitem(sys.modules, "ray", ray)
        return ray

    return install


def join(address=None):
    return joined(address, "`d3llm serve --replicas`", "--ray-address")


def test_a_cluster_of_this_machine_has_none_of_rays_habits_and_ends(fake):
    ray = fake()
    with join() as found:
        assert found is ray and (ray.joined["address"], ray.joined["include_dashboard"]) == ("local", False)
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0" and os.environ["RAY_AUTH_MODE"] == "token"
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64  # with which Ray writes no file
        assert os.environ[VARIABLES[3]] == "0"  # as this process, not behind everything else
    assert ray.joined is None and not set(VARIABLES) & set(os.environ)


def test_who_sets_variables_of_ray_has_asked_for_what_they_say(fake, monkeypatch):
    fake()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    with join():
        assert [os.environ.get(name) for name in VARIABLES] == ["disabled", None, "1", "0"]
    assert [os.environ.get(name) for name in VARIABLES] == ["disabled", None, "1", None]


@pytest.mark.parametrize("address", ["auto", "listens"])
def test_a_cluster_that_is_there_is_joined_as_it_is(fake, address):
    ray = fake()
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = address if address == "auto" else f"127.0.0.1:{head.getsockname()[1]}"
        with join(address):
            assert ray.joined == {"address": address} and not set(VARIABLES) & set(os.environ)


def test_without_ray_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ImportError, match=r"`d3llm serve --replicas` needs Ray \(got: .*pip install 'd3llm-hf\[ray\]'"
    ):
        join().__enter__()
    with pytest.raises(ImportError, match=r"pip install 'd3llm-hf\[ray\]'"):
        imported("ray", "x")


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", ":6379", "head:port"])
def test_what_is_no_address_of_a_cluster_is_refused(address):
    with pytest.raises(ValueError, match=r"`--ray-address` must be auto, or HOST:PORT .* \(got '.*'\)"):
        join(address).__enter__()


@pytest.mark.parametrize("port", ["free", "99999"])
def test_a_cluster_that_is_not_there_is_refused_at_once(port):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] if port == "free" else port
    with pytest.raises(ValueError, match=rf"must name a running cluster \(got '127.0.0.1:{port}': .*ray start --head"):
        join(f"127.0.0.1:{port}").__enter__()


@pytest.mark.parametrize("error", [ConnectionError("no cluster"), RuntimeError("Version mismatch"), RayError("token")])
def test_a_cluster_that_cannot_be_joined_is_refused_with_rays_reason(fake, error):
    fake(refuses=error)
    with pytest.raises(ValueError, match=rf"that this Ray 0.fake can join \(got 'auto': {error}\)\. Start one with"):
        join("auto").__enter__()


def test_a_cluster_that_does_not_start_here_is_told_in_one_line(fake):
    fake(refuses=Exception("The current node timed out during startup."))
    with pytest.raises(OSError, match=r"Ray must start on this machine \(got: The current node timed out"):
        join().__enter__()


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ({"count": 0}, r"`--replicas` must be at least 1 \(got 0\)"),
        ({"count": 1, "num_cpus": 0.0}, r"`--num-cpus` must be a positive number of CPU cores \(got 0.0\)"),
        ({"count": 1, "num_cpus": float("nan")}, r"`--num-cpus` must be a positive number of CPU cores \(got nan\)"),
        ({"count": 1, "num_gpus": 2.0}, r"`--num-gpus` must be from 0 to 1: .* \(got 2.0\)"),
        ({"count": 1, "num_gpus": -0.5}, r"`--num-gpus` must be from 0 to 1: .* \(got -0.5\)"),
    ],
)
def test_a_share_out_of_range_is_refused(share, message):
    with pytest.raises(ValueError, match=message):
        Share(**share, names=NAMES)


def test_there_must_be_room_for_all_and_a_share_may_fill_it():
    there = {"CPU": 2.0, "GPU": 1.0}
    Share(4, num_cpus=0.5).check_room(there)
    Share(2, num_cpus=0.5, num_gpus=0.5).check_room(there)
    with pytest.raises(
        ValueError, match=r"`--replicas` times `--num-cpus` .* \(got 3 times 1 CPUs, and there are 2\)"
    ):
        Share(3, names=NAMES).check_room(there)
    with pytest.raises(ValueError, match=r"`count` times `num_gpus` .* \(got 2 times 1 GPUs, and there are 1\)"):
        Share(2, num_gpus=1).check_room(there)
    assert Share(1, num_cpus=0.1).filling(there).count == 20
    assert Share(1, num_cpus=0.1, num_gpus=0.5).filling(there).count == 2
    assert Share(1, num_cpus=8).filling(there).count == 1  # for which there is no room, as it will be told
