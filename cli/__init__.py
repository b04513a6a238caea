"""The `ssm-zoo` command: thin, one sub-command per verb."""
