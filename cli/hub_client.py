"""The Hub's client as the commands use it: no request waits for ever."""

import os

_SECONDS = 60.0
"""That a server may be silent, or HF_HUB_DOWNLOAD_TIMEOUT if it is more. By itself huggingface_hub waits for ever."""


def limit_waiting() -> None:
    """Give every request of huggingface_hub a limit to the time without an answer, unless it has one of its own."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    seconds = float(os.environ.get("SSM_ZOO_HUB_TIMEOUT", max(_SECONDS, constants.HF_HUB_DOWNLOAD_TIMEOUT)))

    def make() -> object:
        client = default_client_factory()
        client.timeout = seconds
        return client

    set_client_factory(make)  # pyright: ignore[reportArgumentType]
