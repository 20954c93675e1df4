"""Whether the hub is asked hangs on whether it answers, wherever it is."""

import socket

import huggingface_hub.constants as hub
import pytest

import vislora.hub
from vislora.hub import offline_if_unreachable


@pytest.fixture
def client(monkeypatch):
    """The hub client, online and without a proxy."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(vislora.hub, "getproxies", dict)
    return monkeypatch


def test_a_mirror_is_looked_for_at_its_own_port(client):
    with socket.create_server(("127.0.0.1", 0)) as mirror:
        client.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{mirror.getsockname()[1]}")
        offline_if_unreachable()
        assert not hub.HF_HUB_OFFLINE
    offline_if_unreachable()
    assert hub.HF_HUB_OFFLINE


@pytest.mark.parametrize(("endpoint", "port"), [("https://huggingface.co", 443), ("http://mirror", 80)])
def test_without_a_port_it_is_that_of_the_protocol(client, endpoint, port):
    asked = []

    def unreachable(address, timeout):
        asked.append(address[1])
        raise OSError

    client.setattr(hub, "ENDPOINT", endpoint)
    client.setattr(socket, "create_connection", unreachable)
    offline_if_unreachable()
    assert asked == [port]
    assert hub.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("proxies", "offline"),
    [({"no": "localhost"}, True), ({"https": "proxy:3128"}, False), ({"all": "proxy:3128"}, False)],
)
def test_behind_a_proxy_the_client_finds_out_by_itself(client, proxies, offline):
    client.setattr(hub, "ENDPOINT", "https://127.0.0.1:9")  # where nothing answers
    client.setattr(vislora.hub, "getproxies", lambda: proxies)
    offline_if_unreachable()
    assert offline == hub.HF_HUB_OFFLINE
