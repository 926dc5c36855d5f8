"""A deliberately naive Merge Monster: the slow, obvious twin of modules/, against which it is tested.

Two whole models in memory, a whole-model copy per trial, one forward of one pair at a time, column by column merging
in Python. No packing, no cache, no streaming, nothing shared with modules/ but the Pair it is given.
"""

import copy
import itertools
import math
import re
import zlib
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D


@dataclass
class NaiveDecision:
    model: str
    layer: int | None
    method: str
    ratio: float | None
    before: float
    after: float


@dataclass
class NaiveMerge:
    """S1 to S9 as they are written down, on models given as folders."""

    base: str
    candidates: list
    pairs: list
    ratios: list
    methods: list
    strategy: str = "cumulative"
    threshold: float = 0.6
    headers: bool = True
    auto_weights: bool = False
    dtype: torch.dtype = torch.float32
    saved_dtype: torch.dtype | None = None
    device: str = "cpu"
    layers: list | None = None
    decisions: list = field(default_factory=list)

    def run(self):
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.model = load(self.base, self.dtype, self.device)
        self.weights = [-p.weight if p.kind == "GOOD" else p.weight for p in self.pairs]
        self.start = self.log_probabilities(self.model)
        if self.auto_weights:
            self.weights = [math.copysign(1 / math.exp(lp), w) for lp, w in zip(self.start, self.weights, strict=True)]
        self.current = self.start
        for folder in self.candidates:
            other = load(folder, self.dtype, self.device)
            for layer in range(self.model.config.num_hidden_layers) if self.layers is None else self.layers:
                for method in self.methods:
                    self.decide(folder, layer, method, lambda m, r, i=layer, k=method, o=other: self.mix(m, o, i, k, r))
            if self.headers:
                tokenizer = AutoTokenizer.from_pretrained(folder)
                self.decide(folder, None, "lerp", lambda m, r, o=other, t=tokenizer: self.mix_header(m, o, t, r))
            self.current = self.log_probabilities(self.model)
        return self

    def decide(self, folder, layer, method, mix):
        ratios = [0.25, 0.45, 0.65, 0.85] if method == "cyclic" else self.ratios
        # Nothing is remembered: the present state is scored again, as the original script does before every layer.
        self.current = self.log_probabilities(self.model)
        before = self.scores(self.current)
        best = None
        for ratio in ratios:
            trial = copy.deepcopy(self.model)
            mix(trial, ratio)
            log_probabilities = self.log_probabilities(trial)
            after = self.scores(log_probabilities)
            if any(math.isnan(s) or math.isinf(s) for s in after):
                continue
            improved = sum(new < old for new, old in zip(after, before, strict=True))
            if self.strategy == "cumulative":
                fits, rank = sum(after) < sum(before), (sum(after),)
            elif self.strategy == "all_phrases":
                fits = all(new <= old for new, old in zip(after, before, strict=True)) and improved > 0
                rank = (sum(after),)
            else:
                fits, rank = improved / len(after) >= self.threshold, (-improved, sum(after))
            if fits and (best is None or rank < best[0]):
                best = (rank, ratio, trial, log_probabilities)
        if best is None:
            self.decisions.append(NaiveDecision(folder, layer, method, None, sum(before), sum(before)))
            return
        _, ratio, self.model, self.current = best
        self.decisions.append(NaiveDecision(folder, layer, method, ratio, sum(before), sum(self.scores(self.current))))

    def scores(self, log_probabilities):
        return [
            math.exp(lp) * w if lp == lp else math.nan for lp, w in zip(log_probabilities, self.weights, strict=True)
        ]

    def log_probabilities(self, model):
        return [pair_log_probability(model, self.tokenizer, pair) for pair in self.pairs]

    def mix(self, model, other, layer, method, ratio):
        ours, theirs = decoder_layers(model)[layer], decoder_layers(other)[layer]
        input_first = {f"{n}.weight" for n, m in ours.named_modules() if isinstance(m, Conv1D)}
        state, other_state = ours.state_dict(), theirs.state_dict()
        prefix = next(path for path, module in model.named_modules() if module is ours)
        for name, a in state.items():
            b = other_state[name]
            if not a.is_floating_point():
                continue
            turn = (lambda tensor: tensor.T) if name in input_first else (lambda tensor: tensor)
            merged = turn(naive_merge(method, turn(a), turn(b), ratio, f"{prefix}.{name}"))
            a.copy_(self.rounded(merged))

    def mix_header(self, model, other, other_tokenizer, ratio):
        tensors = [(model.get_input_embeddings().weight, other.get_input_embeddings().weight)]
        head = model.get_output_embeddings()
        if head.weight is not model.get_input_embeddings().weight:
            tensors.append((head.weight, other.get_output_embeddings().weight))
        if head.bias is not None:
            tensors.append((head.bias, other.get_output_embeddings().bias))
        rows, other_rows = min(len(a) for a, _ in tensors), min(len(b) for _, b in tensors)
        # Tokens without a row might as well not be there.
        ours = {token: row for token, row in self.tokenizer.get_vocab().items() if row < rows}
        theirs = {token: row for token, row in other_tokenizer.get_vocab().items() if row < other_rows}
        source = {}
        for token, row in ours.items():
            if token in theirs:
                source[row] = theirs[token]
            # A token that plays both parts is taken for the one that ends a text.
            elif token == self.tokenizer.eos_token and other_tokenizer.eos_token in theirs:
                source[row] = theirs[other_tokenizer.eos_token]
            elif token == self.tokenizer.bos_token and other_tokenizer.bos_token in theirs:
                source[row] = theirs[other_tokenizer.bos_token]
        if len(source) < 0.9 * len(ours):
            return
        for a, b in tensors:
            for row, other_row in source.items():
                a.data[row] = self.rounded(naive_merge("lerp", a.data[row], b.data[other_row], ratio))

    def rounded(self, tensor):
        return tensor.to(self.saved_dtype or self.dtype).to(self.dtype)


