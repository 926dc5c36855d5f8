"""A model that writes known texts: behind each of its tokens nothing but one other token is likely."""

import torch
from safetensors.torch import load_file, save_file
from tiny import llama_config, make_model
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

LIKELY = 30.0  # the logit of what follows; all others are 0


def make_scripted(folder, scripts, template=None, special=(), liked=()):
    """scripts: what a prompt ends with -> the pieces, each a token, that are written behind it. special: pieces that
    are special tokens. liked: (before, after, logit) beside what follows. Returns the row of every piece."""
    follows = [
        (a, b, LIKELY) for end, text in scripts.items() for a, b in zip([end, *text], [*text, "</s>"], strict=True)
    ]
    pieces = list(
        dict.fromkeys(["<s>", "</s>", "<unk>", *(piece for a, b, _ in [*follows, *liked] for piece in (a, b))])
    )
    rows = {piece: row for row, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(rows, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>", *special])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces[3:] if piece not in special])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = template
    size = -(-len(pieces) // 16) * 16
    make_model(folder, llama_config(len(pieces), layers=1, hidden=size), made)
    # The residual stream is the token itself: neither attention nor feed-forward adds to it.
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.fill_(1)
        elif "proj" in name or name == "lm_head.weight":
            tensor.zero_()
    tensors["model.embed_tokens.weight"] = torch.eye(len(pieces), size)
    for before, after, logit in [*follows, *liked]:
        tensors["lm_head.weight"][rows[after], rows[before]] = logit / size**0.5  # the norm's scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return rows
