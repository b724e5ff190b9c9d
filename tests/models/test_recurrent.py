"""Videos, rows of images, lines of text; and the network that enlarges images."""

import pytest
import torch
from torch.nn import functional as F

from cvfast.models import create_model
from cvfast.models.recurrent import CRNN, RowLSTM, VideoRNN, ctc_greedy
from cvfast.models.superres import SRResNet, bicubic


@pytest.mark.parametrize("name", ["cnn_lstm", "cnn_gru"])
def test_frames_behind_a_videos_end_do_not_matter(name):
    model = create_model(name, num_classes=4, in_chans=1, features=8, hidden=6).eval()
    videos = torch.randn(3, 5, 1, 16, 16)
    lengths = torch.tensor([5, 2, 3])
    logits = model(videos, lengths)
    assert logits.shape == (3, 4)
    for sample, length in enumerate(lengths.tolist()):
        videos[sample, length:] = 1e3
        torch.testing.assert_close(logits[sample : sample + 1], model(videos[sample : sample + 1, :length]))
    torch.testing.assert_close(model(videos, lengths), logits)
    assert not torch.allclose(model(videos), logits)


def test_the_order_of_frames_matters():
    model = VideoRNN(3, 1, features=8, hidden=6).eval()
    video = torch.randn(1, 4, 1, 16, 16)
    assert not torch.allclose(model(video), model(video.flip(1)), atol=1e-5)


def test_row_lstm_takes_rows_as_steps():
    model = RowLSTM(num_classes=5, in_chans=2, width=12, hidden=4).eval()
    images = torch.randn(2, 2, 9, 12)
    assert model(images).shape == (2, 5)
    rows = torch.stack([torch.cat((image[0], image[1]), 1) for image in images])  # [N, H, C * W]
    torch.testing.assert_close(model(images), model.fc(model.lstm(rows)[0].mean(1)))


def test_recurrent_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="unknown cell 'rnn'; choose one of lstm, gru"):
        VideoRNN(cell="rnn")
    with pytest.raises(ValueError, match="positive"):
        RowLSTM(hidden=0)


def test_crnns_convolutions_are_the_papers():
    with torch.device("meta"):
        model = create_model("crnn")
    channels = [1, 64, 128, 256, 256, 512, 512, 512]
    found = [(c.in_channels, c.out_channels) for c in model.columns if isinstance(c, torch.nn.Conv2d)]
    assert found == list(zip(channels, channels[1:], strict=False))


def test_crnns_steps_are_its_columns():
    model = CRNN(7, width=2, hidden=3).eval()
    widths = torch.tensor([8, 40, 43, 100])
    for width, steps in zip(widths.tolist(), model.steps(widths).tolist(), strict=True):
        log_probs = model(torch.randn(2, 1, 32, width))
        assert log_probs.shape == (steps, 2, 7)
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(steps, 2))


def test_crnn_learns_to_read_with_ctc():
    torch.manual_seed(0)
    model = CRNN(6, width=4, hidden=16)
    images, widths = torch.randn(3, 1, 32, 48), torch.tensor([48, 36, 48])
    texts, lengths = torch.tensor([[1, 2, 2, 5], [3, 4, 0, 0], [5, 1, 3, 0]]), torch.tensor([4, 2, 3])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    expected = [[1, 2, 2, 5], [3, 4], [5, 1, 3]]
    for _ in range(200):
        log_probs = model(images, widths)
        loss = F.ctc_loss(log_probs, texts, model.steps(widths), lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ctc_greedy(log_probs, model.steps(widths)) == expected:
            break
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert ctc_greedy(log_probs, model.steps(widths)) == expected


def test_ctc_greedy_drops_repetitions_before_blanks():
    steps = torch.tensor([[1, 1, 0, 1, 2], [0, 0, 3, 3, 3]])
    log_probs = F.one_hot(steps.T, 4).float().log()
    assert ctc_greedy(log_probs) == [[1, 1, 2], [3]]
    assert ctc_greedy(log_probs, torch.tensor([2, 2])) == [[1], []]


def test_an_untrained_srresnet_is_bicubic_and_training_reaches_all_of_it():
    model = SRResNet(in_chans=2, width=4, blocks=2)
    images = torch.rand(2, 2, 5, 6)
    assert torch.equal(model(images), bicubic(images)) and bicubic(images).shape == (2, 2, 20, 24)
    torch.nn.init.normal_(model.tail.weight)
    model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
