"""What a micro-batch makes and drops again: the tensors a layer keeps for its backward pass, and its peak there.

Every formula follows the order of operations of the family's model in transformers, as trained here, and was
read off a trace of every tensor: `tests/live_bytes.py` counts them on any machine, and a test holds the two
together. Sizes of one token are multiplied by the tokens of a micro-batch; attention that holds scores or a
mask grows with the square of the row.

Names: h hidden size, q width of all query heads, k of all key heads, i inner width, w bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.engine import fused
from qlora_tui.engine.models import Linear, ModelSpec
from qlora_tui.engine.onebyte import turned_bytes
from qlora_tui.engine.sizes import widened_bytes
from qlora_tui.engine.spec import RunConfig

_QKV, _UP = ("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj")


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one run: `rows` of `length` tokens, computed in numbers of `width` bytes."""

    model: ModelSpec
    run: RunConfig
    width: int
    rows: int
    length: int
    cuda: bool
    kernels: bool = False  # ours, which compute in 16 bits
    fuses: bool = False  # layers too, where their family has a form for it
    narrow: str = ""  # what gradients of inputs are multiplied in, if not in 16 bits

    @property
    def tokens(self) -> int:
        """Tokens of all rows, padding included."""
        return self.rows * self.length

    @property
    def fused(self) -> bool:
        """Whether layers are a few fused operations; else they are transformers' own."""
        return fused.fused_layers(self.model, self.run, self.fuses)

    @property
    def hidden(self) -> int:
        """Bytes of one hidden state of every token: what passes from layer to layer."""
        return self.tokens * self.model.hidden_size * self.width

    @property
    def scores(self) -> int:
        """Scores of one layer's attention, if it holds them."""
        return self.tokens * self.length * self.model.num_attention_heads if self.run.attn_implementation == "eager" else 0


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that a piece of work holds at once: in tensors, and inside kernels, where no trace sees it."""

    tensors: int
    kernels: int = 0

    @property
    def bytes(self) -> int:
        """Both together."""
        return self.tensors + self.kernels


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: what it keeps, and the most that its backward pass adds to that; less where it was computed `again`."""

    kept: int
    backward: Peak
    again: Peak
    shared: int  # of what it keeps, its input, which a checkpointed layer keeps anyway
    first: int  # what the first layer keeps less: the embeddings before it need no gradient


@dataclass(frozen=True, slots=True)
class Stack:
    """All layers of a model. `masked` are those that transformers gives a mask, since they see only a window of the row."""

    number: int
    plain: Layer
    masked: Layer
    every: int  # one in so many layers sees the whole row; 0: each of them does, 1 is never used

    def at(self, index: int) -> Layer:
        """Return layer `index`."""
        return self.masked if self.every and (index + 1) % self.every else self.plain

    def kept(self, first: int) -> int:
        """Return what layers `first` and up keep for their backward passes."""
        plain = self.number - first
        if self.every:
            plain = self.number // self.every - first // self.every
        return plain * self.plain.kept + (self.number - first - plain) * self.masked.kept - (0 if first else self.at(0).first)


def stack(batch: Batch) -> Stack:
    """Return the layers of the batch's model; a row shorter than the window needs no mask."""
    model, plain = batch.model, _layer(batch, masked=False)
    if not windowed(batch):
        return Stack(model.num_hidden_layers, plain, plain, 0)
    return Stack(model.num_hidden_layers, plain, _layer(batch, masked=True), model.whole_every or model.num_hidden_layers + 1)


def _layer(batch: Batch, *, masked: bool) -> Layer:
    parts = _Parts(batch, masked)
    if batch.fused:
        form = _fused(batch, parts)
        kept, again = (max((Peak(*stage) for stage in stages), key=lambda stage: stage.bytes) for stages in (form.backward(), form.again()))
        return Layer(form.attention() + form.mlp(), kept, again, batch.hidden, form.before_gradients())
    shared = batch.hidden if batch.width == 4 or (_post_norm(batch.model) and parts.source) else 0
    kept, again = (max(stages, key=lambda stage: stage.bytes) for stages in (parts.stages(), parts.stages_again()))
    return Layer(parts.kept, kept, again, shared, parts.before_gradients())


