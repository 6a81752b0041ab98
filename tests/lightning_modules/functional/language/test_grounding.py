import pytest
import torch
from small_lm import random_titles, small_lm

from malleable.lightning_modules.functional.language.grounding import embed_texts


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_texts_are_embedded_by_their_last_token(kind):
    model, texts = small_lm(kind), random_titles(9)
    embeddings = embed_texts(model, texts, batch_size=4)
    for text, embedding in zip(texts, embeddings, strict=True):
        expected = model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(embedding, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        embed_texts(model, [[3], []])