def load(folder, dtype, device="cpu"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False).to(device)


def decoder_layers(model):
    body = getattr(model, model.base_model_prefix)
    body = getattr(body, "decoder", body)  # OPT
    return next(getattr(body, name) for name in ("layers", "h", "blocks") if hasattr(body, name))


def pair_log_probability(model, tokenizer, pair):
    """A pair; of one whose phrase has variants, that any of them follows."""
    if not pair.variants:
        return log_probability(model, tokenizer, pair.context, pair.phrase)
    tokens = {text: naive_encode(tokenizer, pair.context, text)[0] for text in pair.variants}
    whole = [
        text
        for text in tokens
        if not any(tokens[text][: len(tokens[other])] == tokens[other] for other in tokens if other != text)
    ]
    return math.log(sum(math.exp(log_probability(model, tokenizer, pair.context, text)) for text in whole))


@torch.no_grad()
def any_of(model, given, texts):
    """How probable it is that one of several texts follows: every sequence of tokens is gone through that is as long as
    the longest, and those that begin with a text are asked for."""
    longest, total = max(map(len, texts)), 0.0
    for tokens in itertools.product(range(model.config.vocab_size), repeat=longest):
        if any(tokens[: len(text)] == text for text in texts):
            table = said(model, [*given, *tokens])
            total += math.exp(sum(table[len(given) - 1 + i, token].item() for i, token in enumerate(tokens)))
    return total


@torch.no_grad()
def log_probability(model, tokenizer, context, phrase):
    """One pair, one forward, a plain log-softmax."""
    tokens, start = naive_encode(tokenizer, context, phrase)
    logits = model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0].float()
    table = torch.log_softmax(logits.double(), dim=-1)
    return sum(table[i - 1, tokens[i]].item() for i in range(start, len(tokens)))


def naive_encode(tokenizer, context, phrase):
    """The phrase's tokens are those that end beyond the context, trailing spaces not counted."""
    encoding = tokenizer(context + phrase, return_offsets_mapping=True)
    tokens, ends = encoding["input_ids"], [end for _, end in encoding["offset_mapping"]]
    start = next(i for i, end in enumerate(ends) if end > len(context.rstrip(" ")))
    if start == 0:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [first, *tokens], 1
    return tokens, start


# Every method as one text, with all of its parameters.
METHOD_TEXTS = ["lerp", "slerp", "slice", "cyclic", "gradient", "ties(density=0.3)", "dare(density=0.6, seed=7)"]


def naive_merge(method, a, b, t, tensor=""):
    """One tensor, in float64, column by column, or number by number. tensor: its name in the model."""
    kind, text = a.dtype, method
    method = text.partition("(")[0]
    given = dict(re.findall(r"(\w+)=([\d.]+)", text))
    if method == "dare":
        density = float(given["density"])
        generator = torch.Generator().manual_seed(zlib.crc32(tensor.encode(), int(given["seed"])))
        kept = (torch.rand(a.shape, generator=generator) < density).flatten().tolist()
        pairs = zip(a.double().flatten().tolist(), b.double().flatten().tolist(), kept, strict=True)
        merged = [x + t * (y - x) / density if keep else x for x, y, keep in pairs]
        return torch.tensor(merged, dtype=torch.float64).reshape(a.shape).to(kind)
    if method == "ties" and a.dim() < 3:
        differences = (b.float() - a.float()).flatten().tolist()  # equal sizes are equal in float32
        count = max(1, int(float(given["density"]) * len(differences)))
        smallest = sorted(map(abs, differences), reverse=True)[count - 1]
        merged = [x + t * d * (abs(d) >= smallest) for x, d in zip(a.flatten().tolist(), differences, strict=True)]
        return torch.tensor(merged, dtype=torch.float64).reshape(a.shape).to(kind)
    a, b = a.double(), b.double()
    if a.dim() == 3:
        return torch.stack([naive_merge(text, x, y, t) for x, y in zip(a, b, strict=True)]).to(kind)
    if method == "lerp" or (method == "slerp" and a.dim() == 1):
        return ((1 - t) * a + t * b).to(kind)
    if method == "slerp":
        dot = ((a / a.norm()) * (b / b.norm())).sum().item()
        if abs(dot) > 0.9995:
            return ((1 - t) * a + t * b).to(kind)
        angle = math.acos(dot)
        return ((math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)).to(kind)
    if a.dim() == 1:
        return a.to(kind)
    result = a.clone()
    for column, share in enumerate(naive_weights(method, a.shape[1], t)):
        result[:, column] = (1 - share) * a[:, column] + share * b[:, column]
    return result.to(kind)


