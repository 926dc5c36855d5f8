"""Training of a small Llama that comes to the same bits on every machine.

Knows: the forward, backward and optimizer of the demo's models. Refuses to know: what they are taught.

Ordinary training differs in its last bits between processors, numbers of threads and libraries: a sum of floating point
numbers depends on the order in which they are added. Here

- whatever is summed is rounded to whole numbers first, so small that float64 holds every sum of their products exactly,
  in any order;
- exponentials are looked up in a table;
- all else is single additions, multiplications, divisions and square roots, which IEEE 754 settles to the last bit.

Weights and results are float32. The weights of the norms are not trained: they stay 1.
"""

import functools
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from transformers import LlamaForCausalLM

BITS = 20  # of a whole number; two multiplied have 40, and a sum of up to 8192 products the 53 that float64 holds
TABLE_BITS = 16  # of exponentials, sines and cosines: libraries differ far behind these
TABLE_STEP = 1 / 256  # between the scores whose exponentials are in the table
TABLE_LENGTH = 4096
HIDDEN = -1e4  # a score whose exponential is 0
LONGEST = 256  # tokens of a text
BETAS = (0.9, 0.95)

_EXPONENTIALS = torch.tensor(
    [round(math.exp(-index * TABLE_STEP) * 2**TABLE_BITS) / 2**TABLE_BITS for index in range(TABLE_LENGTH)] + [0.0]
)


def whole_numbers(values: Tensor) -> tuple[Tensor, float]:
    """Values in float64 as multiples of a power of two, of BITS bits at most; and that power."""
    low, high = values.aminmax()
    largest = max(-low.item(), high.item())
    unit = 2.0 ** (math.frexp(largest)[1] - BITS) if largest else 1.0
    return (values * (1 / unit)).round_().double(), unit


def product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices, or of two stacks of them."""
    left_numbers, left_unit = whole_numbers(left)
    right_numbers, right_unit = whole_numbers(right)
    return (left_numbers @ right_numbers).float().mul_(left_unit * right_unit)


def row_sums(values: Tensor) -> Tensor:
    """Sums over the last dimension, which is kept."""
    numbers, unit = whole_numbers(values)
    return numbers.sum(-1, keepdim=True).float().mul_(unit)


def square_root(values: Tensor) -> Tensor:
    """By way of float64: some libraries miss the last bit of a root in float32."""
    return values.double().sqrt().float()


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; scores are rounded to TABLE_STEP, and from 16 below the largest on there is 0."""
    steps_below = (scores.amax(-1, keepdim=True) - scores) * (1 / TABLE_STEP)
    index = steps_below.round_().clamp_(max=TABLE_LENGTH).int()
    exponentials = _EXPONENTIALS.index_select(0, index.flatten()).view_as(scores)
    return exponentials / row_sums(exponentials)


class Linear(Function):
    """Rows (tokens, inputs) through a weight (outputs, inputs)."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weight: Tensor) -> Tensor:
        """Rows (tokens, outputs)."""
        ctx.save_for_backward(rows, weight)
        return product(rows, weight.T)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows and weight."""
        rows, weight = ctx.saved_tensors
        return product(gradient, weight), product(gradient.T, rows)


class Embedding(Function):
    """The rows of a table (vocabulary, width) that token ids (tokens) name."""

    @staticmethod
    def forward(ctx: FunctionCtx, table: Tensor, ids: Tensor) -> Tensor:
        """Rows (tokens, width)."""
        ctx.save_for_backward(table, ids)
        return table[ids]

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        """Of the table."""
        table, ids = ctx.saved_tensors
        numbers, unit = whole_numbers(gradient)
        sums = torch.zeros(table.shape, dtype=torch.float64).index_add_(0, ids, numbers)
        return sums.float().mul_(unit), None


