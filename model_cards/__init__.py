"""The template of model cards. A regular package: importlib.resources finds it in editable installs too."""