def naive_weights(method, width, t):
    """The other model's share of each column, written as the description is: piece by piece."""
    c, e = int(width * (1 - t)), int(0.05 * width)
    if method == "gradient":
        return [0.9 * j / c if j < c else 0.9 * (width - 1 - j) / (width - c) for j in range(width)]
    shares = {}
    for j in range(-2 * width, c - e):
        shares[j] = 0.0
    for i in range(2 * e):
        shares[c - e + i] = i / (2 * e)
    if method == "slice":
        for j in range(c + e, 3 * width):
            shares[j] = 1.0
    else:
        band = int(0.10 * width)
        for j in range(c + e, c + e + band):
            shares[j] = 1.0
        for i in range(2 * e):
            shares[c + e + band + i] = 1 - i / (2 * e)
        for j in range(c + 3 * e + band, 3 * width):
            shares[j] = 0.0
    return [shares[j] for j in range(width)]


@dataclass
class NaiveBranch:
    tokens: list
    probabilities: list
    extension: list

    @property
    def joint(self):
        return math.prod(self.probabilities)


@dataclass
class NaiveMapper:
    """The mapper as it is written down: one whole forward for every node and every token of a continuation."""

    model: object
    tokenizer: object
    prob_min: float
    top_k: int
    max_depth: int
    additional_length: int
    ends: tuple = ()
    answers: dict = field(default_factory=dict)  # what the model has said already, by path; None to ask each time
    max_branches: int | None = None
    min_joint: float = 0.0

    def branches(self, context):
        given = context.rstrip(" ")
        root = self.tokenizer(given)["input_ids"] if given else []
        if not root:
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            root = [bos if bos is not None else eos]
        found = self.grow(root, [], [], context[len(given) :])
        return sorted(found, key=lambda branch: (-branch.joint, branch.tokens))[: self.max_branches]

    def grow(self, root, tokens, probabilities, spaces):
        if tokens and tokens[-1] in self.ends:
            return [NaiveBranch(tokens, probabilities, [])]
        children = []
        if len(tokens) < self.max_depth:
            likeliest = self.likeliest(root + tokens, spaces)[: self.top_k]
            probable = [(token, p) for token, p in likeliest if p * 100 >= self.prob_min]
            joint = math.prod(probabilities)
            children = [(token, p) for token, p in probable if joint * p * 100 >= self.min_joint]
        if not children:
            return [NaiveBranch(tokens, probabilities, self.continuation(root + tokens, spaces))]
        return [
            branch
            for token, p in children
            for branch in self.grow(root, [*tokens, token], [*probabilities, p], self.left(spaces, token))
        ]

    def continuation(self, path, spaces):
        extension = []
        while len(extension) < self.additional_length and not (extension and extension[-1] in self.ends):
            likeliest = self.likeliest(path + extension, spaces)
            if not likeliest:
                break
            extension.append(likeliest[0][0])
            spaces = self.left(spaces, extension[-1])
        return extension

    @torch.no_grad()
    def likeliest(self, path, spaces):
        """All tokens that may come next, the likeliest first."""
        if len(path) > getattr(self.model.config, "max_position_embeddings", math.inf):
            return []
        if self.answers is None or tuple(path) not in self.answers:
            logits = self.model(torch.tensor([path]), use_cache=False).logits[0, -1]
            values, tokens = logits.double().softmax(-1).sort(descending=True, stable=True)  # of equals the lower id
            answer = list(zip(tokens.tolist(), values.tolist(), strict=True))
            if self.answers is None:
                return self.allowed(answer, spaces)
            self.answers[tuple(path)] = answer
        return self.allowed(self.answers[tuple(path)], spaces)

    def allowed(self, answer, spaces):
        return [(token, p) for token, p in answer if self.may_come(spaces, token)] if spaces else answer

    def may_come(self, spaces, token):
        text = self.text(token)
        return text != "" and (text.startswith(spaces) or spaces.startswith(text))

    def left(self, spaces, token):
        return spaces[len(self.text(token)) :] if spaces else ""

    def text(self, token):
        """What a token spells behind another one."""
        first = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return self.tokenizer.decode([*first, token], skip_special_tokens=True)[1:]