def _fused(batch: Batch, parts: _Parts) -> fused.FusedLayer:
    scores = batch.tokens * batch.model.num_attention_heads * 4
    scores += batch.rows * batch.length**2 * batch.width if parts.masked else 0
    return fused.FusedLayer(batch.model, batch.run, batch.tokens, batch.width, parts.repeated, scores, parts._kernel(), batch.narrow)


def final_norm(batch: Batch) -> int:
    """Return what the norm after the last layer keeps."""
    if batch.fused:
        return batch.hidden
    return _norm(batch, batch.model.hidden_size, 1)


def norm_backward(batch: Batch) -> int:
    """Return what the backward pass of a norm over the hidden size holds beyond what was kept and what it is given."""
    if batch.fused:
        return batch.hidden
    return batch.tokens * (16 * batch.model.hidden_size + (batch.model.hidden_size * batch.width if batch.width < 4 else 0))


def mask_bytes(batch: Batch) -> int:
    """Return the masks that transformers makes once for all layers."""
    square = batch.length**2
    if batch.run.attn_implementation == "eager":
        kinds = 2 if batch.model.whole_every else 1
        return kinds * batch.rows * square * batch.width
    return square if windowed(batch) else 0


def windowed(batch: Batch) -> bool:
    """Say whether some layers see less than the whole row, and are given a mask for it; the flash kernel of fused layers needs none."""
    if batch.fused and batch.cuda and fused.has_flash(batch.model):
        return False
    return batch.model.sliding_window is not None and batch.length >= batch.model.sliding_window


def forward_peak(batch: Batch) -> Peak:
    """Return the most that one layer holds at once when nothing is kept for a backward pass.

    Four hidden states are there all along: the embeddings, the layer's input, what is added later, and the norm's output.
    """
    if batch.fused:
        return Peak(_fused(batch, _Parts(batch, windowed(batch))).forward())
    model, run, width, tokens = batch.model, batch.run, batch.width, batch.tokens
    inner, query = tokens * model.intermediate_size * width, tokens * model.query_size * width
    widened = max(_widened(batch, part) for part in model.linears())
    wide = 2 * inner + widened  # one half of the pair, and the other as it is made
    if run.use_dora:
        wide = max(wide, 2 * inner + tokens * model.intermediate_size * 4)
    product = (4 if model.fused else 3) * inner
    norm = tokens * 8 * model.hidden_size
    attention = 4 * query
    if run.attn_implementation == "eager":
        attention += batch.scores * (width + 8 if width < 4 and not batch.cuda else 8)
    elif windowed(batch):
        attention += batch.rows * batch.length**2 * width
    return Peak(4 * batch.hidden + max(wide, product, norm, attention))


