"""The interface that gloo uses between machines: two network namespaces stand for two machines."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from volo.runtime.network import choose_gloo_interface

ROOT = Path(__file__).parents[2]
TOOLS = ("unshare", "nsenter", "ip")
NEW_MACHINE = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--uts"]
needs_namespaces = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)) or subprocess.run([*NEW_MACHINE, "true"], capture_output=True).returncode != 0,
    reason="network namespaces cannot be made here",
)

# Two machines of the same name, which Debian's line in /etc/hosts gives to the loopback, and a cable between them.
TWO_MACHINES = """
set -e
hostname node
printf '127.0.0.1 localhost\\n127.0.1.1 node\\n10.9.0.1 a\\n10.9.0.2 b\\n' > "$HOSTS"
mount --bind "$HOSTS" /etc/hosts
mount -t tmpfs tmpfs /run
ip link set lo up
ip netns add other
ip link add cable type veth peer name plug netns other
ip addr add 10.9.0.1/24 dev cable
ip link set cable up
ip route add default via 10.9.0.2
nsenter --net=/run/netns/other sh -c 'ip link set lo up; ip addr add 10.9.0.2/24 dev plug; ip link set plug up'
export WORLD_SIZE=2 LOCAL_WORLD_SIZE=1 LOCAL_RANK=0 MASTER_PORT=29511
RANK=0 MASTER_ADDR=$MASTER "$PYTHON" -c "$RANK_CODE" &
RANK=1 MASTER_ADDR=10.9.0.1 nsenter --net=/run/netns/other "$PYTHON" -c "$RANK_CODE"
wait $!
"""
RANK_CODE = """
import os
from volo.runtime import distributed
world = distributed.initialise("cpu")
total = distributed.sum_over_ranks([1.0 + world.rank])
os.write(1, f"{world.rank} {total} {os.environ['GLOO_SOCKET_IFNAME']}\\n".encode())  # in one piece
distributed.shutdown()
"""


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize("master", ["10.9.0.1", "node"])
def test_two_machines_whose_names_are_the_loopback(tmp_path, master):
    there = {"HOSTS": str(tmp_path / "hosts"), "MASTER": master, "PYTHON": sys.executable, "RANK_CODE": RANK_CODE}
    done = subprocess.run(
        [*NEW_MACHINE, "bash", "-c", TWO_MACHINES],
        env=os.environ | there | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 [3.0] cable", "1 [3.0] plug"]


@needs_namespaces
def test_without_a_way_out_the_option_is_named(tmp_path):
    code = "from volo.runtime.network import choose_gloo_interface; choose_gloo_interface('192.168.7.7')"
    command = [*NEW_MACHINE, sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "ValueError: no network interface was found" in done.stderr and "GLOO_SOCKET_IFNAME" in done.stderr


def test_on_one_machine_nothing_is_chosen():
    for master in ("localhost", "127.0.0.1", "::1"):
        choose_gloo_interface(master)
        assert os.environ["GLOO_SOCKET_IFNAME"] == ""


def test_the_users_choice_stands(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    choose_gloo_interface("192.0.2.7")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_master_without_an_address(monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match="MASTER_ADDR 'node7' has no address: Name or service not known"):
        choose_gloo_interface("node7")
