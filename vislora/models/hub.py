"""The model hub, where it can be reached."""

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies


def offline_if_unreachable() -> None:
    """Put the hub client into offline mode where the hub can't be reached: cached files are used, a missing one is told
    at once, instead of after its minute of retries."""
    import huggingface_hub.constants as hub

    host = urlsplit(hub.ENDPOINT).hostname
    if hub.HF_HUB_OFFLINE or getproxies():
        return
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        hub.HF_HUB_OFFLINE = True
