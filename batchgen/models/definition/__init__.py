"""What a model folder says of its model: config, tokenizer, chat template and files of weights, each checked.

This is the one place that reads them. Whatever is wrong, and whatever a library raises over it, becomes a
`ModelError`: a sentence that names the file, and the field where it can. No weights are loaded. `errors`, `files` and
`folders` need the standard library alone.
"""
