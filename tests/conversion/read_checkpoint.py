"""A user's process for the export tests: loads checkpoints and writes down what they compute.

Run as `python -I read_checkpoint.py JOBS REPORT BLOCKED...`: packages in BLOCKED cannot be imported. JOBS is a JSON
list of {"source": folder or repository, "revision": or null, "save": folder}; each checkpoint is loaded with every
Auto class, run, saved into "save", and loaded from there again. REPORT gets a JSON object per job; the tensors go to
`REPORT.safetensors`, named `<job>/<tensor>`. Without BLOCKED packages the checkpoints are loaded by ssm_zoo's classes.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


class Blocked:
    """A finder that finds everything but some packages."""

    def __init__(self, finder: Any, packages: list[str]) -> None:
        self.finder, self.packages = finder, packages

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.split(".")[0] in self.packages else self.finder.find_spec(name, path, target)


def run(model: Any, ids: Any, mask: Any) -> dict[str, Any]:
    """Logits of a padded batch, and greedy tokens."""
    import torch

    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    settings = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    tokens = model.generate(ids, attention_mask=mask, **settings)
    beams = model.generate(ids, attention_mask=mask, num_beams=2, **settings)
    return {"logits": logits, "tokens": tokens, "beams": beams}


def load(auto: Any, source: str, revision: str | None, remote: bool) -> Any:
    return auto.from_pretrained(source, revision=revision or "main", trust_remote_code=remote)


def main(jobs: str, report: str, *packages: str) -> None:
    sys.meta_path[:] = [Blocked(finder, list(packages)) for finder in sys.meta_path]
    assert not any(importlib.util.find_spec(package) for package in packages)
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.set_num_threads(1)
    remote = bool(packages)
    if not remote:
        import ssm_zoo.modeling  # noqa: F401 - registers its classes

    ids = torch.arange(1, 41).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    found, tensors = [], {}
    for index, job in enumerate(json.loads(Path(jobs).read_text())):
        source, revision = job["source"], job["revision"]
        model = load(AutoModelForCausalLM, source, revision, remote)
        results = run(model, ids, mask)
        with torch.no_grad():
            backbone = load(AutoModel, source, revision, remote)
            results["hidden"] = backbone(ids, attention_mask=mask).last_hidden_state
        tensors |= {f"{index}/{name}": tensor.contiguous() for name, tensor in results.items()}
        model.save_pretrained(job["save"])
        again = load(AutoModelForCausalLM, job["save"], None, remote)
        again_backbone = load(AutoModel, job["save"], None, remote)
        with torch.no_grad():
            same = torch.equal(again_backbone(ids, attention_mask=mask).last_hidden_state, results["hidden"])
        config = load(AutoConfig, source, revision, remote)
        found.append(
            {
                "modules": [type(each).__module__ for each in (model, backbone, config, again, again_backbone)],
                "config": config.to_diff_dict(),
                "saved_files": sorted(path.name for path in Path(job["save"]).iterdir()),
                "saved_auto_map": json.loads((Path(job["save"]) / "config.json").read_text())["auto_map"],
                "same_again": same
                and all(torch.equal(value, results[name]) for name, value in run(again, ids, mask).items()),
            }
        )
    save_file(tensors, f"{report}.safetensors")
    Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
