"""The autoregressive transformer: text -> codes, frame after frame.

    codes [B, T, h, w] -> groups [B, T, P, G]   P positions a frame, each with G = group x group codes
    position i is fed:  codes of position i-1          (learned embeddings, one table a slot of the group)
                      + codes around i                 (in the frame before, and in the rows above: what moves, moves little,
                                                        and edges go on; a convolution that sees only what is drawn already)
                      + place in the frame, number of the frame (learned positional and temporal embeddings)
                      + the caption as a whole         (and, as a prefix, word by word)
    pre-norm causal blocks -> state i -> the codes of position i, one slot after another (a small head that is
    itself autoregressive over the group), and "does the clip end here?" at each frame's first position.

Real lengths: the clips of a batch lie one behind the other (`Layout`), each with its own length; only attention sees them
padded, to the longest of those of like length, which the causal mask makes harmless. A clip of 17 frames costs 17 frames.

The blocks are those of Radford et al. 2019 (pre-norm) with RMSNorm (Zhang & Sennrich 2019) and normalised queries
and keys (Dehghani et al. 2023). `frame_states` is the seam for decoding a whole frame a pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from t2v_ds.config import TransformerConfig
from t2v_ds.models.packing import Layout, Packing


@dataclass
class Cache:
    """Keys and values of every layer during generation: [B, heads, L, head width] fp32, grown by doubling."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    length: int = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions [B, heads, n, head width] of `layer`; return all of them."""
        end = self.length + key.shape[2]
        if layer == len(self.keys):
            self.keys.append(key.new_empty(*key.shape[:2], max(64, 2 * end), key.shape[3]))
            self.values.append(torch.empty_like(self.keys[layer]))
        if end > self.keys[layer].shape[2]:
            for store in (self.keys, self.values):
                larger = store[layer].new_empty(*key.shape[:2], 2 * end, key.shape[3])
                larger[:, :, : self.length] = store[layer][:, :, : self.length]
                store[layer] = larger
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019), in fp32 whatever comes in: bf16 has no fused kernel on the CPU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> fp32 [..., width]."""
        return F.rms_norm(x.float(), (len(self.weight),), self.weight, 1e-6)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        hidden = int(config.mlp_ratio * width)
        self.dropout = config.dropout
        self.norm1 = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = RMSNorm(width // config.heads)
        self.key_norm = RMSNorm(width // config.heads)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = RMSNorm(width)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, packing: Packing, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """Packed [N, width] -> [N, width]; with `cache`, the positions follow those in it."""
        x = x + self._drop(self.out(self._attend(self.norm1(x), packing, cache, layer)))
        return x + self._drop(self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")))

    def _attend(self, x: Tensor, packing: Packing, cache: Cache | None, layer: int) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # [N, heads, head width]
        q, k = self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype)
        if not packing.groups:
            return self._attend_group(q, k, v, packing, cache, layer)
        y = torch.empty_like(x, dtype=v.dtype)
        for rows, group in packing.groups:
            y = y.index_copy(0, rows, self._attend_group(q[rows], k[rows], v[rows], group, None, layer))
        return y

    def _attend_group(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, cache: Cache | None, layer: int) -> Tensor:
        """Packed queries, keys and values [N, heads, head width] -> packed [N, width]."""
        q, k, v = (packing.unpack(one).transpose(1, 2) for one in (q, k, v))  # [B, heads, L, head width]
        if cache is not None:
            k, v = cache.append(layer, k, v)
        # With a cache, either all positions are new (causal) or one position a clip is (sees everything before it).
        causal = q.shape[2] == k.shape[2]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return packing.pack(y.transpose(1, 2).flatten(2))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GroupHead(nn.Module):
    """State of a position -> logits of its codes, slot after slot, each slot given the ones before it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.slots = config.group**2
        width = config.width
        self.given = nn.ModuleList(nn.Embedding(config.codebook_size, width) for _ in range(self.slots - 1))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(self.slots))
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width, bias=False), nn.GELU(approximate="tanh")) for _ in range(self.slots)
        )
        self.logits = nn.ModuleList(nn.Linear(width, config.codebook_size) for _ in range(self.slots))

    def slot(self, state: Tensor, index: int) -> Tensor:
        """State [N, width], with the codes of earlier slots added by `add` -> logits [N, K] of slot `index`."""
        y = self.norms[index](state)
        logits: Tensor = self.logits[index](y + self.mixers[index](y))
        return logits

    def add(self, state: Tensor, index: int, codes: Tensor) -> Tensor:
        """State [N, width] after slot `index` turned out to be codes [N]."""
        if index >= len(self.given):
            return state
        added: Tensor = state + self.given[index](codes)
        return added

    def loss(self, state: Tensor, targets: Tensor) -> Tensor:
        """State [N, width], targets [N, G] -> negative log likelihood in nats [N, G]."""
        losses = []
        for index in range(self.slots):
            losses.append(F.cross_entropy(self.slot(state, index).float(), targets[:, index], reduction="none"))
            state = self.add(state, index, targets[:, index])
        return torch.stack(losses, dim=1)


