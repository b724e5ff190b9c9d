"""Models with recurrent layers: videos, lines of text, and images read row by row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cvfast.models.blocks import check_positive, conv_norm_relu
from cvfast.models.entry import Entry, image_inputs
from cvfast.nn import GRU, LSTM, Conv2d, Linear

CELLS = {"lstm": LSTM, "gru": GRU}


class RowLSTM(nn.Module):
    """Classifies an image whose rows are the steps of a sequence, by a bidirectional LSTM and the mean of its outputs.

    Args:
        num_classes: logits per image, default 10.
        in_chans: channels of the image, default 1; a step takes the row's pixels of all channels.
        width: pixels in a row, default 28.
        hidden: units per direction, default 128.
        layers: default 2.
        dropout: between layers and before the logits, default 0.2.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        width: int = 28,
        hidden: int = 128,
        layers: int = 2,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_chans=in_chans, width=width, hidden=hidden, layers=layers)
        between = dropout if layers > 1 else 0.0
        self.lstm = LSTM(in_chans * width, hidden, layers, batch_first=True, dropout=between, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.fc = Linear(2 * hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, width]."""
        rows = images.transpose(1, 2).flatten(2)  # [N, H, C * width]
        return self.fc(self.dropout(self.lstm(rows)[0].mean(1)))


class VideoRNN(nn.Module):
    """Classifies videos: a CNN looks at each frame, an LSTM or GRU at the sequence (Donahue et al. 2015).

    Args:
        num_classes: logits per video, default 10.
        in_chans: channels of a frame, default 3.
        cell: "lstm" or "gru".
        features: numbers that the CNN gives per frame, default 128.
        hidden: units of the recurrent layers, default 128.
        layers: default 1.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        cell: str = "lstm",
        features: int = 128,
        hidden: int = 128,
        layers: int = 1,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_chans=in_chans, features=features, hidden=hidden, layers=layers)
        if cell not in CELLS:
            raise ValueError(f"unknown cell {cell!r}; choose one of {', '.join(CELLS)}")
        half = -(-features // 2)
        self.frames = nn.Sequential(
            *conv_norm_relu(in_chans, half), nn.MaxPool2d(2),
            *conv_norm_relu(half, features), nn.MaxPool2d(2),
            *conv_norm_relu(features, features), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.rnn = CELLS[cell](features, hidden, layers, batch_first=True)
        self.fc = Linear(hidden, num_classes)

    def forward(self, videos: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, num_classes] of videos [B, T, C, H, W], of which the first ``lengths`` [B] frames count."""
        features = self.frames(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])
        state = self.rnn(features, lengths=lengths)[1]
        last = state[0] if isinstance(state, tuple) else state  # h_n [layers, B, hidden]
        return self.fc(last[-1])


class CRNN(nn.Module):
    """Reads lines of text (Shi et al. 2015): convolutions, two bidirectional LSTMs, a score per column and symbol.

    Trained with torch.nn.functional.ctc_loss, whose blank is symbol 0.

    Args:
        num_classes: symbols including the blank, default 37 (blank, digits, letters).
        in_chans: channels of the image, default 1. Images are 32 pixels high.
        width: channels of the first convolution, default 64, the paper's; the last ones have eight times as many.
        hidden: units of each LSTM and direction, default 256.
    """

    def __init__(self, num_classes: int = 37, in_chans: int = 1, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_chans=in_chans, width=width, hidden=hidden)
        flat = nn.MaxPool2d((2, 1))  # halves the height only: columns are the steps of the sequence
        self.columns = nn.Sequential(
            Conv2d(in_chans, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            *conv_norm_relu(2 * width, 4 * width), Conv2d(4 * width, 4 * width, 3, padding=1), nn.ReLU(), flat,
            *conv_norm_relu(4 * width, 8 * width), Conv2d(8 * width, 8 * width, 3, padding=1), nn.ReLU(), flat,
            Conv2d(8 * width, 8 * width, 2, bias=False), nn.BatchNorm2d(8 * width), nn.ReLU(),
        )  # fmt: skip
        self.lstm = LSTM(8 * width, hidden, 2, batch_first=True, bidirectional=True)
        self.fc = Linear(2 * hidden, num_classes)

    def steps(self, widths: Tensor) -> Tensor:
        """How many columns of scores images of these widths (pixels) get: ctc_loss's ``input_lengths``."""
        return widths // 4 - 1

    def forward(self, images: Tensor, widths: Tensor | None = None) -> Tensor:
        """Log-probabilities [T, N, num_classes] of images [N, C, 32, W], T = W // 4 - 1, as ctc_loss takes them.

        ``widths`` [N]: pixels of each image that count, where lines of several lengths are padded on the right.
        """
        columns = self.columns(images).squeeze(2).transpose(1, 2)  # [N, T, 8 * width]
        lengths = None if widths is None else self.steps(widths)
        return self.fc(self.lstm(columns, lengths=lengths)[0]).log_softmax(-1).transpose(0, 1)


def ctc_greedy(log_probs: Tensor, lengths: Tensor | None = None) -> list[list[int]]:
    """The likeliest symbol per step, repetitions and blanks (0) removed, of log-probabilities [T, N, K].

    ``lengths`` [N]: steps that count. Returns a list of symbols per sample.
    """
    best = log_probs.argmax(-1).T
    ends = [len(log_probs)] * len(best) if lengths is None else lengths.tolist()
    return [[s for s in torch.unique_consecutive(row[:end]).tolist() if s] for row, end in zip(best, ends, strict=True)]


def _grey(batch: int, size: Sequence[int], in_chans: int = 1, **_) -> dict[str, Tensor]:
    return image_inputs(batch, size, in_chans)


def _rows(batch: int, size: Sequence[int], in_chans: int = 1, width: int = 28, **_) -> dict[str, Tensor]:
    return image_inputs(batch, (size[0], width), in_chans)


def _videos(batch: int, size: Sequence[int], in_chans: int = 3, **_) -> dict[str, Tensor]:
    """Of eight frames."""
    return {"videos": torch.rand(batch, 8, in_chans, *size)}


MODELS = {
    "row_lstm": Entry(RowLSTM, (28, 28), inputs=_rows),
    "cnn_lstm": Entry(VideoRNN, (32, 32), "video", _videos),
    "cnn_gru": Entry(partial(VideoRNN, cell="gru"), (32, 32), "video", _videos),
    "crnn": Entry(CRNN, (32, 128), "text", _grey),
}