class _Parts:
    """What one layer keeps, part by part, so that each stage of its backward pass knows what is still there."""

    def __init__(self, batch: Batch, masked: bool) -> None:
        model, run, width, tokens = batch.model, batch.run, batch.width, batch.tokens
        self.batch, self.masked = batch, masked
        self.eager = run.attn_implementation == "eager"
        self.targets = {part.name: part for part in model.targeted(run.lora_target_modules)}
        self.hidden = batch.hidden
        self.inner = tokens * model.intermediate_size * width
        self.query, self.keys = tokens * model.query_size * width, tokens * model.key_value_size * width
        repeated = self.eager or masked or model.head_dim > 256
        self.repeated = self.query if repeated else self.keys
        self.norm = _norm(batch, model.hidden_size, 1)
        self.source, self.up_source, self.product = self._inputs(*_QKV), self._inputs(*_UP), self._inputs("down_proj")
        self.low = tokens * width * run.lora_r * len(self.targets)
        self.lengths = self._lengths(*self.targets) + 8 * sum(part.outputs for part in self.targets.values()) * run.use_dora
        self.attention = self._attention()
        self.kept = (
            model.norms_per_layer * self.norm
            + _qk_norm(batch)
            + self.source
            + self.attention
            + self.up_source
            + 3 * self.inner
            + self.product
            + self.low
            + self.lengths
        )

    def before_gradients(self) -> int:
        """Return what the first layer does not keep: up to its first adapted module nothing needs a gradient."""
        model = self.batch.model
        masks = self._masks(*_QKV)
        if _post_norm(model):
            return masks
        if self.source:
            return self.norm + masks
        early = self.norm + _qk_norm(self.batch) + self.attention - self._inputs("o_proj")
        if "o_proj" in self.targets:
            return early
        early += (model.norms_per_layer // 2) * self.norm
        return early if self.up_source else early + 3 * self.inner

    def _masks(self, *names: str) -> int:
        """Return the masks of dropout before adapted modules: a byte a number on CUDA, else a number each."""
        if not self.batch.run.lora_dropout:
            return 0
        inputs = sum(self.targets[name].inputs for name in names if name in self.targets)
        return self.batch.tokens * inputs * (1 if self.batch.cuda else self.batch.width)

    def _inputs(self, *names: str) -> int:
        """Return the inputs that adapted modules keep: one for all that share it, or with dropout one each, and its mask."""
        found = [self.targets[name].inputs for name in names if name in self.targets]
        if not self.batch.run.lora_dropout:
            return self.batch.tokens * self.batch.width * max(found, default=0)
        return self.batch.tokens * self.batch.width * sum(found) + self._masks(*names)

    def _lengths(self, *names: str) -> int:
        """Return the outputs that DoRA keeps to learn their lengths."""
        outputs = sum(self.targets[name].outputs for name in names if name in self.targets)
        return self.batch.tokens * self.batch.width * outputs if self.batch.run.use_dora else 0

    def _attention(self) -> int:
        batch, model = self.batch, self.batch.model
        kept = self.query + 2 * self.repeated + self._output()
        if model.family == "ministral3":  # queries are scaled by their place
            kept += batch.length * batch.width
        if model.fused and self.repeated == self.keys:  # the values are a view of one tensor that holds all three
            kept += self.query + self.keys
        if self.eager:
            return kept + batch.scores * self._score_bytes()
        bias = batch.rows * batch.length**2 * batch.width if self.masked else 0
        return kept + batch.tokens * model.num_attention_heads * 4 + bias

    def _output(self) -> int:
        """Return attention's output: kept by a fused kernel itself, else by the module after it; a fused family copies it."""
        after = self._inputs("o_proj")
        if self.eager:
            return after
        copied = self.batch.model.fused or self.batch.run.lora_dropout > 0
        return self.query + (after if copied else 0)

    def _score_bytes(self) -> int:
        """Return what is kept of one score: the softmax in 32 bits and as it is multiplied; squashed scores too."""
        width = self.batch.width
        return (4 + width if width < 4 else 4) + (0 if self.batch.model.sdpa else width)

    def stages(self) -> tuple[Peak, ...]:
        """Return what each stage of the backward pass holds beyond `kept`, in its order."""
        scaled = (self._scaled_down(), self._scaled_up()) if self.batch.run.use_dora else ()
        return (self._last_norm(), self._down(), self._gate(), self._up(), self._second_norm(), self._in_attention(), *scaled)

    def stages_again(self) -> tuple[Peak, ...]:
        """Return the same for a layer that was computed again: a tensor that was kept goes as soon as it was read."""
        first, down, *rest = self.stages()
        read = self.inner if self.product else 0
        return (self._replayed(), first, Peak(down.tensors - read), *rest)

    def _replayed(self) -> Peak:
        """The layer was computed again up to its last output: that, what it is added to, and the gradient that waits for both."""
        batch = self.batch
        part = next(part for part in batch.model.linears() if part.name == "down_proj")
        beside = 3 * self.hidden + _widened(batch, part)
        if part.name in self.targets and batch.width < 4:
            beside += batch.run.lora_r * (part.inputs + part.outputs) * batch.width
        if batch.run.lora_dropout:  # inputs from before it are named until their module is done
            beside += (self.inner if self.product else 0) + (self.hidden if self.up_source else 0)
        return Peak(beside)

    def _last_norm(self) -> Peak:
        late = self.batch.model.norms_per_layer > 2 or _post_norm(self.batch.model)
        return Peak(2 * self.hidden + norm_backward(self.batch) if late else 0)

    def _down(self) -> Peak:
        """The gradient of the inner product appears beside everything kept, and the widest weight in full width."""
        batch = self.batch
        part = next(part for part in batch.model.linears() if part.name == "down_proj")
        beside = _turned(batch, part)
        if batch.run.lora_dropout and self.product:  # the gradient goes two ways, through the base and through what was dropped
            beside = max(beside, self.inner)
        return Peak(self.hidden + self.inner + beside + self._gradients(part.name))

    def _gate(self) -> Peak:
        return Peak(self.hidden - self.product + 3 * self.inner - self._lengths("down_proj"))

    def _up(self) -> Peak:
        """The last module that widens; the inner product's parts are free, and gradients of the adapters after it are there."""
        batch = self.batch
        part = next(part for part in batch.model.linears() if part.name in ("up_proj", "gate_up_proj"))
        gone = self.product + 3 * self.inner + self._lengths("down_proj")
        flowing = 2 * self.hidden + batch.tokens * part.outputs * batch.width
        done = [self.targets[name] for name in ("down_proj", "gate_proj") if name in self.targets]
        first = batch.run.gradient_accumulation_steps == 1  # else a batch before has made them
        gradients = first * 4 * batch.run.lora_r * sum(each.inputs + each.outputs for each in done)
        return Peak(flowing - gone + _turned(batch, part) + self._gradients(part.name) + gradients)

    def _scaled_down(self) -> Peak:
        """DoRA's lengths of the last module are learned: its output, the gradient and their product, in 32 bits."""
        return Peak(self.hidden + 12 * self.batch.tokens * self.batch.model.hidden_size if "down_proj" in self.targets else 0)

    def _scaled_up(self) -> Peak:
        """The same for the module that widens; the inner product's parts are free by then."""
        part = next((self.targets[name] for name in ("up_proj", "gate_up_proj") if name in self.targets), None)
        if part is None:
            return Peak(0)
        gone = self.product + 2 * self.inner + self._lengths("down_proj")
        other = self.inner if part.name == "up_proj" else 0
        return Peak(self.hidden - gone + other + 12 * self.batch.tokens * part.outputs)

    def _second_norm(self) -> Peak:
        gone = 3 * self.inner + self.product + self.up_source + self._lengths("down_proj", *_UP)
        return Peak(2 * self.hidden - gone + norm_backward(self.batch))

    def _in_attention(self) -> Peak:
        batch, model = self.batch, self.batch.model
        gone = 3 * self.inner + self.product + self.up_source + (model.norms_per_layer - 1) * self.norm
        gone += self._lengths("o_proj", "down_proj", *_UP)
        if self.eager:
            scores = batch.scores
            narrow = batch.width if batch.width < 4 else 4
            freed = gone + self._output() + self.repeated + (scores * narrow if narrow < 4 else 0)
            gradients = 8 + 4 * batch.cuda  # of the softmax and of what it was made of; CUDA's kernel is given the former times the softmax
            return Peak(self.hidden + self.query + scores * gradients - freed)
        flowing = self.hidden + 2 * self.query + 2 * self.repeated
        return Peak(flowing - gone, self._kernel())

    def _kernel(self) -> int:
        """Return what the fused kernel's backward pass holds itself on CUDA: 32-bit sums, and keys repeated for their heads."""
        batch, model = self.batch, self.batch.model
        if not batch.cuda:
            return 0
        sums = batch.tokens * 4 * (model.query_size + model.num_attention_heads)
        return sums + (2 * self.query if self.repeated < self.query else 0)

    def _gradients(self, name: str) -> int:
        """Return the adapter's gradients and weights of one module on their way, before they are added up."""
        if name not in self.targets:
            return 0
        part, batch = self.targets[name], self.batch
        return batch.run.lora_r * (part.inputs + part.outputs) * (4 + (batch.width if batch.width < 4 else 0))


def _widened(batch: Batch, part: Linear) -> int:
    return widened_bytes(batch.model, batch.run, part, batch.width, at_once=batch.kernels)


def _turned(batch: Batch, part: Linear) -> int:
    """Return what the gradient of a product's input takes beside it: the weight in full width, or in 8 bits what stands in its place."""
    return turned_bytes(part, batch.tokens, batch.narrow) if batch.narrow else _widened(batch, part)


def _post_norm(model: ModelSpec) -> bool:
    return model.family == "olmo2"


def _norm(batch: Batch, size: int, groups: int) -> int:
    """Return what norms over `size` numbers of each token keep: those in 32 bits and one factor a group; Gemma's weights too."""
    weights = 4 * size // groups if batch.model.norms_per_layer > 2 else 0
    return batch.tokens * 4 * (size + groups) + weights


def _qk_norm(batch: Batch) -> int:
    model = batch.model
    if not model.qk_norm:
        return 0
    full = _post_norm(model)
    heads, key_heads = (1, 1) if full else (model.num_attention_heads, model.num_key_value_heads)
    return _norm(batch, model.query_size, heads) + _norm(batch, model.key_value_size, key_heads)