class VideoTransformer(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, self.side = config.width, config.grid_size // config.group
        self.positions = self.side**2  # a frame
        self.slots = config.group**2
        self.codes = nn.ModuleList(nn.Embedding(config.codebook_size, width) for _ in range(self.slots))
        self.start = nn.Parameter(torch.zeros(width))  # stands for the codes before the first position
        self.place = nn.Embedding(self.positions, width)  # learned positional embedding
        self.time = nn.Embedding(config.max_frames + 1, width)  # learned temporal embedding; +1: the end's
        self.word = nn.Linear(config.text_width, width)
        self.caption = nn.Linear(config.text_width, width)
        self.no_word = nn.Parameter(torch.zeros(width))  # fills the prefix behind a caption's last word
        reach = range(-(config.neighbourhood // 2), config.neighbourhood // 2 + 1) if config.neighbourhood else range(0)
        self.offsets_before = [(y, x) for y in reach for x in reach]  # in the frame before
        self.offsets_above = [(y, x) for y, x in self.offsets_before if y < 0]  # in the frame itself
        taps = len(self.offsets_before) + len(self.offsets_above)
        self.around = nn.Linear(taps * width, width, bias=False) if taps else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(width)
        self.head = GroupHead(config)
        self.end = nn.Linear(width, 1)
        self.apply(self._init)
        for table in (self.place, self.time):  # as loud as the codes that they are added to
            nn.init.normal_(table.weight, std=0.3)
        for layer in (self.word, self.caption):
            nn.init.normal_(layer.weight, std=config.text_width**-0.5)
        for block in self.blocks:  # residual branches start small (Radford et al. 2019)
            for name in ("out.weight", "down.weight"):
                nn.init.normal_(block.get_parameter(name), std=0.02 / (2 * config.layers) ** 0.5)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @torch.no_grad()
    def initialise_codes(self, codebook: Tensor) -> None:
        """Start the embeddings and the logits of codes as random projections of the tokenizer's codebook [K, D].

        Codes that look alike then begin alike, and what is learned of one holds for its neighbours; from unrelated
        vectors this alone takes hundreds of steps.
        """
        centred = codebook.float() - codebook.float().mean(0)
        centred = centred / centred.square().mean().sqrt().clamp_min(1e-6)

        def project(weight: Tensor, std: float) -> None:
            weight.copy_(centred @ (torch.randn(centred.shape[1], weight.shape[1]) * std / centred.shape[1] ** 0.5))

        for table in self.codes:
            project(table.get_parameter("weight"), 0.3)
        for table in self.head.given:
            project(table.get_parameter("weight"), 0.3)
        for logits in self.head.logits:
            project(logits.get_parameter("weight"), 0.05)

    # -- codes <-> groups ------------------------------------------------------------------------------------------

    def to_groups(self, codes: Tensor) -> Tensor:
        """Codes [B, T, h, w] -> groups [B, T, P, G]."""
        b, t, _, _ = codes.shape
        s, g = self.side, self.config.group
        return codes.view(b, t, s, g, s, g).permute(0, 1, 2, 4, 3, 5).reshape(b, t, s * s, g * g)

    def to_codes(self, groups: Tensor) -> Tensor:
        """Groups [B, T, P, G] -> codes [B, T, h, w]."""
        b, t, _, _ = groups.shape
        s, g = self.side, self.config.group
        return groups.view(b, t, s, s, g, g).permute(0, 1, 2, 4, 3, 5).reshape(b, t, s * g, s * g)

    # -- inputs ----------------------------------------------------------------------------------------------------

    def embed_codes(self, groups: Tensor) -> Tensor:
        """Groups [..., G] -> [..., width]."""
        embedded: Tensor = self.codes[0](groups[..., 0])
        for slot in range(1, self.slots):
            embedded = embedded + self.codes[slot](groups[..., slot])
        return embedded

    def text_inputs(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Word vectors [B, W, text width], mask [B, W] -> prefix [B, W, width], caption [B, width]."""
        prefix = torch.where(mask[..., None], self.word(text), self.no_word)
        count = mask.sum(1, keepdim=True).clamp_min(1)
        # Divided by the square root: the sum of unrelated vectors grows with it.
        pooled = (text * mask[..., None]).sum(1) / count.sqrt()
        return prefix, self.caption(pooled)

    def neighbours(self, before: Tensor, current: Tensor, row: int | None = None) -> Tensor:
        """What positions are fed of the codes around them.

        Args:
            before: embeddings [N, P, width] of the frames before.
            current: embeddings [N, P, width] of the frames themselves, of which only rows above a position are used.
            row: only for the positions of this row; None: for all.

        Returns:
            [N, P, width], or [N, P / side, width] of `row`.
        """
        first, last = (0, self.side) if row is None else (row, row + 1)
        if self.around is None:
            return torch.zeros_like(current[:, : (last - first) * self.side])
        margin = self.config.neighbourhood // 2
        taps = []
        for frames, offsets in ((before, self.offsets_before), (current, self.offsets_above)):
            padded = F.pad(frames.unflatten(1, (self.side, self.side)), (0, 0, margin, margin, margin, margin))
            for y, x in offsets:
                taps.append(padded[:, margin + y + first : margin + y + last, margin + x : margin + x + self.side])
        fed: Tensor = self.around(torch.cat(taps, dim=-1))
        return fed.flatten(1, 2)

    def place_and_time(self, frames: Tensor) -> Tensor:
        """Frame numbers [...] -> [..., P, width]."""
        time: Tensor = self.time(frames.clamp_max(self.config.max_frames))
        place: Tensor = self.place.weight
        return time[..., None, :] + place

    def inputs(self, groups: Tensor, caption: Tensor, starts: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Inputs of frames and of clips' ends.

        Args:
            groups: [F, P, G], the frames of all clips, one behind the other.
            caption: [B, width]; starts: [B], the number of each clip's first frame given.

        Returns:
            [F*P, width] and [B, width]; the end is one position more, which only decides whether the clip ends there.
        """
        embedded = self.embed_codes(groups)  # [F, P, width]
        ends = layout.lengths.cumsum(0) - 1  # [B]: the last frame of each clip
        opens = (layout.number == 0)[:, None, None]  # [F, 1, 1]: the first frames, which have none before them
        before = torch.cat([torch.zeros_like(embedded[:1]), embedded[:-1]]).masked_fill(opens, 0)
        previous = torch.cat([embedded[:1, :1], embedded[:-1, -1:]]).where(~opens, self.start)  # [F, 1, width]
        previous = torch.cat([previous, embedded[:, :-1]], dim=1)  # [F, P, width]: the codes of position i - 1
        where = self.place_and_time(starts[layout.clip] + layout.number)
        frames = previous + self.neighbours(before, embedded) + where + caption[layout.clip, None]
        last = embedded[ends]
        near = self.neighbours(last, torch.zeros_like(last), row=0)[:, 0]
        end = last[:, -1] + near + self.place_and_time(starts + layout.lengths)[:, 0] + caption
        return frames.flatten(0, 1), end

    # -- forward ---------------------------------------------------------------------------------------------------

    def states(self, x: Tensor, packing: Packing, cache: Cache | None = None) -> Tensor:
        """Packed inputs [N, width] -> packed states [N, width]."""
        for layer, block in enumerate(self.blocks):
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, packing, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, packing, cache, layer)
        if cache is not None:
            cache.length += packing.shape[1]
        normed: Tensor = self.norm(x)
        return normed

    def forward(self, codes: Tensor, lengths: Tensor, text: Tensor, mask: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss of clips.

        Args:
            codes: int64 [B, T, h, w], of which clip b has the first lengths[b] frames.
            lengths: int64 [B], 1 to T.
            text: fp32 [B, W, text width] word vectors; mask: bool [B, W].
            starts: int64 [B]: number in its clip of the first frame given; -1: the clip is whole. None: all are whole.
                A part of a clip is drawn as if nothing came before it, and says nothing about where clips end.

        Returns:
            (negative log likelihood of the codes [B], of "the clip ends here" [B]), in nats, each the mean over the
            clip's own codes (or frames), so that the mean over clips does not depend on how they are batched.
        """
        whole = torch.ones_like(lengths, dtype=torch.bool) if starts is None else starts < 0
        first = torch.zeros_like(lengths) if starts is None else starts.clamp_min(0)
        prefix, caption = self.text_inputs(text, mask)
        layout = Layout(lengths, prefix.shape[1], self.positions)
        groups = self.to_groups(codes)[layout.clip, layout.number]  # [F, P, G]
        x = layout.pack(prefix.flatten(0, 1), *self.inputs(groups, caption, first, layout))
        frames, ends = layout.unpack(self.states(x, layout.packing))  # [F*P, width], [B, width]
        losses = self.head.loss(frames, groups.flatten(0, 1)).view(len(groups), -1)  # [F, P*G]
        per_clip = layout.clip_sums(losses.sum(1)) / (lengths * losses.shape[1])
        return per_clip, self._end_loss(frames, ends, layout) * whole

    def _end_loss(self, frames: Tensor, ends: Tensor, layout: Layout) -> Tensor:
        goes_on = F.softplus(self.end(frames[:: self.positions]).squeeze(-1).float())  # [F]: -log(1 - p), before each frame
        stops = F.softplus(-self.end(ends).squeeze(-1).float())  # [B]: -log(p)
        return (layout.clip_sums(goes_on) + stops) / (layout.lengths + 1)
