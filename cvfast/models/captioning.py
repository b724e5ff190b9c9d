"""Captioners: images in, sentences out, one word after the other; and how to search for the best sentence.

A sentence is a row of word numbers that starts with START, ends with END and is padded with PAD.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cvfast.models.blocks import check_positive, conv_norm_relu
from cvfast.models.entry import Entry
from cvfast.nn import LSTM, AttentionLSTMCell, Linear

PAD, START, END = 0, 1, 2

State = tuple[Tensor, ...]  # what a captioner knows between two words: tensors whose dimension 0 is the sample


def _encoder(in_chans: int, features: int) -> nn.Sequential:
    """[N, C, H, W] -> [N, features, H / 4, W / 4]."""
    check_positive(in_chans=in_chans, features=features)
    return nn.Sequential(
        *conv_norm_relu(in_chans, -(-features // 4)), nn.MaxPool2d(2),
        *conv_norm_relu(-(-features // 4), -(-features // 2)), nn.MaxPool2d(2),
        *conv_norm_relu(-(-features // 2), features),
    )  # fmt: skip


class ShowAttendTell(nn.Module):
    """Looks at a part of the image for every word (Xu et al. 2015, soft attention): additive attention and an LSTM.

    Each place's features are joined by what a small network makes of its coordinates, so that the LSTM can ask for a
    place as well as for what is there. Words are scored from the word before, the state and the context, the paper's
    deep output; its gate on the context is left out.

    Args:
        num_classes: words, including PAD, START and END; default 16.
        in_chans: channels of the image, default 1.
        features: channels of the encoder's last map, which has a quarter of the image's height and width; default 128.
        embedding: numbers per word, default 64.
        hidden: units of the LSTM, default 192.
        attention: features in which state and places are compared, default 96.
        dropout: before the words' scores, default 0.3.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(
        self,
        num_classes: int = 16,
        in_chans: int = 1,
        features: int = 128,
        embedding: int = 64,
        hidden: int = 192,
        attention: int = 96,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, embedding=embedding, hidden=hidden, attention=attention)
        self.encoder = _encoder(in_chans, features)
        self.position = nn.Sequential(Linear(2, features), nn.Tanh(), Linear(features, features))
        self.init_h, self.init_c = Linear(features, hidden), Linear(features, hidden)
        self.embed = nn.Embedding(num_classes, embedding, padding_idx=PAD)
        self.cell = AttentionLSTMCell(embedding, hidden, features, attention)
        self.from_word = Linear(embedding, embedding)
        self.from_state = Linear(hidden, embedding, bias=False)
        self.from_context = Linear(features, embedding, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.words = Linear(embedding, num_classes)

    def start(self, images: Tensor) -> State:
        """The state before START, of images [N, C, H, W]: places [N, S, F], those projected, h, c."""
        features = self.encoder(images)
        places = features.flatten(2).transpose(1, 2).contiguous()  # once, as every step reads them
        places = places + self.position(_coordinates(features))
        mean = places.mean(1)
        return places, self.cell.project_keys(places), self.init_h(mean).tanh(), self.init_c(mean).tanh()

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State, Tensor]:
        """Scores [N, V] of the word after words [N], the next state, where it looked: weights [N, S], row by row."""
        places, projected, h, c = state
        word = self.embed(words)
        h, c, context, weights = self.cell(word, places, (h, c), projected_keys=projected)
        return self._scores(word, h, context), (places, projected, h, c), weights

    def forward(self, images: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [N, T, V] of the word that follows each word of sentences [N, T], and weights [N, T, S]."""
        places, projected, h, c = self.start(images)
        words = self.embed(sentences)
        states, _, contexts, weights = self.cell.unroll(words, places, (h, c), projected_keys=projected)
        return self._scores(words, states, contexts), weights

    def _scores(self, word: Tensor, h: Tensor, context: Tensor) -> Tensor:
        """[*, V] from embedded words, states and contexts [*, ...], of one step or of all."""
        output = self.from_word(word) + self.from_state(h) + self.from_context(context)
        return self.words(self.dropout(output.tanh()))


def _coordinates(features: Tensor) -> Tensor:
    """[S, 2]: row and column, from -1 to 1, of the places of features [N, F, H, W]."""
    axes = [torch.linspace(-1, 1, size, dtype=features.dtype, device=features.device) for size in features.shape[2:]]
    return torch.cartesian_prod(*axes)


class ShowTell(nn.Module):
    """Looks at the image once (Vinyals et al. 2015): the image is the first input of an LSTM, the words follow.

    Args:
        num_classes, in_chans, features, hidden, dropout: as ShowAttendTell's.
        embedding: numbers per word and for the image, default 128.
        grid: the encoder's last map is pooled to (rows, columns) before it becomes the LSTM's input; default (4, 4).

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(
        self,
        num_classes: int = 16,
        in_chans: int = 1,
        features: int = 128,
        embedding: int = 128,
        hidden: int = 192,
        dropout: float = 0.3,
        grid: tuple[int, int] = (4, 4),
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, embedding=embedding, hidden=hidden, rows=grid[0], columns=grid[1])
        self.encoder = nn.Sequential(_encoder(in_chans, features), nn.AdaptiveAvgPool2d(tuple(grid)), nn.Flatten())
        self.image = Linear(features * grid[0] * grid[1], embedding)
        self.embed = nn.Embedding(num_classes, embedding, padding_idx=PAD)
        self.lstm = LSTM(embedding, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.words = Linear(hidden, num_classes)

    def start(self, images: Tensor) -> State:
        """The state (h, c), [N, H] each, before START, of images [N, C, H, W]."""
        h, c = self.lstm(self.image(self.encoder(images))[:, None])[1]
        return h[0], c[0]

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State, None]:
        """Scores [N, V] of the word after words [N], the next state, and no weights."""
        output, state = self._read(words[:, None], state)
        return output[:, 0], state, None

    def forward(self, images: Tensor, sentences: Tensor) -> tuple[Tensor, None]:
        """Scores [N, T, V] of the word that follows each word of sentences [N, T], and no weights."""
        return self._read(sentences, self.start(images))[0], None

    def _read(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        output, (h, c) = self.lstm(self.embed(words), (state[0][None], state[1][None]))
        return self.words(self.dropout(output)), (h[0], c[0])


@torch.no_grad()
def greedy(captioner: nn.Module, images: Tensor, longest: int) -> tuple[Tensor, Tensor | None]:
    """Sentences made by taking the likeliest word each time.

    Args:
        captioner: a ShowAttendTell or ShowTell, in eval mode.
        images: [N, C, H, W].
        longest: words at most, END included, START not.

    Returns:
        Words int64 [N, longest], padded with PAD after END, and weights [N, longest, S] (None without attention).
    """
    state = captioner.start(images)
    words = torch.full((len(images),), START, device=images.device)
    sentences, looks = [], []
    for _ in range(longest):
        logits, state, weights = captioner.step(words, state)
        done = (words == END) | (words == PAD)
        words = _allowed(logits).argmax(-1).masked_fill(done, PAD)
        sentences.append(words)
        looks.append(weights)
    return torch.stack(sentences, 1), None if looks[0] is None else torch.stack(looks, 1)


@torch.no_grad()
def beam_search(captioner: nn.Module, images: Tensor, longest: int, beams: int = 4) -> tuple[Tensor, Tensor]:
    """Sentences of the highest probability among those that `beams` partial sentences per image lead to.

    Args:
        captioner, images, longest: as greedy's. A sentence without END after `longest` words competes as it is.
        beams: partial sentences that are kept per image; 1 is greedy, all of them an exhaustive search.

    Returns:
        The best sentence per image int64 [N, longest], padded with PAD after END, and its log-probability [N].

    Raises:
        ValueError: if `beams` or `longest` is not positive.
    """
    check_positive(beams=beams, longest=longest)
    n, device = len(images), images.device
    state = captioner.start(images)
    sentences = torch.full((n, 1, 1), START, device=device)  # [N, beams, words]
    total = torch.zeros(n, 1, device=device)  # log-probability of each
    for _ in range(longest):
        kept, last = sentences.shape[1], sentences[..., -1]
        logits, state, _ = captioner.step(last.flatten(), state)
        gain = _allowed(logits).log_softmax(-1).unflatten(0, (n, kept))  # [N, kept, V]
        done = ((last == END) | (last == PAD))[..., None]
        after_end = torch.full_like(gain[0, 0], -torch.inf).index_fill(0, torch.tensor(PAD, device=device), 0.0)
        candidates = (total[..., None] + torch.where(done, after_end, gain)).flatten(1)
        total, chosen = candidates.topk(min(beams, candidates.shape[1]), sorted=True)
        parent, word = chosen // gain.shape[2], chosen % gain.shape[2]
        history = sentences.gather(1, parent[..., None].expand(-1, -1, sentences.shape[2]))
        sentences = torch.cat((history, word[..., None]), 2)
        rows = (torch.arange(n, device=device)[:, None] * kept + parent).flatten()
        state = tuple(tensor[rows] for tensor in state)
    return sentences[:, 0, 1:], total[:, 0]


def _allowed(logits: Tensor) -> Tensor:
    """Scores without the words that no sentence contains after START."""
    return logits.index_fill(-1, torch.tensor([PAD, START], device=logits.device), -torch.inf)


def _inputs(
    batch: int, size: Sequence[int], in_chans: int = 1, num_classes: int = 16, words: int = 10, **_
) -> dict[str, Tensor]:
    first = min(END + 1, num_classes - 1)
    sentences = torch.randint(first, num_classes, (batch, words))
    return {"images": torch.rand(batch, in_chans, *size), "sentences": sentences}


MODELS = {
    "show_attend_tell": Entry(ShowAttendTell, (56, 56), "captioning", _inputs),
    "show_tell": Entry(ShowTell, (56, 56), "captioning", _inputs),
}
