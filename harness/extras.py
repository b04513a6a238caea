"""The command that installs an extra of this package, for errors about packages that are not installed."""


def install_command(extra: str) -> str:
    """Return the sentence with the command. The package is on no index, so its checkout is named."""
    return f"Install it with pip install -e '.[{extra}]' in a checkout of ssm-zoo."
