"""Passes, log-probabilities and decoding of language models.

Files:
    logps.py: Log-probabilities of answers and packed documents.
    selected_logps.py: Log-probabilities of selected tokens with little memory.
    chunked_head.py: The same from hidden states, without the logits of all positions.
    trie.py: Prefix tree of the titles of a catalogue.
    trie_search_base.py: Base class of searches in a trie.
    trie_beam_search.py: Beam search over the titles of a catalogue.
    trie_sampling.py: Sampling of titles of a catalogue.
    free_text.py: Generation of free text.
    grounding.py: Embeddings of texts.
    attention.py: Attention masks of rows with several sequences.
    tree_attention.py: Decoding of several continuations with one shared cache.
    whole_rows.py: Passes over whole sequences without a cache.
    pass_forms.py: Selection of the fastest exact form of each pass.
    pass_check.py: Comparison of these forms with reference passes.
    pass_twin.py: Small copies of a model for this comparison.
"""
