"""Assisted decoding: drafts that are accepted wholly, partly or not at all give what greedy decoding gives."""

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, draw_ids, make_model
from torch import Tensor
from transformers import DynamicCache

from ssm_zoo.modeling import assisted_decoding, rollback
from ssm_zoo.modeling.cache import CACHE_FIELD
from ssm_zoo.modeling.rollback import recording_layers, restore, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
NEW = 14
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


class Drafts:
    """A stand-in for a draft model: what greedy decoding gives, with wrong tokens at chosen places."""

    requires_model_outputs = False

    def __init__(self, tokens: Tensor, wrong: set[int], length: int = 4) -> None:
        self.tokens, self.length = tokens.clone(), length
        for place in wrong:
            self.tokens[:, place] = self.tokens[:, place] % 60 + 1

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, None]:
        start = input_ids.shape[1]
        return torch.cat([input_ids, self.tokens[:, start : start + self.length]], dim=1), None

    def update_candidate_strategy(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("padded", [False, True], ids=["", "left-padded"])
def test_drafts_give_what_greedy_decoding_gives(model: Any, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = draw_ids(1, 11)
    mask = torch.ones_like(ids)
    if padded:
        mask[:, :3] = 0
    reports = {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(ids, attention_mask=mask, **GREEDY, **reports)
    tokens = plain.sequences
    accepted = set()
    for wrong in (set(), {13, 18}, set(range(11, 25))):  # drafts that are right, wrong in part, and wholly wrong
        drafts = Drafts(tokens, wrong)
        monkeypatch.setattr(type(model), "_get_candidate_generator", lambda *_, drafts=drafts, **__: drafts)
        found = model.generate(ids, attention_mask=mask, prompt_lookup_num_tokens=4, **GREEDY, **reports)
        assert torch.equal(found.sequences, tokens)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(plain.logits), rtol=0, atol=1e-5)
        accepted.add(found[CACHE_FIELD].get_seq_length())
        assert not any(getattr(layer, "record_past", False) for layer in found[CACHE_FIELD].layers)
    assert accepted == {24}


# The rest does not depend on the kind of cache layer: one hybrid with a state, a window, and keys and values.


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return make_model("all-four")


def test_a_draft_model_and_lookup_in_the_prompt_give_what_greedy_decoding_gives(hybrid: Any) -> None:
    """The draft model is recurrent as well, and its own cache is rolled back: it agrees at some tokens only."""
    ids, draft = draw_ids(1, 4).repeat(1, 5), make_model("all-four", seed=0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    plain = hybrid.generate(ids, **GREEDY)
    lookup = {"prompt_lookup_num_tokens": 3}
    chunks = lookup | {"prefill_chunk_size": 6}
    for options in (lookup, chunks, {"assistant_model": draft}, {"assistant_model": hybrid}):
        assert torch.equal(hybrid.generate(ids, **GREEDY, **options), plain)


def test_assisted_sampling_draws_from_the_model(hybrid: Any) -> None:
    """Of 150 samples of two tokens, the first is as frequent as it is likely."""
    ids = draw_ids(1, 3).repeat(1, 4)
    options = {"do_sample": True, "temperature": 0.5, "top_k": 4, "max_new_tokens": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    drawn = [hybrid.generate(ids, prompt_lookup_num_tokens=2, **options)[0, -2] for _ in range(150)]
    with torch.no_grad():
        likely = (hybrid(ids).logits[0, -1] / options["temperature"]).topk(4)
    share = torch.stack([(torch.stack(drawn) == token).float().mean() for token in likely.indices])
    torch.testing.assert_close(share, likely.values.softmax(-1), rtol=0, atol=0.13)


@torch.no_grad()
def test_a_prompt_of_many_tokens_is_read_in_two_parts(hybrid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no draft can be part of is not recorded."""
    monkeypatch.setattr(assisted_decoding, "RECORDED", 8)
    ids = draw_ids(1, 5).repeat(1, 8)
    lengths: list[int] = []
    hook = hybrid.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = hybrid.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)
    hook.remove()
    assert lengths[:2] == [35, 8]  # then the prompt's last 5 tokens and a draft of 3
    assert torch.equal(found, hybrid.generate(ids, **GREEDY))


@torch.no_grad()
def test_assisted_decoding_goes_on_from_a_cache(hybrid: Any) -> None:
    """A prompt read beforehand, for several continuations."""
    cache = DynamicCache(config=hybrid.config)
    prompt = draw_ids(1, 4).repeat(1, 4)
    hybrid(prompt, cache=cache, use_cache=True)
    saved = snapshot(cache)
    for seed in (1, 2):
        ids = torch.cat([prompt, draw_ids(1, 3, seed=seed)], dim=1)
        restore(cache, saved)
        found = hybrid.generate(ids, **{CACHE_FIELD: cache}, prompt_lookup_num_tokens=3, **GREEDY)
        assert torch.equal(found, hybrid.generate(ids, **GREEDY))
        assert not recording_layers(cache)


@torch.no_grad()
def test_one_prompt_serves_many_continuations_at_once(hybrid: Any) -> None:
    prompt, rests = draw_ids(2, 9), draw_ids(6, 4, seed=1)
    cache = hybrid(prompt, use_cache=True)[CACHE_FIELD]
    cache.batch_repeat_interleave(3)
    whole = hybrid(torch.cat([prompt.repeat_interleave(3, 0), rests], dim=1)).logits[:, 9:]
    chosen = torch.tensor([4, 1])
    saved = snapshot(cache)
    torch.testing.assert_close(hybrid(rests, cache=cache, use_cache=True).logits, whole, rtol=0, atol=1e-5)
    restore(cache, saved)
    cache.batch_select_indices(chosen)
    some = hybrid(rests[chosen], cache=cache, use_cache=True).logits
    torch.testing.assert_close(some, whole[chosen], rtol=0, atol=1e-5)


@torch.no_grad()
def test_crop_refuses_what_was_not_recorded(hybrid: Any) -> None:
    cache = DynamicCache(config=hybrid.config)
    hybrid(draw_ids(1, 5), cache=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"from 0 to 0, got -1: RecurrentLayer keeps a state"):
        cache.crop(-1)
    cache.activate_past_recording()
    for _ in range(2):
        hybrid(draw_ids(1, 3), cache=cache, use_cache=True)
    for number in (-7, 1):
        with pytest.raises(ValueError, match=rf"from -6 to 0, got {number}"):
            cache.crop(number)
    expected = hybrid(torch.cat([draw_ids(1, 5), draw_ids(1, 3)[:, :2], draw_ids(1, 2)], dim=1)).logits[:, -2:]
    cache.crop(-4)
    with pytest.raises(ValueError, match="from 0 to 0, got -1"):
        cache.crop(-1)
    found = hybrid(draw_ids(1, 2), cache=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_recording_does_not_grow_without_end(hybrid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollback, "RECORDED", 4)
    cache = DynamicCache(config=hybrid.config)
    cache.activate_past_recording()
    for _ in range(9):
        hybrid(draw_ids(1, 1), cache=cache, use_cache=True)
    assert [len(layer.recording.steps) for layer in recording_layers(cache)] == [4, 4, 4]
    assert [layer.recording.steps for layer in recording_layers(copy.deepcopy(cache))] == [[], [], []]
    restore(cache, snapshot(cache))
    assert [layer.recording.steps for layer in recording_layers(cache)] == [[], [], []]