def mixed(base, others, shares, outside=True):
    """W(a) = B + sum of a_j (C_j - B), parameter by parameter, of whole plain models; shares: (rows, candidates)."""
    row = {id(t): i for i, layer in enumerate(decoder_layers(base)) for t in layer.state_dict(keep_vars=True).values()}
    theirs, found = [other.state_dict() for other in others], {}
    for name, own in [*base.named_parameters(), *base.named_buffers()]:
        number = row.get(id(own), -1)
        if not own.is_floating_point() or name not in theirs[0] or (number < 0 and not outside):
            continue
        found[name] = own.detach() + sum(
            shares[number, j] * (their[name] - own.detach()) for j, their in enumerate(theirs)
        )
    return found


def said(model, tokens, weights=None):
    """Log-probabilities of all tokens at every position of one text: (T, V)."""
    arguments = {"input_ids": torch.tensor([tokens]), "use_cache": False}
    return torch.func.functional_call(model, weights or {}, (), arguments).logits[0].double().log_softmax(-1)


def objective(base, said_now, items, weights, windows, drift_weight):
    """Total, divergence from the base and their weighted sum, one text at a time.

    said_now: tokens -> (T, V). items: (tokens, first token of the phrase) of each pair.
    """
    total, divergence = 0, torch.zeros((), dtype=torch.float64)
    for (tokens, start), weight in zip(items, weights, strict=True):
        table = said_now(tokens)
        total = total + weight * sum(table[i - 1, tokens[i]] for i in range(start, len(tokens))).exp()
    for window in windows:
        with torch.no_grad():
            old = said(base, window)
        divergence = divergence + (old.exp() * (old - said_now(window))).sum()
    divergence = divergence / max(1, sum(map(len, windows)))
    return total, divergence, total + drift_weight * divergence


def joint_gradient(base, others, shares, outside, *measured):
    """Total and divergence of a mix, and the objective's derivative by every share, through the whole model.

    measured: as of `objective`.
    """
    shares = torch.tensor(shares, dtype=torch.float64, requires_grad=True)
    weights = mixed(base, others, shares, outside)
    total, divergence, sum_of_both = objective(base, lambda tokens: said(base, tokens, weights), *measured)
    (gradient,) = torch.autograd.grad(sum_of_both, shares)
    return float(total), float(divergence), gradient.tolist()


def plain_drift(base, other, windows, compared=None):
    """Divergence, agreement and perplexity of the other, from whole logits, position by position.

    compared: for each window, of every position whether it is looked at; None: all are.
    """
    divergences, equal, said = [], [], []
    for number, window in enumerate(windows):
        ids = torch.tensor([window])
        with torch.no_grad():
            old, new = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (base, other))
        for place in range(len(window)):
            if compared is not None and not compared[number][place]:
                continue
            divergences.append(float((old[place].exp() * (old[place] - new[place])).sum()))
            equal.append(int(old[place].argmax()) == int(new[place].argmax()))
            if place + 1 < len(window):
                said.append(float(new[place, window[place + 1]]))
    count = len(divergences)
    return sum(divergences) / count, sum(equal) / count, math.exp(-sum(said) / len(said))


def naive_phrases(texts, never_first, never_last, least):
    """Every phrase that may be a finding, and the (text, first word) of all its places, looked for anew for each.

    texts: of each the words of its prompt that do not belong to the language, and its own words; "," and "." are words.
    """
    return {
        phrase: places
        for phrase in sorted({words[i : i + n] for _, words in texts for i in range(len(words)) for n in range(1, 6)})
        if (places := [(t, i) for t, text in enumerate(texts) for i in naive_finds(phrase, *text, never_first)])
        and phrase[-1] not in never_last
        and not {",", "."} & set(phrase)
        and len({texts[t][0] for t, _ in places}) >= least
    }


def naive_finds(phrase, prompt, words, never_first):
    """Where in the words the phrase is, if the prompt has none of its words."""
    if not any(word in prompt for word in phrase if word not in never_first):
        for i in range(len(words)):
            if words[i : i + len(phrase)] == phrase and (phrase[0] not in never_first or naive_opens(words, i)):
                yield i


def naive_opens(words, i):
    """Whether no word is before this one, or a full stop between them."""
    while i and words[i - 1] == ",":
        i -= 1
    return i == 0 or words[i - 1] == "."
