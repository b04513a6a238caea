"""A text of made-up stories for the tests of the scripts that read TinyStories."""

from pathlib import Path

import torch

END = "<|endoftext|>"
WORDS = ["cat", "dog", "sun", "tree", "red", "blue", "ran", "saw", "big", "small", "house", "river", "bird", "song"]


def write_stories(path: Path, stories: int = 20, words: int = 300) -> None:
    """Write stories of a first sentence, which gives their number, and a second one of drawn words."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for number in range(stories):
        picked = torch.randint(len(WORDS), (words,), generator=generator).tolist()
        texts.append(f"Story {number}. " + " ".join(WORDS[index] for index in picked))
    path.write_text(f"\n{END}\n".join(texts), encoding="utf-8")