class Norm(Function):
    """RMS norm of rows (tokens, width), without weights."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, epsilon: float) -> Tensor:
        """Rows whose squares are 1 on average."""
        scale = 1 / square_root(row_sums(rows * rows) / rows.shape[-1] + epsilon)
        normed = rows * scale
        ctx.save_for_backward(normed, scale)
        return normed

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        """Of the rows."""
        normed, scale = ctx.saved_tensors
        along = row_sums(gradient * normed) / normed.shape[-1]
        return (gradient - normed * along) * scale, None


class Attention(Function):
    """Causal attention of queries, keys and values, each (tokens, heads, width): the tokens of all texts in a row.

    is_token (texts, longest) says where a text has one.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, queries: Tensor, keys: Tensor, values: Tensor, is_token: Tensor) -> Tensor:
        """(tokens, heads, width)."""
        queries, keys, values = (by_text(rows, is_token) for rows in (queries, keys, values))
        later = torch.ones(is_token.shape[1], is_token.shape[1], dtype=torch.bool).triu_(1)
        scores = product(queries, keys.mT) * (1 / math.sqrt(queries.shape[-1]))
        shares = softmax(scores.masked_fill_(later, HIDDEN))
        result = product(shares, values)
        ctx.save_for_backward(queries, keys, values, shares, result, is_token)
        return in_a_row(result, is_token)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Of queries, keys and values."""
        queries, keys, values, shares, result, is_token = ctx.saved_tensors
        gradient = by_text(gradient, is_token)
        # The sum over keys of share times its gradient is that over the width of result times its gradient.
        of_scores = (product(gradient, values.mT) - row_sums(gradient * result)) * shares
        of_scores *= 1 / math.sqrt(queries.shape[-1])
        gradients = (product(of_scores, keys), product(of_scores.mT, queries), product(shares.mT, gradient))
        of_queries, of_keys, of_values = (in_a_row(stack, is_token) for stack in gradients)
        return of_queries, of_keys, of_values, None


def by_text(rows: Tensor, is_token: Tensor) -> Tensor:
    """(tokens, heads, width) as (texts, heads, longest, width), with zeros behind the shorter texts."""
    padded = rows.new_zeros(*is_token.shape, *rows.shape[1:])
    padded[is_token] = rows
    return padded.transpose(1, 2)


def in_a_row(stack: Tensor, is_token: Tensor) -> Tensor:
    """The inverse of `by_text`."""
    return stack.transpose(1, 2)[is_token]


class CrossEntropy(Function):
    """How improbable targets (tokens) are by scores (tokens, vocabulary): the mean, in nats."""

    @staticmethod
    def forward(ctx: FunctionCtx, scores: Tensor, targets: Tensor) -> Tensor:
        """A loss to be shown: its last bits are not settled, and no gradient depends on them."""
        shares = softmax(scores)
        ctx.save_for_backward(shares, targets)
        return -shares[torch.arange(len(targets)), targets].clamp(min=1e-6).log().mean()

    @staticmethod
    def backward(ctx: FunctionCtx, _gradient: Tensor) -> tuple[Tensor, None]:
        """Of the scores; nothing is computed from the loss, whose own gradient is 1."""
        shares, targets = ctx.saved_tensors
        gradient = shares / len(targets)
        gradient[torch.arange(len(targets)), targets] -= 1 / len(targets)
        return gradient, None


@functools.cache
def rotations(width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, each (LONGEST, 1, width)."""
    speeds = [base ** (-2 * index / width) for index in range(width // 2)] * 2
    angles = [position * speed for position in range(LONGEST) for speed in speeds]
    cosines = torch.tensor([round(math.cos(angle) * 2**TABLE_BITS) / 2**TABLE_BITS for angle in angles])
    sines = torch.tensor([round(math.sin(angle) * 2**TABLE_BITS) / 2**TABLE_BITS for angle in angles])
    return cosines.view(LONGEST, 1, width), sines.view(LONGEST, 1, width)


def rotated(rows: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """(tokens, heads, width), rotated by the angles of each token's position."""
    first, second = rows.chunk(2, dim=-1)
    return rows * cosines + torch.cat((-second, first), dim=-1) * sines


def loss_of(model: LlamaForCausalLM, texts: Sequence[Sequence[int]]) -> Tensor:
    """The mean loss over all tokens of the texts but the first of each, as transformers' forward computes it.

    The model has ReLU, as many heads of keys as of queries, and no biases; of its weights' gradients, the norms' are
    missing.
    """
    config = model.config
    lengths = torch.tensor([len(text) - 1 for text in texts])
    is_token = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.tensor([token for text in texts for token in text[:-1]])
    targets = torch.tensor([token for text in texts for token in text[1:]])
    positions = is_token.nonzero()[:, 1]
    cosines, sines = (table[positions] for table in rotations(config.head_dim, config.rope_parameters["rope_theta"]))

    hidden = Embedding.apply(model.model.embed_tokens.weight, ids)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        normed = Norm.apply(hidden, config.rms_norm_eps)
        queries, keys, values = (
            Linear.apply(normed, projection.weight).view(len(ids), -1, config.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries, keys = rotated(queries, cosines, sines), rotated(keys, cosines, sines)
        attended = Attention.apply(queries, keys, values, is_token)
        hidden = hidden + Linear.apply(attended.flatten(1), attention.o_proj.weight)
        normed = Norm.apply(hidden, config.rms_norm_eps)
        gate, up = Linear.apply(normed, mlp.gate_proj.weight), Linear.apply(normed, mlp.up_proj.weight)
        hidden = hidden + Linear.apply(gate.relu() * up, mlp.down_proj.weight)
    scores = Linear.apply(Norm.apply(hidden, config.rms_norm_eps), model.lm_head.weight)
    return CrossEntropy.apply(scores, targets)


class Adam:
    """Adam (Kingma and Ba, 2015) without weight decay, for all matrices of a model."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        """Begin with no moments."""
        self._weights = [weight for weight in model.parameters() if weight.dim() == 2]
        self._means = [torch.zeros_like(weight) for weight in self._weights]
        self._squares = [torch.zeros_like(weight) for weight in self._weights]
        self._powers = [1.0, 1.0]  # of BETAS; a power function may differ in its last bit

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every weight by its gradient, at a learning rate, and forget the gradients."""
        first, second = BETAS
        self._powers = [self._powers[0] * first, self._powers[1] * second]
        for weight, mean, square in zip(self._weights, self._means, self._squares, strict=True):
            mean.mul_(first).add_(weight.grad * (1 - first))
            square.mul_(second).add_(weight.grad * weight.grad * (1 - second))
            spread = square_root(square / (1 - self._powers[1])) + 1e-8
            weight.sub_(mean / (1 - self._powers[0]) / spread * rate)
            weight.grad = None


@torch.no_grad()
def begin(model: LlamaForCausalLM, rng: random.Random) -> None:
    """Draw the matrices of a model anew, evenly between two bounds, with the spread that its configuration names."""
    bound = math.sqrt(3) * model.config.initializer_range
    for weight in model.parameters():
        if weight.dim() == 2:
            drawn = [(2 * rng.random() - 1) * bound for _ in range(weight.numel())]
            weight.copy_(torch.tensor(drawn).view_as(weight))
