"""The model hub, where it can be reached."""

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from vislora.errors import ModelError
from vislora.paths import user_path


def local_or_hub(key: str, name: str) -> str:
    """What `from_pretrained` is to open: a folder, or a name on the hub, for which the cache has to do where the hub
    can't be reached.

    Args:
        key: the setting it comes from, for messages.

    Raises:
        ModelError: the name can only be a folder's, and there is none.
    """
    folder = user_path(name)
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{key}={name}: there is no such folder")
    offline_if_unreachable()
    return name


def offline_if_unreachable() -> None:
    """Put the hub client into offline mode where the hub can't be reached: cached files are used, a missing one is told
    at once, instead of after its minute of retries."""
    import huggingface_hub.constants as hub

    url = urlsplit(hub.ENDPOINT)  # of a mirror where HF_ENDPOINT names one
    proxies = getproxies()  # with no_proxy among them, which is none
    if hub.HF_HUB_OFFLINE or url.scheme in proxies or "all" in proxies:
        return
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=3).close()
    except OSError:
        hub.HF_HUB_OFFLINE = True
